"""Heads in the layouts of others: by their names, bit for bit, and as their loaders read them.

The loaders here are written from what each project has published (named in medusa/layouts.py), not from our code.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from medusa_ray import exchange, provenance
from medusa_ray.config import UserError
from medusa_ray.medusa.heads import EXTENDED_WEIGHTS, WEIGHTS, MedusaHeads

C, V, R = 32, 262, 3  # as tiny_base
TOKEN_MAP = torch.tensor([0, 3, 4, 7, 11, 12, 19])

# Written by hand for two heads of one and of two blocks.
GOLDEN = {
    ("tgi", "own", 1): """0.0.linear.bias 0.0.linear.weight 0.1.weight
        1.0.linear.bias 1.0.linear.weight 1.1.weight""",
    ("tgi", "own", 2): """0.0.linear.bias 0.0.linear.weight 0.1.linear.bias 0.1.linear.weight 0.2.weight
        1.0.linear.bias 1.0.linear.weight 1.1.linear.bias 1.1.linear.weight 1.2.weight""",
    ("tgi", "shared", 1): "0.0.linear.bias 0.0.linear.weight 1.0.linear.bias 1.0.linear.weight",
    ("vllm", "own", 1): """blocks.0.layers.0.bias blocks.0.layers.0.weight
        blocks.1.layers.0.bias blocks.1.layers.0.weight lm_heads.0.weight lm_heads.1.weight""",
    ("vllm", "own", 2): """blocks.0.layers.0.bias blocks.0.layers.0.weight
        blocks.0.layers.1.bias blocks.0.layers.1.weight blocks.1.layers.0.bias blocks.1.layers.0.weight
        blocks.1.layers.1.bias blocks.1.layers.1.weight lm_heads.0.weight lm_heads.1.weight""",
    ("vllm", "shared", 1): """blocks.0.layers.0.bias blocks.0.layers.0.weight
        blocks.1.layers.0.bias blocks.1.layers.0.weight lm_heads.0.weight""",
    (
        "modelopt",
        "own",
        1,
    ): """medusa_heads.0.0.linear.bias medusa_heads.0.0.linear.weight medusa_heads.0.1.weight
        medusa_heads.1.0.linear.bias medusa_heads.1.0.linear.weight medusa_heads.1.1.weight""",
}
GOLDEN |= {
    (other, *key): GOLDEN["tgi", *key] for other in ("trtllm", "fasterdecoding") for key in [("own", 1)]
}
FILES = {
    "tgi": "medusa_lm_head.safetensors",
    "trtllm": "medusa_lm_head.safetensors",
    "vllm": "model.safetensors",
    "fasterdecoding": "medusa_lm_head.pt",
    "modelopt": "model-medusa-heads.safetensors",
}


def tensors_in(folder: Path, layout: str) -> dict[str, torch.Tensor]:
    file = folder / FILES[layout]
    return torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)


def saved_heads(
    folder: Path,
    base: Path,
    layout: str = "own",
    num_layers: int = 1,
    token_map_M: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    num_heads: int = 2,
) -> Path:
    """Heads whose every weight differs, as after training."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": C, "vocab_size": V, "layout": layout, "rank": R}
    heads = MedusaHeads(num_heads, num_layers, **shape, token_map_M=token_map_M, dtype=dtype)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    heads.save(folder, str(base))
    (folder / "tree.json").write_text('{"paths": [[0]]}')
    (folder / "README.md").write_text("# Heads\n")
    return folder


def output_layer(base: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).lm_head.weight.detach()


def logits_of(folder: Path, base: Path, hidden_BC: torch.Tensor) -> torch.Tensor:
    """What our heads say [B, H, V], from the base's own output layer; impossible tokens are -inf."""
    heads = MedusaHeads.load(folder)
    if heads.shares_output:
        heads.init_from(output_layer(base))
    logits_BHM = heads(hidden_BC).detach()
    if heads.token_map_M is None:
        return logits_BHM
    logits_BHV = torch.full((*logits_BHM.shape[:2], V), -torch.inf)
    logits_BHV[..., heads.token_map_M] = logits_BHM
    return logits_BHV


# ------------------------------------------------------------------------------------------------ their loaders


def as_tgi_loads(folder: Path, base_VC: torch.Tensor, hidden_BC: torch.Tensor) -> torch.Tensor:
    """MedusaHeadV1, and MedusaHeadV2 where that raises: this file and no other, counts from config.json."""
    config = json.loads((folder / "config.json").read_text())
    assert "architectures" not in config  # it would take this for no Medusa
    weights = load_file(folder / "medusa_lm_head.safetensors")

    def block(head: int, layer: int, x: torch.Tensor) -> torch.Tensor:
        name = f"{head}.{layer}.linear"
        return x + F.silu(F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"]))

    num_heads, num_layers = config["medusa_num_heads"], config["medusa_num_layers"]
    try:
        outputs = [weights[f"{head}.{num_layers}.weight"] for head in range(num_heads)]
    except KeyError:
        assert num_layers == 1
        outputs = [base_VC] * num_heads
    logits = []
    for head, output_VC in enumerate(outputs):
        x = hidden_BC
        for layer in range(num_layers):
            x = block(head, layer, x)
        logits.append(F.linear(x, output_VC))
    return torch.stack(logits, dim=1)


def as_vllm_loads(folder: Path, hidden_BC: torch.Tensor) -> torch.Tensor:
    """Biases only where the config says so; a name that no parameter has is skipped and nothing is said."""
    config = json.loads((folder / "config.json").read_text())
    # Every key with "num" and "heads" or "layers" in it becomes one of these two, whichever comes last.
    for key in [key for key in config if "num" in key]:
        new = "num_heads" if "heads" in key else "num_hidden_layers" if "layers" in key else key
        config[new] = config.pop(key)
    weights = load_file(folder / "model.safetensors")
    num_rows = config["truncated_vocab_size"]
    logits = []
    for head in range(config["num_heads"]):
        x = hidden_BC
        for layer in range(config["num_hidden_layers"]):
            name = f"blocks.{head}.layers.{layer}"
            bias = weights[f"{name}.bias"] if config.get("medusa_fc_bias", False) else None
            x = x + F.silu(F.linear(x, weights[f"{name}.weight"], bias))
        output = weights[f"lm_heads.{0 if config['original_lm_head'] else head}.weight"]
        assert output.shape == (num_rows, config["hidden_size"])
        logits.append(F.linear(x, output))
    logits_BHM = torch.stack(logits, dim=1)
    if num_rows == config["vocab_size"]:
        return logits_BHM
    logits_BHV = torch.full((*logits_BHM.shape[:2], config["vocab_size"]), -torch.inf)
    logits_BHV[..., weights["token_map"]] = logits_BHM
    return logits_BHV


def as_modelopt_loads(folder: Path, hidden_BC: torch.Tensor) -> torch.Tensor:
    """What it keeps beside a model makes it add modules of these names, which from_pretrained then fills."""
    state = torch.load(folder / "modelopt_state.pth", weights_only=True)
    assert isinstance(state["modelopt_version"], str)
    ((mode, told),) = state["modelopt_state_dict"]
    assert mode == "medusa"
    assert told["metadata"] == {}
    config = json.loads((folder / "config.json").read_text())
    num_heads, num_layers = told["config"]["medusa_num_heads"], told["config"]["medusa_num_layers"]
    assert config["medusa"] == {"num_medusa_heads": num_heads, "num_medusa_layers": num_layers}

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(C, C)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + F.silu(self.linear(x))

    modules = torch.nn.ModuleList(
        torch.nn.Sequential(*(Block() for _ in range(num_layers)), torch.nn.Linear(C, V, bias=False))
        for _ in range(num_heads)
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert not (folder / "model.safetensors").exists()  # transformers would read it, and no index
    names = [name for name in index if name.startswith("medusa_heads.")]
    weights = {name.removeprefix("medusa_heads."): load_file(folder / index[name])[name] for name in names}
    modules.load_state_dict(weights)
    return torch.stack([head(hidden_BC) for head in modules], dim=1).detach()


# ------------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize(("layout", "kind", "num_layers"), GOLDEN)
def test_an_export_has_the_names_that_its_reader_looks_for(
    layout: str, kind: str, num_layers: int, tiny_base: Path, tmp_path: Path
) -> None:
    heads = saved_heads(tmp_path / "heads", tiny_base, kind, num_layers)
    exchange.export(str(heads), str(tmp_path / "out"), layout)
    assert sorted(tensors_in(tmp_path / "out", layout)) == sorted(GOLDEN[layout, kind, num_layers].split())


@pytest.mark.parametrize(
    ("layout", "kind", "num_layers", "is_mapped"),
    [
        ("tgi", "own", 1, False),
        ("tgi", "own", 2, False),
        ("tgi", "shared", 1, False),
        ("tgi", "shared", 2, False),
        ("tgi", "shared", 1, True),
        ("tgi", "lowrank", 1, False),
        ("trtllm", "own", 2, False),
        ("trtllm", "shared", 1, False),
        ("trtllm", "lowrank", 2, False),
        ("vllm", "own", 2, False),
        ("vllm", "own", 1, True),
        ("vllm", "shared", 2, False),
        ("vllm", "shared", 1, True),
        ("vllm", "lowrank", 1, False),
        ("vllm", "lowrank", 1, True),
        ("modelopt", "own", 1, False),
        ("modelopt", "shared", 2, False),
        ("modelopt", "lowrank", 1, False),
    ],
)
def test_their_loaders_see_the_heads_that_ours_does(
    layout: str, kind: str, num_layers: int, is_mapped: bool, tiny_base: Path, tmp_path: Path
) -> None:
    heads = saved_heads(tmp_path / "heads", tiny_base, kind, num_layers, TOKEN_MAP if is_mapped else None)
    exchange.export(str(heads), str(tmp_path / "out"), layout, materialise=True)
    hidden_BC = torch.randn(5, C)
    base_VC = output_layer(tiny_base)
    if layout == "vllm":
        found_BHV = as_vllm_loads(tmp_path / "out", hidden_BC)
    elif layout == "modelopt":
        found_BHV = as_modelopt_loads(tmp_path / "out", hidden_BC)
    else:
        found_BHV = as_tgi_loads(tmp_path / "out", base_VC, hidden_BC)
    expected_BHV = logits_of(heads, tiny_base, hidden_BC)
    if is_mapped and layout == "tgi":  # which now guesses from all tokens
        expected_BHV = expected_BHV.where(expected_BHV > -torch.inf, found_BHV)
    torch.testing.assert_close(found_BHV, expected_BHV, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("layout", "kind", "num_layers", "is_mapped", "message"),
    [
        (
            "tgi",
            "shared",
            2,
            False,
            r"tgi cannot hold heads of layout shared with 2 block\(s\). --materialise",
        ),
        ("tgi", "lowrank", 1, False, r"layout lowrank with 1 block\(s\). --materialise"),
        ("tgi", "shared", 1, True, r"and 7 of 262 tokens. --materialise"),
        ("tgi", "own", 1, True, "want.? a row for every token.* Export to vllm, or train"),
        ("trtllm", "shared", 1, False, "--materialise"),
        ("trtllm", "lowrank", 1, True, "Export to vllm, or train"),
        ("fasterdecoding", "shared", 1, False, "--materialise"),
        ("modelopt", "shared", 1, False, "--materialise"),
        ("vllm", "lowrank", 1, False, "--materialise"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    layout: str,
    kind: str,
    num_layers: int,
    is_mapped: bool,
    message: str,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    heads = saved_heads(tmp_path / "heads", tiny_base, kind, num_layers, TOKEN_MAP if is_mapped else None)
    with pytest.raises(UserError, match=message):
        exchange.export(str(heads), str(tmp_path / "out"), layout)
    assert not (tmp_path / "out").exists()
    if "Export to vllm" in message:
        with pytest.raises(UserError, match=message):
            exchange.export(str(heads), str(tmp_path / "out"), layout, materialise=True)


@pytest.mark.parametrize(("kind", "is_mapped"), [("lowrank", False), ("own", True), ("shared", True)])
def test_tgi_finds_no_heads_that_it_would_serve_as_others(
    kind: str, is_mapped: bool, tiny_base: Path, tmp_path: Path
) -> None:
    """It would take low-rank heads for shared ones, and a draft vocabulary for the whole one."""
    heads = saved_heads(tmp_path / "heads", tiny_base, kind, token_map_M=TOKEN_MAP if is_mapped else None)
    assert not (heads / "medusa_lm_head.safetensors").exists()
    assert MedusaHeads.load(heads).layout == kind


def test_heads_of_another_layout_leave_nothing_of_those_before(tiny_base: Path, tmp_path: Path) -> None:
    saved_heads(tmp_path, tiny_base, "own")
    saved_heads(tmp_path, tiny_base, "lowrank")
    assert MedusaHeads.load(tmp_path).layout == "lowrank"
    saved_heads(tmp_path, tiny_base, "own")
    assert [file.name for file in tmp_path.glob("*.safetensors")] == [WEIGHTS]


def test_an_export_says_where_it_comes_from_and_overwrites_nothing(tiny_base: Path, tmp_path: Path) -> None:
    heads = saved_heads(tmp_path / "heads", tiny_base)
    out = exchange.export(str(heads), str(tmp_path / "out"), "tgi", base="owner/model")
    assert json.loads((tmp_path / "out/config.json").read_text())["base_model_name_or_path"] == "owner/model"
    assert provenance.read(out)["config"]["format"] == "tgi"
    assert json.loads((tmp_path / "out/tree.json").read_text()) == {"paths": [[0]]}
    with pytest.raises(UserError, match="is there already, and nothing is overwritten"):
        exchange.export(str(heads), str(tmp_path / "out"), "tgi")


def test_an_adapter_is_merged_for_servers_that_know_none(tiny_base: Path, tmp_path: Path) -> None:
    """Heads of joint training belong to an adapter, which TGI would take for no model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    adapter = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapter.peft_config["default"].base_model_name_or_path = str(tiny_base)
    adapter.save_pretrained(tmp_path / "adapter")
    heads = saved_heads(tmp_path / "heads", tmp_path / "adapter", "shared")
    exchange.export(str(heads), str(tmp_path / "out"), "tgi", with_base=True)
    served = json.loads((tmp_path / "out/config.json").read_text())["base_model_name_or_path"]
    found = AutoModelForCausalLM.from_pretrained(served, dtype=torch.float32)
    ids = torch.arange(6, 30)[None]
    torch.testing.assert_close(found(ids).logits, adapter.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert (Path(served) / "tokenizer.json").exists()


# ------------------------------------------------------------------------------------------------------ import


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "kind", "num_layers", "is_mapped"),
    [
        ("tgi", "own", 2, False),
        ("tgi", "shared", 1, False),
        ("trtllm", "own", 1, False),
        ("fasterdecoding", "own", 2, False),
        ("vllm", "own", 2, False),
        ("vllm", "own", 1, True),
        ("vllm", "shared", 2, False),
        ("vllm", "shared", 1, True),
        ("modelopt", "own", 1, False),
    ],
)
def test_there_and_back_is_the_same_to_the_bit(
    layout: str,
    kind: str,
    num_layers: int,
    is_mapped: bool,
    dtype: torch.dtype,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    heads = saved_heads(
        tmp_path / "heads", tiny_base, kind, num_layers, TOKEN_MAP if is_mapped else None, dtype
    )
    exchange.export(str(heads), str(tmp_path / "out"), layout)
    again, notes = exchange.import_heads(str(tmp_path / "out"), str(tmp_path / "again"), str(tiny_base))
    assert notes == []
    (file,) = heads.glob("*.safetensors")
    assert (Path(again) / file.name).read_bytes() == file.read_bytes()
    for name in ("config.json", "tree.json", "README.md"):
        assert (Path(again) / name).read_text() == (heads / name).read_text()


def test_materialised_heads_come_back_as_heads_of_their_own(tiny_base: Path, tmp_path: Path) -> None:
    heads = saved_heads(tmp_path / "heads", tiny_base, "lowrank")
    exchange.export(str(heads), str(tmp_path / "out"), "vllm", materialise=True)
    exchange.import_heads(str(tmp_path / "out"), str(tmp_path / "again"))
    hidden_BC = torch.randn(5, C)
    torch.testing.assert_close(
        logits_of(tmp_path / "again", tiny_base, hidden_BC),
        logits_of(heads, tiny_base, hidden_BC),
        rtol=1e-4,
        atol=1e-3,
    )


def foreign(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], name: str) -> str:
    folder.mkdir()
    save_file(tensors, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def published(num_heads: int = 5, biases: bool = True) -> dict[str, torch.Tensor]:
    names = {}
    for head in range(num_heads):
        names[f"{head}.0.linear.weight"] = torch.randn(C, C)
        if biases:
            names[f"{head}.0.linear.bias"] = torch.randn(C)
        names[f"{head}.1.weight"] = torch.randn(V, C)
    return names


def test_a_wrong_number_of_heads_in_the_config_is_told_and_not_believed(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """FasterDecoding's published heads say 2 and are 5."""
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": str(tiny_base)}
    folder = foreign(tmp_path / "theirs", published(5), config, WEIGHTS)
    assert MedusaHeads.load(folder).num_heads == 5
    assert "says 2 heads, but the tensors are 5: taken as 5" in caplog.text
    again, notes = exchange.import_heads(folder, str(tmp_path / "ours"))
    assert notes == ["config.json says 2 heads, the tensors are 5: taken as 5"]
    caplog.clear()
    assert MedusaHeads.load(again).num_heads == 5
    assert not caplog.text


def test_heads_of_a_whole_model_leave_its_base_alone(tiny_base: Path, tmp_path: Path) -> None:
    """FasterDecoding's later version, whose base was trained too: the folder is the base."""
    tensors = {f"medusa_head.{name}": tensor for name, tensor in published(3).items()}
    base = load_file(tiny_base / "model.safetensors")
    folder = foreign(
        tmp_path / "theirs", base | tensors, {"vocab_size": V, "num_heads": 9}, "model.safetensors"
    )
    again, notes = exchange.import_heads(folder, str(tmp_path / "ours"))
    assert notes == []
    found = load_file(Path(again) / WEIGHTS)
    assert {f"medusa_head.{name}" for name in found} == tensors.keys()
    assert all(torch.equal(tensor, tensors[f"medusa_head.{name}"]) for name, tensor in found.items())
    assert json.loads((Path(again) / "config.json").read_text())["base_model_name_or_path"] == folder


def test_biases_that_a_converter_lost_become_zeros_and_that_is_said(tiny_base: Path, tmp_path: Path) -> None:
    config = {"base_model_name_or_path": str(tiny_base), "vocab_size": V}
    folder = foreign(tmp_path / "theirs", published(2, biases=False), config, WEIGHTS)
    again, notes = exchange.import_heads(folder, str(tmp_path / "ours"))
    assert len(notes) == 1
    assert "the biases of the blocks are missing" in notes[0]
    assert all(not head[0].linear.bias.any() for head in MedusaHeads.load(again))


@pytest.mark.parametrize("has_all_rows", [True, False])
def test_a_token_map_by_frequency_is_put_in_order_with_its_rows(
    has_all_rows: bool, tiny_base: Path, tmp_path: Path
) -> None:
    """vLLM takes a map in any order, and output layers with rows for the map or for all tokens."""
    token_map = torch.tensor([11, 3, 19, 0, 7, 4, 12])
    tensors = {"token_map": token_map}
    for head in range(2):
        tensors |= {
            f"blocks.{head}.layers.0.weight": torch.randn(C, C),
            f"blocks.{head}.layers.0.bias": torch.randn(C),
            f"lm_heads.{head}.weight": torch.randn(V if has_all_rows else len(token_map), C),
        }
    config = {"base_model_name_or_path": str(tiny_base), "vocab_size": V, "truncated_vocab_size": 7}
    folder = foreign(tmp_path / "theirs", tensors, config, "model.safetensors")
    again, _ = exchange.import_heads(folder, str(tmp_path / "ours"))
    hidden_BC = torch.randn(5, C)
    found_BHV = logits_of(Path(again), tiny_base, hidden_BC)
    for head in range(2):
        x = hidden_BC + F.silu(
            F.linear(
                hidden_BC, tensors[f"blocks.{head}.layers.0.weight"], tensors[f"blocks.{head}.layers.0.bias"]
            )
        )
        rows = tensors[f"lm_heads.{head}.weight"]
        for place, token in enumerate(token_map.tolist()):
            row = rows[token] if has_all_rows else rows[place]
            torch.testing.assert_close(found_BHV[:, head, token], x @ row, rtol=1e-4, atol=1e-4)
    assert (found_BHV > -torch.inf).sum() == 5 * 2 * 7


def test_a_shared_layer_that_is_not_the_base_s_becomes_each_head_s_own(
    tiny_base: Path, tmp_path: Path
) -> None:
    heads = saved_heads(tmp_path / "heads", tiny_base, "shared")
    exchange.export(str(heads), str(tmp_path / "out"), "vllm")
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors["lm_heads.0.weight"] += 1
    save_file(tensors, tmp_path / "out/model.safetensors")
    again, notes = exchange.import_heads(str(tmp_path / "out"), str(tmp_path / "again"))
    assert notes == ["the output layer that all heads share is not the base's: each gets a copy"]
    found = MedusaHeads.load(again)
    assert found.layout == "own"
    assert all(torch.equal(found.output_weight(head), tensors["lm_heads.0.weight"]) for head in range(2))


# -------------------------------------------------------------------------------------------------- bad folders


def test_a_folder_that_is_not_of_heads_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"but no heads: neither 0.0.linear.weight nor blocks.0.layers.0.weight"
    ):
        exchange.import_heads(str(tiny_base), str(tmp_path / "ours"))
    with pytest.raises(UserError, match="is no folder"):
        exchange.import_heads(str(tmp_path / "nowhere"), str(tmp_path / "ours"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"heads are in medusa_lm_head.safetensors"):
        exchange.import_heads(str(tmp_path / "empty"), str(tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "..", ""]
)
def test_an_index_that_climbs_out_of_its_folder_is_refused(file: str, tmp_path: Path) -> None:
    save_file(published(1), tmp_path / "outside.safetensors")
    folder = tmp_path / "theirs"
    folder.mkdir()
    index = {"weight_map": dict.fromkeys(published(1), file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match=re.escape(f"names the file {file!r}, but only safetensors files beside")
    ):
        exchange.import_heads(str(folder), str(tmp_path / "ours"))


@pytest.mark.parametrize("index", [{}, {"weight_map": [1]}, {"weight_map": {"0.0.linear.weight": 3}}])
def test_an_index_without_names_is_refused(index: dict, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="has no weight_map of names"):
        exchange.import_heads(str(tmp_path), str(tmp_path / "ours"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"0.0.linear.weight": torch.full((C, C), float("nan"))}, "0.0.linear.weight goes from nan to nan"),
        ({"3.0.linear.weight": torch.zeros(C, C - 1)}, "these are not heads of one shape"),
        ({"0.0.linear.weight_scale": torch.ones(1)}, "its heads are quantised"),
        ({"model.embed.weight": torch.ones(2, 2)}, "these are not heads of one shape"),
    ],
)
def test_tensors_that_are_no_heads_are_refused(
    changed: dict[str, torch.Tensor], message: str, tiny_base: Path, tmp_path: Path
) -> None:
    config = {"base_model_name_or_path": str(tiny_base)}
    folder = foreign(tmp_path / "theirs", published() | changed, config, WEIGHTS)
    with pytest.raises(UserError, match=message):
        exchange.import_heads(folder, str(tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()


def test_a_token_map_beyond_its_rows_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    heads = saved_heads(tmp_path / "heads", tiny_base, token_map_M=TOKEN_MAP)
    exchange.export(str(heads), str(tmp_path / "out"), "vllm")
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors["token_map"] = torch.tensor([5, 2**40])
    save_file(tensors, tmp_path / "out/model.safetensors")
    with pytest.raises(
        UserError, match="the token map names tokens 5 to 1099511627776, but an output layer has 7"
    ):
        exchange.import_heads(str(tmp_path / "out"), str(tmp_path / "again"))


def test_a_base_is_asked_for_where_it_is_needed(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "theirs", published(), {}, WEIGHTS)
    with pytest.raises(UserError, match=r"does not name the base. Give it with --base"):
        exchange.import_heads(folder, str(tmp_path / "ours"))
    exchange.import_heads(folder, str(tmp_path / "ours"), base="owner/model")  # which nothing needs to read
    heads = saved_heads(tmp_path / "heads", tmp_path / "gone", "shared")
    with pytest.raises(UserError, match=r"the base .*gone, whose output layer is needed, cannot be read"):
        exchange.export(str(heads), str(tmp_path / "out"), "vllm")
    exchange.export(str(heads), str(tmp_path / "out"), "tgi")  # shares it by name
    assert EXTENDED_WEIGHTS not in {file.name for file in (tmp_path / "out").iterdir()}
