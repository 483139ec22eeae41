"""An adapter's folder is a base like any other: it would otherwise be trained for, served or evaluated without."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec import AbstractFileSystem
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from medusa_ray.chat import Chat
from medusa_ray.medusa import base as base_of
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.compiled import library_of
from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.heads import MedusaHeads

TOKENS = torch.tensor([[1, 4, 40, 41, 42, 2, 5, 77]])


def write_adapter(folder: Path, base: Path, targets: list[str]) -> Path:
    """A LoRA whose B is not zero, as after training."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), tiny_base, ["q_proj", "down_proj"])


def test_an_adapters_folder_is_the_merged_model(adapter: Path, tiny_base: Path) -> None:
    """Against peft's own unmerged forward, through the engine's way into the base."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    bare = plain(TOKENS).logits
    adapted = PeftModel.from_pretrained(plain, adapter)(TOKENS, output_hidden_states=True)
    backbone = Backbone.load(str(adapter), torch.float32, "cpu")
    logits_BTV, hidden_BTC = backbone.plain_forward(TOKENS)
    torch.testing.assert_close(hidden_BTC, adapted.hidden_states[-1], atol=1e-5, rtol=0)
    assert (logits_BTV - adapted.logits).abs().max() < 1e-4 < (logits_BTV - bare).abs().max()


def test_an_adapter_may_name_its_base_by_a_folder_beside_it(
    adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """Trainers write the path as it was given to them; a worker runs somewhere else."""
    (tmp_path / "base").symlink_to(tiny_base)
    (tmp_path / "lora").mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    text = json.dumps(config | {"base_model_name_or_path": "../base"})
    (tmp_path / "lora" / "adapter_config.json").write_text(text)
    assert base_of.under_adapter(str(tmp_path / "lora")) == (str(tiny_base), None)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_the_output_layer_of_an_adapter_is_the_merged_ones(
    targets: list[str], tiny_base: Path, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path, tiny_base, targets)
    merged = base_of.load(str(folder), torch.float32, "cpu").get_output_embeddings().weight
    bare = base_of.output_weight(str(tiny_base))
    assert torch.equal(base_of.output_weight(str(folder)), merged)
    assert torch.equal(merged, bare) == ("lm_head" not in targets)


def test_the_output_layer_is_read_without_the_model_around_it(tmp_path: Path) -> None:
    """Tied embeddings are stored once, under another name."""
    weight_VC = torch.rand(5, 2)
    save_file({"model.embed_tokens.weight": weight_VC}, tmp_path / "model.safetensors")
    assert torch.equal(base_of.output_weight(str(tmp_path)), weight_VC)


def test_an_adapter_has_its_own_tokenizer_or_its_bases(
    adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    chat = Chat.load(str(adapter))
    assert chat.prompt_ids([{"role": "user", "content": "hi"}])[:2] == [1, 4]
    assert chat.eos_ids == {2}
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    tokenizer = Chat.load(str(tiny_base)).tokenizer
    tokenizer.chat_template = "{{ bos_token }}own"
    tokenizer.save_pretrained(tmp_path)
    assert Chat.load(str(tmp_path)).template_start == "{{ bos_token }}own"


def test_a_compiled_pass_of_an_adapter_is_not_that_of_its_base(adapter: Path, tiny_base: Path) -> None:
    assert library_of(str(adapter), "float32", None) != library_of(str(tiny_base), "float32", None)


def test_without_peft_an_adapter_is_refused_with_what_to_install(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_of, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"is an adapter, .* the package peft, .*\. Install medusa_ray\[lora\]"
    ):
        base_of.load(str(adapter), torch.float32, "cpu")


def test_an_adapter_of_another_base_or_of_none_is_refused(
    adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say what it adapts"):
        base_of.load(str(tmp_path), torch.float32, "cpu")
    weights = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 7)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the adapter .* does not fit its base"):
        base_of.load(str(tmp_path), torch.float32, "cpu")


def test_four_bits_want_a_gpu_and_their_package(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"needs a GPU, but the base is to run on 'cpu'"):
        base_of.load(str(tiny_base), torch.float32, "cpu", quantization="4bit")
    monkeypatch.setattr(base_of, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the package bitsandbytes, .*Install medusa_ray\[quantized\]"):
        base_of.load(str(tiny_base), torch.bfloat16, "cuda", quantization="4bit")


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused_with_both_numbers(tiny_base: Path) -> None:
    chat = Chat.load(str(tiny_base))
    chat.check_vocabulary(str(tiny_base))
    chat.tokenizer.add_tokens(["<|extra|>"])
    with pytest.raises(ValueError, match="has 263 tokens, but the model has embeddings for 262"):
        chat.check_vocabulary(str(tiny_base))


@pytest.fixture
def bucket(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AbstractFileSystem]:
    """Storage with the base at memory://base, and a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    storage = fsspec.filesystem("memory")
    storage.put(str(tiny_base), "/base", recursive=True)
    yield storage
    storage.rm("/base", recursive=True)


def test_a_base_at_a_uri_is_brought_once_and_again_when_it_has_changed(
    bucket: AbstractFileSystem, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought = []
    get_file = type(bucket).get_file
    monkeypatch.setattr(
        type(bucket),
        "get_file",
        lambda self, file, *rest: brought.append(file) or get_file(self, file, *rest),
    )
    first = base_of.fetched("memory://base")
    assert sorted(path.name for path in Path(first).iterdir()) == sorted(
        path.name for path in tiny_base.iterdir()
    )
    assert base_of.fetched("memory://base") == first
    assert len(brought) == len(set(brought))
    bucket.pipe_file("/base/config.json", (tiny_base / "config.json").read_bytes() + b" ")
    assert base_of.fetched("memory://base") != first
    with pytest.raises(FileNotFoundError, match="there is nothing at memory://none"):
        base_of.fetched("memory://none")


def test_an_engine_loads_from_uris_as_from_folders(
    bucket: AbstractFileSystem, tiny_base: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    heads = MedusaHeads(num_heads=2, num_layers=1, hidden_size=32, vocab_size=262)
    heads.save(tmp_path / "heads", str(tiny_base))
    (tmp_path / "heads" / "tree.json").write_text('{"paths": [[0], [1], [0, 0]]}')
    bucket.put(str(tmp_path / "heads"), "/base/heads", recursive=True)
    here, there = (
        Engine.load(where, f"{folder}/heads", compile="no")
        for where, folder in ((str(tiny_base), tmp_path), ("memory://base", "memory://base"))
    )
    assert there.tree == here.tree
    assert there.tree.paths == ((0,), (1,), (0, 0))
    replies = [[reply.token_ids for reply in engine.generate(prompts[:2], 8)] for engine in (here, there)]
    assert replies[0] == replies[1]


def test_an_adapter_and_its_base_may_both_be_uris(
    bucket: AbstractFileSystem, adapter: Path, tiny_base: Path
) -> None:
    bucket.put(str(adapter), "/base/adapter", recursive=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    moved = json.dumps(config | {"base_model_name_or_path": "memory://base"}).encode()
    bucket.pipe_file("/base/adapter/adapter_config.json", moved)
    there = base_of.load("memory://base/adapter", torch.float32, "cpu")
    assert torch.equal(there(TOKENS).logits, base_of.load(str(adapter), torch.float32, "cpu")(TOKENS).logits)
    assert Chat.load("memory://base/adapter").text([40]) == Chat.load(str(tiny_base)).text([40])
