"""Medusa heads: what they compute, and what of them lies on disk."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from medusa_ray.medusa.heads import WEIGHTS, HeadStack, MedusaHeads, PackedHeadStack

C, V = 8, 20


def random_heads(num_heads: int = 3, num_layers: int = 2, layout: str = "own") -> MedusaHeads:
    """Heads whose every weight differs, as after training."""
    torch.manual_seed(0)
    heads = MedusaHeads(num_heads, num_layers, hidden_size=C, vocab_size=V, layout=layout)
    heads.init_from(torch.randn(V, C))
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    return heads


@pytest.mark.parametrize("layout", ["own", "shared"])
def test_fresh_heads_repeat_what_the_base_predicts(layout: str) -> None:
    """A random bias at the start would still train; the first steps would just be worse."""
    heads = MedusaHeads(2, 3, hidden_size=C, vocab_size=V, layout=layout)
    lm_head_VC, hidden_BC = torch.randn(V, C), torch.randn(5, C)
    heads.init_from(lm_head_VC)
    for head in range(2):
        assert torch.equal(heads(hidden_BC)[:, head], F.linear(hidden_BC, lm_head_VC))


def test_logits_are_residual_blocks_and_then_an_output_layer() -> None:
    heads, hidden_BC = random_heads(), torch.randn(4, C)
    for h, head in enumerate(heads):
        x = hidden_BC
        for layer in range(2):
            z = x @ head[layer].linear.weight.T + head[layer].linear.bias
            x = x + z * torch.sigmoid(z)
        torch.testing.assert_close(heads.residual(hidden_BC)[:, h], x)
        torch.testing.assert_close(heads(hidden_BC)[:, h], x @ head[2].weight.T)


@pytest.mark.parametrize("layout", ["own", "shared"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("num_states", [1, 5])
def test_stacked_heads_say_what_the_modules_say(layout: str, num_layers: int, num_states: int) -> None:
    """They have matrices of their own, stacked or packed for speed."""
    heads, hidden_BC = random_heads(3, num_layers, layout), torch.randn(num_states, C)
    expected_BHV = heads(hidden_BC)
    torch.testing.assert_close(HeadStack(heads).logits(hidden_BC), expected_BHV)
    assert torch.equal(HeadStack(heads).topk(hidden_BC, 4), expected_BHV.topk(4).indices)
    packed = heads.stack()
    assert isinstance(packed, PackedHeadStack)
    # bfloat16 has 8 bits: each factor is off by 0.2% on average, a wrong or missing term by as much as a logit.
    error = (packed.logits(hidden_BC) - expected_BHV).abs().mean() / expected_BHV.std()
    assert error < 0.02
    assert packed.topk(hidden_BC, 4).shape == (num_states, 3, 4)


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


@pytest.mark.parametrize("layout", ["own", "shared"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_what_was_saved_comes_back_bit_for_bit(layout: str, num_layers: int, tmp_path: Path) -> None:
    heads = random_heads(3, num_layers, layout)
    heads.stack()  # stacked weights must not get in the way
    heads.save(tmp_path, "base")
    again = MedusaHeads.load(str(tmp_path))
    shape = (again.num_heads, again.num_layers, again.layout, again.hidden_size, again.vocab_size)
    assert shape == (3, num_layers, layout, C, V)
    assert again.state_dict().keys() == heads.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in heads.state_dict().items())
    assert {p.dtype for p in MedusaHeads.load(tmp_path, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


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


def test_shared_heads_need_the_vocabulary_in_their_config(tmp_path: Path) -> None:
    random_heads(layout="shared").save(tmp_path, "base")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="gives no vocab_size"):
        MedusaHeads.load(tmp_path)
