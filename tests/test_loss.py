"""Labels and loss of the heads. A label off by one still trains; only acceptance drops."""

import pytest
import torch
import torch.nn.functional as F

from medusa_ray.medusa import loss as module
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.loss import (
    IGNORED,
    CrossEntropy,
    chunked_cross_entropy,
    cross_entropy_for,
    fused_cross_entropy,
    labels_for,
    medusa_loss,
    places_in,
    whole_cross_entropy,
)

H, C, V = 3, 8, 20

TOKEN_MAP = torch.tensor([0, 2, 3, 9, 10, 11, 14, 18])

has_fused = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")


def random_heads(
    dtype: torch.dtype = torch.float32, layout: str = "own", token_map_M: torch.Tensor | None = None
) -> MedusaHeads:
    shape = {"hidden_size": C, "vocab_size": V, "layout": layout, "rank": 4, "token_map_M": token_map_M}
    heads = MedusaHeads(H, 2, **shape, dtype=dtype)
    heads.init_from(torch.randn(V, C).to(dtype))
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    return heads


def random_batch(num_positions: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    labels_NH = torch.randint(0, V, (num_positions, H))
    labels_NH[torch.rand(num_positions, H) < 0.3] = IGNORED
    return torch.randn(num_positions, C), labels_NH


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_labels_of_a_drawn_sequence() -> None:
    """Prompt 10 11 12, reply 13 14 15. The base, at the place of 12, predicts 13; head 0 there guesses 14."""
    ids, mask = torch.tensor([10, 11, 12, 13, 14, 15]), torch.tensor([False] * 3 + [True] * 3)
    assert labels_for(ids, mask, torch.tensor([2, 3]), 2).tolist() == [[14, 15], [15, IGNORED]]
    assert labels_for(ids, mask, torch.tensor([0, 1, 4, 5]), 2).tolist() == [
        [IGNORED, 13],  # 12 belongs to the prompt
        [13, 14],
        [IGNORED, IGNORED],
        [IGNORED, IGNORED],
    ]


def test_labels_equal_a_slow_loop() -> None:
    ids, mask = torch.randint(0, V, (40,)), torch.rand(40) < 0.7
    position = torch.randperm(40)[:25]
    expected = [
        [int(ids[t + k + 2]) if t + k + 2 < 40 and mask[t + k + 2] else IGNORED for k in range(5)]
        for t in position.tolist()
    ]
    assert labels_for(ids, mask, position, 5).tolist() == expected


@pytest.mark.parametrize("layout", ["own", "shared", "lowrank"])
def test_the_loss_equals_a_slow_loop(layout: str) -> None:
    heads, (hidden_NC, labels_NH) = random_heads(layout=layout), random_batch()
    result = medusa_loss(heads, hidden_NC, labels_NH, 0.8, whole_cross_entropy)

    logits_NHV, expected = heads(hidden_NC), []
    for k in range(H):
        known = [n for n in range(30) if labels_NH[n, k] != IGNORED]
        expected.append(sum(-logits_NHV[n, k].log_softmax(0)[labels_NH[n, k]] for n in known) / len(known))
        hits = sum(bool(logits_NHV[n, k].argmax() == labels_NH[n, k]) for n in known)
        assert result.top1_H[k].item() == pytest.approx(hits / len(known))
    torch.testing.assert_close(result.head_loss_H, torch.stack(expected).detach())
    torch.testing.assert_close(result.loss, sum(0.8**k * expected[k] for k in range(H)))


@pytest.mark.parametrize("layout", ["own", "shared", "lowrank"])
def test_labels_that_heads_cannot_guess_have_no_loss_and_count_as_misses(layout: str) -> None:
    """A place taken for an id, or the other way round, still trains."""
    heads, (hidden_NC, labels_NH) = random_heads(layout=layout, token_map_M=TOKEN_MAP), random_batch()
    result = medusa_loss(heads, hidden_NC, labels_NH, 1.0, whole_cross_entropy)

    logits_NHM, ids = heads(hidden_NC), TOKEN_MAP.tolist()
    for k in range(H):
        known = [(n, label) for n, label in enumerate(labels_NH[:, k].tolist()) if label != IGNORED]
        inside = [(n, ids.index(label)) for n, label in known if label in ids]
        assert 0 < len(inside) < len(known)
        losses = [-logits_NHM[n, k].log_softmax(0)[place] for n, place in inside]
        torch.testing.assert_close(result.head_loss_H[k], sum(losses).detach() / len(inside))
        hits = sum(ids[logits_NHM[n, k].argmax()] == label for n, label in known)
        assert result.top1_H[k].item() == pytest.approx(hits / len(known))


def test_places_in_a_token_map_equal_a_slow_loop() -> None:
    labels_NH, ids = torch.randint(0, V, (40, H)), TOKEN_MAP.tolist()
    labels_NH[::3] = IGNORED
    expected = [[ids.index(x) if x in ids else IGNORED for x in row] for row in labels_NH.tolist()]
    assert places_in(TOKEN_MAP, labels_NH).tolist() == expected


@pytest.mark.parametrize("layout", ["own", "shared", "lowrank"])
@pytest.mark.parametrize("token_map_M", [None, TOKEN_MAP], ids=["whole", "mapped"])
def test_every_weight_of_every_head_learns(layout: str, token_map_M: torch.Tensor | None) -> None:
    """Trainers exist that leave the first head, the last one, or all residual blocks as they were."""
    heads, (hidden_NC, labels_NH) = random_heads(layout=layout, token_map_M=token_map_M), random_batch()
    medusa_loss(heads, hidden_NC, labels_NH, 1.0, whole_cross_entropy).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in heads.parameters())


def test_a_fresh_low_rank_term_learns() -> None:
    """Both its matrices at zero would hold each other there for ever."""
    heads, (hidden_NC, labels_NH) = (
        MedusaHeads(H, hidden_size=C, vocab_size=V, layout="lowrank"),
        random_batch(),
    )
    heads.init_from(torch.randn(V, C))
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    optimizer = torch.optim.Adam(heads.parameters())
    for _ in range(2):
        medusa_loss(heads, hidden_NC, labels_NH, 1.0, whole_cross_entropy).loss.backward()
        optimizer.step()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in heads.state_dict().items())


def test_a_head_without_labels_adds_nothing_and_no_nan() -> None:
    heads, (hidden_NC, labels_NH) = random_heads(), random_batch()
    labels_NH[:, 2] = IGNORED
    result = medusa_loss(heads, hidden_NC, labels_NH, 1.0, whole_cross_entropy)
    assert result.head_loss_H[2] == 0
    assert result.top1_H[2] == 0
    torch.testing.assert_close(result.loss, result.head_loss_H[:2].sum())
    result.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in heads.parameters())


def test_positions_that_are_ignored_change_nothing() -> None:
    heads, (hidden_NC, labels_NH) = random_heads(), random_batch()
    padded_NC = torch.cat([hidden_NC, torch.full((4, C), 9.0)])
    padded_NH = torch.cat([labels_NH, torch.full((4, H), IGNORED)])
    short = medusa_loss(heads, hidden_NC, labels_NH, 0.8, whole_cross_entropy)
    long = medusa_loss(heads, padded_NC, padded_NH, 0.8, whole_cross_entropy)
    torch.testing.assert_close(long.loss, short.loss)
    torch.testing.assert_close(long.top1_H, short.top1_H)


def test_top1_is_the_same_when_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, (hidden_NC, labels_NH) = random_heads(), random_batch()
    labels_NH[:10] = heads(hidden_NC[:10]).argmax(-1)  # so that there are hits
    whole = medusa_loss(heads, hidden_NC, labels_NH, 1.0, whole_cross_entropy).top1_H
    monkeypatch.setattr(module, "MAX_LOGITS", 7 * V)
    assert torch.equal(medusa_loss(heads, hidden_NC, labels_NH, 1.0, whole_cross_entropy).top1_H, whole)
    assert whole.min() > 0.3
    assert medusa_loss(heads, hidden_NC, labels_NH, 1.0, whole_cross_entropy, with_top1=False).top1_H is None


@pytest.mark.parametrize(
    ("layout", "cross_entropy"),
    [
        pytest.param("own", fused_cross_entropy, marks=has_fused),
        pytest.param("shared", fused_cross_entropy, marks=has_fused),
        ("own", chunked_cross_entropy),
        ("lowrank", chunked_cross_entropy),
    ],
)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_loss_in_pieces_equals_the_whole_one(
    layout: str, cross_entropy: CrossEntropy, dtype: torch.dtype, rtol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rtol: rounding of sums in another order. In bf16 the gradients themselves have eight bits."""
    monkeypatch.setattr(module, "MAX_LOGITS", 7 * len(TOKEN_MAP))
    results = []
    for function in (whole_cross_entropy, cross_entropy):
        torch.manual_seed(1)
        heads, (hidden_NC, labels_NH) = random_heads(dtype, layout, TOKEN_MAP), random_batch(300)
        loss = medusa_loss(heads, hidden_NC.to(dtype), labels_NH, 0.8, function).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.float().norm() for parameter in heads.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("layout", ["own", "shared", "lowrank"])
def test_only_large_vocabularies_are_taken_in_pieces(layout: str) -> None:
    """Pieces save memory and cost time: 8,192 tokens at once are still small, 128,256 are not."""

    def chosen(vocab_size: int, token_map_M: torch.Tensor | None = None) -> CrossEntropy:
        shape = {"hidden_size": 4, "vocab_size": vocab_size, "layout": layout, "token_map_M": token_map_M}
        return cross_entropy_for(MedusaHeads(**shape), 512)

    fuses = layout != "lowrank" and hasattr(F, "linear_cross_entropy")
    assert chosen(1024) is whole_cross_entropy
    assert chosen(8192) is whole_cross_entropy
    assert chosen(128_256) is (fused_cross_entropy if fuses else chunked_cross_entropy)
    assert chosen(128_256, torch.arange(0, 128_256, 16)) is whole_cross_entropy
