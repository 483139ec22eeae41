"""Hidden states and the tokens that came after them -> the loss of the heads, and how often they were right.

Head k at position t is asked for token t + 2 + k. Its loss is the cross entropy to that token (hard labels), or the
divergence from what the base said about it (soft labels: a Teacher). Losses and hits are sums: labels do not fall
evenly on micro-batches and ranks, so that only who sees a whole step can take its mean. Logits are compared in fp32
whatever the heads' dtype.

# N positions   H heads   C hidden   M draft vocabulary (see heads.py)
# T tokens   L labels   K tokens that the teacher names for a label, none with hard labels
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medusa_ray.medusa.heads import MedusaHeads

IGNORED = -100  # torch's own label for "no loss here"
MAX_LOGITS = 2**24  # logits that may be held at once, 64 MiB in fp32


class Teacher(NamedTuple):
    """The base's K likeliest tokens for each label, each once; any row will do where the label is IGNORED."""

    ids_NHK: Tensor  # by the base's ids
    logprobs_NHK: Tensor  # fp32; what they leave of 1 belongs to all other tokens together


class HeadLoss(NamedTuple):
    loss: Tensor  # scalar, the one to minimise
    loss_sum_H: Tensor  # of each head, over the labels that `num_losses` counts; without gradient
    num_labels_H: Tensor
    # How many labels are the likeliest token of their head, and among its five likeliest. Labels that are not in the
    # draft vocabulary have no loss, but the head misses them all the same.
    top1_H: Tensor | None
    top5_H: Tensor | None


class Asked(NamedTuple):
    """What one head is asked, by places in its vocabulary; IGNORED where that has none, or nothing is asked."""

    place_N: Tensor
    teacher_NK: Tensor
    logprobs_NK: Tensor


CrossEntropy = Callable[
    [MedusaHeads, int, Tensor, Asked], Tensor
]  # heads, head, states_NC -> sum of its losses


def labels_for(input_ids: Tensor, label_mask: Tensor, position: Tensor, num_heads: int) -> Tensor:
    """Labels [N, H] of the heads at `position` [N] of one sequence: its own tokens, or IGNORED.

    Head k at position t has the label input_ids[t + 2 + k], unless the sequence is over by then or label_mask
    is False there. For input_ids 10 11 12 13 14, a mask that begins at 13, and two heads:

        position 0: head 0 asks for 12, masked    head 1 asks for 13
        position 1: head 0 asks for 13            head 1 asks for 14
        position 2: head 0 asks for 14            head 1 asks past the end

    Several sequences can be one, with num_heads + 1 masked tokens between each two: no head asks further.
    """
    labels = F.pad(torch.where(label_mask, input_ids, IGNORED).long(), (0, num_heads + 1), value=IGNORED)
    return labels[_asked(position, num_heads)]


def teacher_for(
    ids_LK: Tensor, logprobs_LK: Tensor, label_mask: Tensor, position: Tensor, num_heads: int
) -> Teacher:
    """What the base said about each label of `labels_for`, given what it said about each True of label_mask [T].

    Raises ValueError when there is not one row for each of them.
    """
    num_labels = int(label_mask.sum())
    if len(ids_LK) != num_labels or ids_LK.shape != logprobs_LK.shape:
        raise ValueError(
            f"the teacher has ids {list(ids_LK.shape)} and logprobs {list(logprobs_LK.shape)}, but label_mask has "
            f"{num_labels} labels, and one row of each was expected for a label. Write the rows again."
        )
    # Nothing is asked of masked tokens, nor past the end: the last row stands in for them.
    row = torch.where(label_mask, label_mask.cumsum(0) - 1, num_labels)
    row_NH = F.pad(row, (0, num_heads + 1), value=num_labels)[_asked(position, num_heads)]
    ids, logprobs = F.pad(ids_LK, (0, 0, 0, 1)), F.pad(logprobs_LK, (0, 0, 0, 1), value=-torch.inf)
    return Teacher(ids[row_NH], logprobs[row_NH])


def _asked(position: Tensor, num_heads: int) -> Tensor:
    """The places [N, H] of the tokens that heads at `position` are asked for; num_heads + 1 past the end at most."""
    return position.unsqueeze(1) + torch.arange(2, num_heads + 2, device=position.device)


def places_in(token_map_M: Tensor | None, ids: Tensor) -> Tensor:
    """Places of tokens in a token map; IGNORED where it lacks a token, or there was none."""
    if token_map_M is None:
        return ids
    place = torch.searchsorted(token_map_M, ids.contiguous()).clamp(max=len(token_map_M) - 1)
    return torch.where(token_map_M[place] == ids, place, IGNORED)


def num_losses(heads: MedusaHeads, labels_NH: Tensor) -> Tensor:
    """How many labels of each head [H] have a loss: those in the draft vocabulary. What a mean divides by."""
    return (places_in(heads.token_map_M, labels_NH) != IGNORED).sum(dim=0)


def medusa_loss(
    heads: MedusaHeads,
    hidden_NC: Tensor,
    labels_NH: Tensor,
    weight_H: Tensor,
    cross_entropy: CrossEntropy,
    teacher: Teacher | None = None,
    with_hits: bool = True,
) -> HeadLoss:
    """Sum over heads of weight_H[k] times head k's summed loss (arXiv 2401.10774, equation 1, has their means).

    labels_NH: by the base's ids. weight_H: fp32; 0.8 ** k / num_losses of the whole step gives the paper's loss, and
    must be finite for a head without labels too, which then adds 0. cross_entropy: from `cross_entropy_for`, chosen
    once per run.
    """
    place_NH = places_in(heads.token_map_M, labels_NH)
    if teacher is None:
        no_ids_NHK = place_NH.new_empty(*place_NH.shape, 0)
        teacher = Teacher(no_ids_NHK, no_ids_NHK.float())
    teacher_NHK = places_in(heads.token_map_M, teacher.ids_NHK.long())
    losses, hits = [], []
    for head in range(heads.num_heads):
        states_NC = heads.residual_of(head, hidden_NC)
        asked = Asked(place_NH[:, head], teacher_NHK[:, head], teacher.logprobs_NHK[:, head])
        losses.append(cross_entropy(heads, head, states_NC, asked))
        if with_hits:
            hits.append(num_hits(heads, head, states_NC, asked))
    loss_sum_H = torch.stack(losses)
    top1_H, top5_H = torch.stack(hits, dim=1) if with_hits else (None, None)
    num_labels_H = (labels_NH != IGNORED).sum(dim=0)
    return HeadLoss(loss_sum_H @ weight_H, loss_sum_H.detach(), num_labels_H, top1_H, top5_H)


def cross_entropy_for(heads: MedusaHeads, num_positions: int) -> CrossEntropy:
    """The fastest of three equal functions: whole logits while they are small, never whole where they are large.

    Logits of 512 positions take 2 MiB for a vocabulary of 1,024, and 250 MiB several times over for 128,256.
    """
    if num_positions * heads.draft_vocab_size <= MAX_LOGITS:
        return whole_cross_entropy
    # torch's own function takes one matrix, and has been there since 2.13.
    can_fuse = heads.layout != "lowrank" and hasattr(F, "linear_cross_entropy")
    return fused_cross_entropy if can_fuse else chunked_cross_entropy


def whole_cross_entropy(heads: MedusaHeads, head: int, states_NC: Tensor, asked: Asked) -> Tensor:
    """Summed loss of a head by way of all logits [N, M]."""
    logits_NM = heads.logits_of(head, states_NC).float()
    if asked.teacher_NK.shape[1]:
        return divergence(logits_NM, asked)
    return F.cross_entropy(logits_NM, asked.place_N, ignore_index=IGNORED, reduction="sum")


def fused_cross_entropy(heads: MedusaHeads, head: int, states_NC: Tensor, asked: Asked) -> Tensor:
    """Summed loss that holds the logits of a few positions at a time. For "own" and "shared", torch 2.13."""
    if asked.teacher_NK.shape[1]:  # torch's own knows hard labels only
        return chunked_cross_entropy(heads, head, states_NC, asked)
    # torch's own choice is 8 positions at a time for a hidden size of 256, which takes more than twice as long.
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=_chunk_size(heads))
    # Unreduced, as torch would add up bf16 losses in bf16: 0.7% off over 512 positions.
    losses_N = F.linear_cross_entropy(
        states_NC,
        heads.output_weight(head),
        asked.place_N,
        reduction="none",
        ignore_index=IGNORED,
        options=options,
    )
    return losses_N.float().sum()


def chunked_cross_entropy(heads: MedusaHeads, head: int, states_NC: Tensor, asked: Asked) -> Tensor:
    """The same of any layout and any labels: the backward pass computes the logits of each chunk a second time."""
    losses = [
        checkpoint(
            whole_cross_entropy, heads, head, chunk_NC, chunk, use_reentrant=False, preserve_rng_state=False
        )
        for chunk_NC, chunk in _chunks(heads, states_NC, asked)
    ]
    return torch.stack(losses).sum()


def divergence(logits_NM: Tensor, asked: Asked) -> Tensor:
    """Summed KL(base || head) over K + 1 buckets: a token that the teacher names each, and all the rest in one.

    The rest has the logit logsumexp of its tokens, so that nothing is ever 1 minus a sum that may round to 1: loss
    and gradient stay finite however sure the head is.
    """
    is_known_NK = asked.teacher_NK != IGNORED
    # Not -inf, of which an empty bucket would make NaN.
    lowest = torch.finfo(logits_NM.dtype).min
    num_tokens = logits_NM.shape[1]
    is_named = torch.zeros(len(logits_NM), num_tokens + 1, dtype=torch.bool, device=logits_NM.device)
    is_named.scatter_(1, asked.teacher_NK.where(is_known_NK, num_tokens), True)
    rest_N1 = logits_NM.masked_fill(is_named[:, :num_tokens], lowest).logsumexp(dim=1, keepdim=True)
    named_NK = logits_NM.gather(1, asked.teacher_NK.clamp(min=0)).masked_fill(~is_known_NK, lowest)
    log_q = torch.cat([named_NK, rest_N1], dim=1).log_softmax(dim=1)
    losses_N = F.kl_div(log_q, base_shares(asked, num_tokens), reduction="none").sum(dim=1)
    return losses_N.where(asked.place_N != IGNORED, 0).sum()


def base_shares(asked: Asked, num_tokens: int) -> Tensor:
    """The base's probabilities [N, K + 1] of the buckets.

    Tokens that the draft vocabulary lacks are left out, and the others scaled up to 1. In the rest's bucket they would
    teach heads to guess, instead of a token out of reach, just anything; and hard labels out of reach have no loss
    either, so that the two kinds of labels have the same optimum.
    """
    is_known_NK = asked.teacher_NK != IGNORED
    p_NK = asked.logprobs_NK.float().exp()
    rest_N1 = (1 - p_NK.sum(dim=1, keepdim=True)).clamp(min=torch.finfo(torch.float32).tiny)
    # A teacher that names the whole vocabulary leaves no token for the rest.
    rest_N1 = rest_N1.where(is_known_NK.sum(dim=1, keepdim=True) < num_tokens, 0)
    shares = torch.cat([p_NK.where(is_known_NK, 0), rest_N1], dim=1)
    return shares / shares.sum(dim=1, keepdim=True)


@torch.no_grad()
def num_hits(heads: MedusaHeads, head: int, states_NC: Tensor, asked: Asked) -> Tensor:
    """How many labels are the likeliest token of their state, and among its five likeliest [2]."""
    hits = []
    for chunk_NC, chunk in _chunks(heads, states_NC, asked):
        guesses = heads.logits_of(head, chunk_NC).topk(min(5, heads.draft_vocab_size)).indices
        is_hit = guesses == chunk.place_N.unsqueeze(1)
        hits.append(torch.stack([is_hit[:, 0].sum(), is_hit.sum()]))
    return torch.stack(hits).sum(dim=0)


def _chunk_size(heads: MedusaHeads) -> int:
    return max(1, MAX_LOGITS // heads.draft_vocab_size)


def _chunks(heads: MedusaHeads, states_NC: Tensor, asked: Asked) -> Iterator[tuple[Tensor, Asked]]:
    size = _chunk_size(heads)
    parts = zip(*(tensor.split(size) for tensor in asked), strict=True)
    return zip(states_NC.split(size), (Asked(*part) for part in parts), strict=True)
