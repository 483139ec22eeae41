"""Labels and loss of the heads. A label off by one still trains; only acceptance drops."""

import pytest
import torch
import torch.nn.functional as F

from medusa_ray.medusa import loss as module
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.loss import (
    IGNORED,
    chunked_cross_entropy,
    cross_entropy_for,
    labels_for,
    medusa_loss,
    whole_cross_entropy,
)

H, C, V = 3, 8, 20

needs_chunks = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")


def random_heads(dtype: torch.dtype = torch.float32) -> MedusaHeads:
    heads = MedusaHeads(H, 2, hidden_size=C, vocab_size=V, dtype=dtype)
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


def test_the_loss_equals_a_slow_loop() -> None:
    heads, (hidden_NC, labels_NH) = random_heads(), random_batch()
    result = medusa_loss(heads, hidden_NC, labels_NH, 0.8, whole_cross_entropy)

    logits_NHV, expected = heads(hidden_NC), []
    for k in range(H):
        known = [n for n in range(30) if labels_NH[n, k] != IGNORED]
        expected.append(sum(-logits_NHV[n, k].log_softmax(0)[labels_NH[n, k]] for n in known) / len(known))
        hits = sum(bool(logits_NHV[n, k].argmax() == labels_NH[n, k]) for n in known)
        assert result.top1_H[k].item() == pytest.approx(hits / len(known))
    torch.testing.assert_close(result.head_loss_H, torch.stack(expected).detach())
    torch.testing.assert_close(result.loss, sum(0.8**k * expected[k] for k in range(H)))


def test_every_weight_of_every_head_learns() -> None:
    """Trainers exist that leave the first head, the last one, or all residual blocks as they were."""
    heads, (hidden_NC, labels_NH) = random_heads(), random_batch()
    medusa_loss(heads, hidden_NC, labels_NH, 1.0, whole_cross_entropy).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in heads.parameters())


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


@needs_chunks
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_chunked_loss_equals_the_whole_one(dtype: torch.dtype, rtol: float) -> None:
    """rtol: rounding of sums in another order. In bf16 the gradients themselves have eight bits."""
    results = []
    for cross_entropy in (whole_cross_entropy, chunked_cross_entropy):
        torch.manual_seed(1)
        heads, (hidden_NC, labels_NH) = random_heads(dtype), random_batch(300)
        loss = medusa_loss(heads, hidden_NC.to(dtype), labels_NH, 0.8, cross_entropy).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.float().norm() for parameter in heads.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=rtol, atol=1e-6)


@needs_chunks
def test_only_large_vocabularies_are_chunked() -> None:
    """Chunks save memory and cost time: 8,192 tokens at once are still small, 128,256 are not."""
    assert cross_entropy_for(512, 1024) is whole_cross_entropy
    assert cross_entropy_for(512, 8192) is whole_cross_entropy
    assert cross_entropy_for(512, 128_256) is chunked_cross_entropy
