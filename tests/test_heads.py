"""Medusa heads: what they compute, and what of them lies on disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.heads import EXTENDED_WEIGHTS, WEIGHTS, HeadStack, MedusaHeads, PackedHeadStack
from medusa_ray.medusa.loss import labels_for, medusa_loss, num_losses, whole_cross_entropy
from medusa_ray.medusa.tensors import MAX_HEADER

C, V, R = 8, 20, 3
TOKEN_MAP = torch.tensor([0, 3, 4, 7, 11, 12, 19])
M = len(TOKEN_MAP)

every_layout = pytest.mark.parametrize("layout", ["own", "shared", "lowrank"])
mapped_or_not = pytest.mark.parametrize("token_map_M", [None, TOKEN_MAP], ids=["whole", "mapped"])


def random_heads(
    num_heads: int = 3, num_layers: int = 2, layout: str = "own", token_map_M: torch.Tensor | None = None
) -> MedusaHeads:
    """Heads whose every weight differs, as after training."""
    torch.manual_seed(0)
    shape = {"hidden_size": C, "vocab_size": V, "layout": layout, "rank": R, "token_map_M": token_map_M}
    heads = MedusaHeads(num_heads, num_layers, **shape)
    heads.init_from(torch.randn(V, C))
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    return heads


@every_layout
@mapped_or_not
def test_fresh_heads_repeat_what_the_base_predicts(layout: str, token_map_M: torch.Tensor | None) -> None:
    """A random bias at the start would still train; the first steps would just be worse."""
    heads = MedusaHeads(2, 3, hidden_size=C, vocab_size=V, layout=layout, token_map_M=token_map_M)
    lm_head_VC, hidden_BC = torch.randn(V, C), torch.randn(5, C)
    heads.init_from(lm_head_VC)
    expected_BV = F.linear(hidden_BC, lm_head_VC)
    for head in range(2):
        found_BM = heads(hidden_BC)[:, head]
        torch.testing.assert_close(
            found_BM, expected_BV if token_map_M is None else expected_BV[:, token_map_M]
        )


def test_logits_are_residual_blocks_and_then_an_output_layer() -> None:
    heads, hidden_BC = random_heads(), torch.randn(4, C)
    for h, head in enumerate(heads):
        x = hidden_BC
        for layer in range(2):
            z = x @ head[layer].linear.weight.T + head[layer].linear.bias
            x = x + z * torch.sigmoid(z)
        torch.testing.assert_close(heads.residual(hidden_BC)[:, h], x)
        torch.testing.assert_close(heads(hidden_BC)[:, h], x @ head[2].weight.T)


@mapped_or_not
def test_a_low_rank_head_adds_two_thin_products_to_the_base_s_logits(
    token_map_M: torch.Tensor | None,
) -> None:
    heads, hidden_BC = random_heads(3, 1, "lowrank", token_map_M), torch.randn(4, C)
    torch.manual_seed(0)
    lm_head_VC = torch.randn(V, C)  # as random_heads drew it first
    heads.init_from(lm_head_VC)
    for h, head in enumerate(heads):
        x = heads.residual(hidden_BC)[:, h]
        assert head[1].down.weight.shape == (R, C)
        base_BV = x @ lm_head_VC.T
        base_BM = base_BV if token_map_M is None else base_BV[:, token_map_M]
        expected_BM = base_BM + x @ (head[1].up.weight @ head[1].down.weight).T
        torch.testing.assert_close(heads(hidden_BC)[:, h], expected_BM, rtol=1e-4, atol=1e-4)


@every_layout
@mapped_or_not
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("num_states", [1, 5])
def test_stacked_heads_say_what_the_modules_say(
    layout: str, token_map_M: torch.Tensor | None, num_layers: int, num_states: int
) -> None:
    """They have matrices of their own, stacked or packed for speed."""
    heads, hidden_BC = random_heads(3, num_layers, layout, token_map_M), torch.randn(num_states, C)
    expected_BHM = heads(hidden_BC)
    # atol: logits reach 300 and are summed in another order, which rounds by 1e-7 of that.
    torch.testing.assert_close(HeadStack(heads).logits(hidden_BC), expected_BHM, rtol=1e-5, atol=1e-4)
    place_BHK = expected_BHM.topk(4).indices
    ids = [
        place if token_map_M is None else int(token_map_M[place]) for place in place_BHK.flatten().tolist()
    ]
    assert HeadStack(heads).topk(hidden_BC, 4).flatten().tolist() == ids
    packed = heads.stack()
    assert isinstance(packed, PackedHeadStack)
    # bfloat16 has 8 bits: each factor is off by 0.2% on average, a wrong or missing term by as much as a logit.
    error = (packed.logits(hidden_BC) - expected_BHM).abs().mean() / expected_BHM.std()
    assert error < 0.02
    assert packed.topk(hidden_BC, 4).shape == (num_states, 3, 4)
    assert token_map_M is None or set(packed.topk(hidden_BC, 4).flatten().tolist()) <= set(
        token_map_M.tolist()
    )


def test_stacked_weights_are_held_once_and_follow_the_modules() -> None:
    """A copy would double the memory of a GPU, and go on guessing with the weights of yesterday."""
    heads, hidden_BC = random_heads(), torch.randn(3, C)
    stack = HeadStack(heads)
    storages = {head[0].linear.weight.untyped_storage().data_ptr() for head in heads}
    assert storages == {stack.weights_HCC[0].untyped_storage().data_ptr()}
    heads.load_state_dict({name: -tensor for name, tensor in heads.state_dict().items()})
    assert torch.equal(stack.topk(hidden_BC, 4), heads(hidden_BC).topk(4).indices)
    heads(hidden_BC).sum().backward()
    torch.optim.SGD(heads.parameters(), lr=1.0).step()
    assert torch.equal(stack.topk(hidden_BC, 4), heads(hidden_BC).topk(4).indices)


def test_the_base_s_output_layer_is_shared_and_not_copied_or_saved(tmp_path: Path) -> None:
    heads = MedusaHeads(2, hidden_size=C, vocab_size=V, layout="shared")
    lm_head_VC = torch.randn(V, C)
    heads.init_from(lm_head_VC)
    assert heads.output_weight(1).data_ptr() == lm_head_VC.data_ptr()
    heads.save(tmp_path, "base")
    names = load_file(tmp_path / WEIGHTS).keys()
    assert names == {f"{h}.0.linear.{kind}" for h in range(2) for kind in ("weight", "bias")}
    with pytest.raises(ValueError, match=r"lack it. Call init_from"):
        MedusaHeads.load(tmp_path)(torch.zeros(1, C))


def test_own_output_layers_do_not_move_together() -> None:
    heads = random_heads()
    before = heads.output_weight(1).clone()
    with torch.no_grad():
        heads.output_weight(0).zero_()
    assert torch.equal(heads.output_weight(1), before)


def test_an_output_layer_of_another_base_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is \[21, 8\], but the heads are made for a vocabulary of 20"):
        MedusaHeads(hidden_size=C, vocab_size=V).init_from(torch.zeros(V + 1, C))


# ------------------------------------------------------------------------------------------------ on disk


def test_a_folder_is_what_tgi_reads(tmp_path: Path) -> None:
    """One module repeated could not be saved as two blocks; TGI skips a folder that names architectures."""
    random_heads(num_heads=2, num_layers=2).save(tmp_path, "some/base")
    shapes = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    blocks = [f"{h}.{layer}.linear" for h in range(2) for layer in range(2)]
    assert shapes == {
        **{f"{block}.weight": [C, C] for block in blocks},
        **{f"{block}.bias": [C] for block in blocks},
        **{f"{h}.2.weight": [V, C] for h in range(2)},
    }
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "medusa_num_heads": 2,
        "medusa_num_layers": 2,
        "base_model_name_or_path": "some/base",
        "hidden_size": C,
        "vocab_size": V,
    }


@every_layout
@mapped_or_not
@pytest.mark.parametrize("num_layers", [1, 2])
def test_what_was_saved_comes_back_bit_for_bit(
    layout: str, token_map_M: torch.Tensor | None, num_layers: int, tmp_path: Path
) -> None:
    heads = random_heads(3, num_layers, layout, token_map_M)
    heads.stack()  # stacked weights must not get in the way
    heads.save(tmp_path, "base")
    again = MedusaHeads.load(tmp_path.as_uri())
    shape = (again.num_heads, again.num_layers, again.layout, again.hidden_size, again.vocab_size)
    assert shape == (3, num_layers, layout, C, V)
    assert again.draft_vocab_size == (V if token_map_M is None else M)
    assert again.rank == (R if layout == "lowrank" else 64)
    assert again.state_dict().keys() == heads.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in heads.state_dict().items())
    halved = MedusaHeads.load(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.bfloat16}
    assert token_map_M is None or torch.equal(halved.token_map_M, token_map_M)


def test_heads_and_layers_are_counted_in_the_tensors(tmp_path: Path) -> None:
    """A published config says 2 heads beside a file with 5."""
    random_heads(num_heads=3, num_layers=2).save(tmp_path, "base")
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 2, "medusa_num_layers": 1}')
    heads = MedusaHeads.load(tmp_path)
    assert (heads.num_heads, heads.num_layers, heads.vocab_size) == (3, 2, V)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/{WEIGHTS} does not exist"):
        MedusaHeads.load(tmp_path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    random_heads().save(tmp_path, "base")
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        MedusaHeads.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "2.0.linear.weight",
            torch.zeros(C, C - 1),
            r"2.0.linear.weight is \[8, 7\], .* \[8, 8\] was expected",
        ),
        ("1.2.weight", None, r"1.2.weight is missing, .* \[20, 8\] was expected"),
        ("1.1.linear.bias", None, r"1.1.linear.bias is missing"),
        ("0.7.weight", torch.zeros(V, C), r"0.7.weight is \[20, 8\], .* no such tensor was expected"),
        ("0.0.linear.weight", None, r"has no matrix 0.0.linear.weight, but \['0.0.linear.bias'"),
    ],
)
def test_tensors_that_are_not_heads_of_one_shape_are_refused(
    name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    random_heads().save(tmp_path, "base")
    tensors = load_file(tmp_path / WEIGHTS)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        MedusaHeads.load(tmp_path)


@pytest.mark.parametrize(
    ("layout", "token_map_M"), [("shared", None), ("own", TOKEN_MAP), ("lowrank", TOKEN_MAP)]
)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{}", "gives no vocab_size"),
        ('{"vocab_size": null}', "gives no vocab_size"),
        ("[]", "is a list, but an object was expected"),
        ("no JSON", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_a_vocabulary_that_no_tensor_shows_is_needed_in_the_config(
    layout: str, token_map_M: torch.Tensor | None, config: str, message: str, tmp_path: Path
) -> None:
    random_heads(layout=layout, token_map_M=token_map_M).save(tmp_path, "base")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        MedusaHeads.load(tmp_path)


def save_with(folder: Path, name: str, tensor: torch.Tensor, **shape: Any) -> None:
    """Random heads of which one tensor is another."""
    random_heads(**shape).save(folder, "base")
    (file,) = folder.glob("*.safetensors")
    save_file({**load_file(file), name: tensor}, file)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 3, 4, 7, 11, 12, 20], r"token id 20, outside 0 ... 19"),
        ([-1, 3, 4, 7, 11, 12, 19], r"token id -1, outside 0 ... 19"),
        ([0, 3, 3, 7, 11, 12, 19], r"3 after 3, but its ids must rise"),
        ([0, 3, 4, 12, 11, 7, 19], r"11 after 12, but its ids must rise"),
        ([0, 3, 4, 7, 11, 12], r"0.2.weight is \[7, 8\], .* \[6, 8\] was expected"),
        ([], r"token_map_M is torch.int64 \[0\], but a list"),
        ([[0, 3, 4, 7, 11, 12, 19]], r"token_map_M is torch.int64 \[1, 7\], but a list"),
        ([0.0, 3.0, 4.0, 7.0, 11.0, 12.0, 19.0], r"token_map_M is torch.float32 \[7\], but a list"),
    ],
)
def test_a_token_map_that_is_none_is_refused(ids: list, message: str, tmp_path: Path) -> None:
    """A place outside the vocabulary would crash the engine's embedding; a wrong one would only cost acceptance."""
    dtype = torch.float32 if ids and isinstance(ids[0], float) else torch.int64
    save_with(tmp_path, "token_map_M", torch.tensor(ids, dtype=dtype), token_map_M=TOKEN_MAP)
    with pytest.raises(ValueError, match=message):
        MedusaHeads.load(tmp_path)


def test_parts_of_a_low_rank_term_must_fit_each_other(tmp_path: Path) -> None:
    save_with(tmp_path, "1.2.down.weight", torch.zeros(R + 1, C), layout="lowrank")
    with pytest.raises(ValueError, match=r"1.2.down.weight is \[4, 8\], .* \[3, 8\] was expected"):
        MedusaHeads.load(tmp_path)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["0.1.linear.bias", "2.2.up.weight"])
def test_numbers_that_are_not_finite_are_refused(name: str, number: float, tmp_path: Path) -> None:
    """A head of NaN guesses the same tokens everywhere; nothing fails, and nothing is accepted."""
    random_heads(layout="lowrank").save(tmp_path, "base")
    tensors = load_file(tmp_path / EXTENDED_WEIGHTS)
    tensors[name].flatten()[-1] = number
    save_file(tensors, tmp_path / EXTENDED_WEIGHTS)
    with pytest.raises(ValueError, match=f"{name} goes from .*{abs(number)}.* finite"):
        MedusaHeads.load(tmp_path)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(C, C, dtype=torch.int32), torch.tensor(1.0), torch.zeros(0, C)]
)
def test_weights_are_matrices_of_floating_point_numbers(tensor: torch.Tensor, tmp_path: Path) -> None:
    save_with(tmp_path, "0.0.linear.weight", tensor)
    with pytest.raises(
        ValueError, match=r"0.0.linear.weight is torch.*, but floating-point numbers in 2 dim"
    ):
        MedusaHeads.load(tmp_path)


@pytest.mark.parametrize("length", [2**30, 2**63])
def test_a_header_longer_than_its_file_is_refused_unread(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors would be handed the whole file first."""
    random_heads().save(tmp_path, "base")
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(length.to_bytes(8, "little") + content[8:])
    monkeypatch.setattr("torch.frombuffer", lambda *_, **__: pytest.fail("the file was read"))
    with pytest.raises(
        ValueError, match=f"header has {length:,} bytes, but there can be {len(content) - 8:,} at"
    ):
        MedusaHeads.load(tmp_path)


def test_a_large_file_of_which_most_is_a_header_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(2**31)  # a hole: it takes no disk
    with pytest.raises(ValueError, match=f"header has {2**30:,} bytes, but there can be {MAX_HEADER:,} at"):
        MedusaHeads.load(tmp_path)


@pytest.mark.parametrize("length", [0, 5, 8, 100])
def test_a_stump_of_a_file_is_refused(length: int, tmp_path: Path) -> None:
    random_heads().save(tmp_path, "base")
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:length])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        MedusaHeads.load(tmp_path)


# ------------------------------------------------------------------------------------------------ in the engine


@pytest.fixture(scope="module")
def known(
    tiny_base: Path, prompts: list[list[int]], plain_replies: list[list[int]]
) -> tuple[torch.Tensor, ...]:
    """The base's output layer, states [N, C] where it said its replies, and the labels of three heads [N, H]."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    states, labels = [], []
    for prompt, reply in zip(prompts, plain_replies, strict=True):
        ids = torch.tensor(prompt + reply)
        position = torch.arange(len(prompt) - 1, len(ids) - 1)
        with torch.inference_mode():
            states.append(model.model(ids[None]).last_hidden_state[0, position])
        labels.append(labels_for(ids, torch.ones(len(ids), dtype=torch.bool), position, 3))
    return model.lm_head.weight.detach(), torch.cat(states).clone(), torch.cat(labels)


@every_layout
@pytest.mark.parametrize("draft_vocab_size", [None, 120])
def test_trained_heads_of_every_layout_give_the_base_s_replies_in_fewer_steps(
    layout: str, draft_vocab_size: int | None, known, tiny_base, prompts, plain_replies, tmp_path: Path
) -> None:
    """Heads that know these replies by heart. With a map applied twice, or not, only the speed would show it."""
    lm_head_VC, hidden_NC, labels_NH = known
    token_map_M = None
    if draft_vocab_size:
        token_map_M = (
            labels_NH[labels_NH >= 0].bincount(minlength=262).argsort(descending=True)[:120].sort().values
        )
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "vocab_size": 262, "layout": layout, "token_map_M": token_map_M}
    heads = MedusaHeads(3, 1, **shape)
    heads.init_from(lm_head_VC)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)
    mean_H = 1 / num_losses(heads, labels_NH)
    for _ in range(60):
        optimizer.zero_grad()
        medusa_loss(heads, hidden_NC, labels_NH, mean_H, whole_cross_entropy, with_hits=False).loss.backward()
        optimizer.step()
    heads.save(tmp_path, str(tiny_base))

    tree = [(0,), (1,), (0, 0), (0, 1), (0, 0, 0)]
    engine = Engine.load(str(tiny_base), str(tmp_path), tree, max_total_tokens=256, max_batch_size=5)
    assert (engine.heads.layout, engine.heads.draft_vocab_size) == (layout, draft_vocab_size or 262)
    done = engine.generate(prompts, max_new_tokens=40)
    assert [reply.token_ids for reply in done] == plain_replies
    assert sum(len(reply.token_ids) - 1 for reply in done) / sum(reply.num_steps for reply in done) > 1.3


def test_an_engine_refuses_heads_that_do_not_fit_its_base_or_its_tree(
    tiny_base: Path, tmp_path: Path
) -> None:
    def load(tree: list | str = "chain", **shape) -> Engine:
        MedusaHeads(2, **{"hidden_size": 32, "vocab_size": 262, **shape}).save(tmp_path, "base")
        return Engine.load(str(tiny_base), str(tmp_path), tree, max_total_tokens=256)

    with pytest.raises(ValueError, match="hidden size of 16, but the base has 32"):
        load(hidden_size=16)
    with pytest.raises(ValueError, match=r"is \[262, 32\], but the heads are made for a vocabulary of 300"):
        load(layout="lowrank", vocab_size=300)
    with pytest.raises(ValueError, match="vocabulary of 300, but the base has 262"):
        load(token_map_M=TOKEN_MAP, vocab_size=300)
    with pytest.raises(ValueError, match="rank 7, counted from 0, but the heads guess only 7 tokens"):
        load([(7,)], token_map_M=TOKEN_MAP)
    assert load([(6,)], token_map_M=TOKEN_MAP).generate([[1, 50, 60]], 5)[0].num_steps
