"""Hidden states and the tokens that came after them -> the loss of the heads, its share per head, and top-1.

Head k at position t is asked for token t + 2 + k. Logits are compared in fp32 whatever the heads' dtype.

# N positions   H heads   C hidden   M draft vocabulary (see heads.py)
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
CrossEntropy = Callable[
    [MedusaHeads, int, Tensor, Tensor], Tensor
]  # heads, head, states_NC, labels_N -> their sum


class HeadLoss(NamedTuple):
    loss: Tensor  # scalar, the one to minimise
    head_loss_H: Tensor  # mean over each head's labels, 0 where there is none; without gradient
    # Share of each head's labels that its likeliest token hits, 0 where there is none. Labels that are not in the draft
    # vocabulary have no loss, but the head misses them all the same.
    top1_H: Tensor | None


def labels_for(input_ids: Tensor, label_mask: Tensor, position: Tensor, num_heads: int) -> Tensor:
    """Labels [N, H] of the heads at `position` [N] of one sequence: its own tokens, or IGNORED.

    Head k at position t has the label input_ids[t + 2 + k], unless the sequence is over by then or label_mask
    is False there. For input_ids 10 11 12 13 14, a mask that begins at 13, and two heads:

        position 0: head 0 asks for 12, masked    head 1 asks for 13
        position 1: head 0 asks for 13            head 1 asks for 14
        position 2: head 0 asks for 14            head 1 asks past the end
    """
    asked_NH = position.unsqueeze(1) + torch.arange(2, num_heads + 2)
    # Places past the end read the padding, which is IGNORED.
    labels = F.pad(torch.where(label_mask, input_ids, IGNORED).long(), (0, num_heads + 1), value=IGNORED)
    return labels[asked_NH]


def places_in(token_map_M: Tensor, labels_NH: Tensor) -> Tensor:
    """Places of the labels in a token map; IGNORED where it lacks a label, or there was none."""
    place_NH = torch.searchsorted(token_map_M, labels_NH).clamp(max=len(token_map_M) - 1)
    return torch.where(token_map_M[place_NH] == labels_NH, place_NH, IGNORED)


def medusa_loss(
    heads: MedusaHeads,
    hidden_NC: Tensor,
    labels_NH: Tensor,
    head_weight: float,
    cross_entropy: CrossEntropy,
    with_top1: bool = True,
) -> HeadLoss:
    """Sum over heads of head_weight ** k times head k's mean cross entropy (arXiv 2401.10774, equation 1).

    labels_NH: by the base's ids. Those that the heads' token map lacks are left out of the mean. cross_entropy: from
    `cross_entropy_for`, chosen once per run. A head without a label here adds 0, not NaN.
    """
    place_NH = labels_NH if heads.token_map_M is None else places_in(heads.token_map_M, labels_NH)
    num_labels_H = (labels_NH != IGNORED).sum(dim=0).clamp(min=1)
    num_places_H = (place_NH != IGNORED).sum(dim=0).clamp(min=1)
    losses, top1 = [], []
    for head in range(heads.num_heads):
        states_NC, place_N = heads.residual_of(head, hidden_NC), place_NH[:, head]
        losses.append(cross_entropy(heads, head, states_NC, place_N) / num_places_H[head])
        if with_top1:
            top1.append(num_hits(heads, head, states_NC, place_N) / num_labels_H[head])
    head_loss_H = torch.stack(losses)
    weight_H = head_weight ** torch.arange(heads.num_heads, device=head_loss_H.device)
    return HeadLoss(head_loss_H @ weight_H, head_loss_H.detach(), torch.stack(top1) if with_top1 else None)


def cross_entropy_for(heads: MedusaHeads, num_positions: int) -> CrossEntropy:
    """The fastest of three equal functions: whole logits while they are small, never whole where they are large.

    Logits of 512 positions take 2 MiB for a vocabulary of 1,024, and 250 MiB several times over for 128,256.
    """
    if num_positions * heads.draft_vocab_size <= MAX_LOGITS:
        return whole_cross_entropy
    # torch's own function takes one matrix, and has been there since 2.13.
    can_fuse = heads.layout != "lowrank" and hasattr(F, "linear_cross_entropy")
    return fused_cross_entropy if can_fuse else chunked_cross_entropy


def whole_cross_entropy(heads: MedusaHeads, head: int, states_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Summed cross entropy by way of all logits [N, M]."""
    logits_NM = heads.logits_of(head, states_NC).float()
    return F.cross_entropy(logits_NM, labels_N, ignore_index=IGNORED, reduction="sum")


def fused_cross_entropy(heads: MedusaHeads, head: int, states_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Summed cross entropy that holds the logits of a few positions at a time. For "own" and "shared", torch 2.13."""
    options = torch.nn.LinearCrossEntropyOptions()
    # Unreduced, as torch would add up bf16 losses in bf16: 0.7% off over 512 positions.
    losses_N = F.linear_cross_entropy(
        states_NC,
        heads.output_weight(head),
        labels_N,
        reduction="none",
        ignore_index=IGNORED,
        options=options,
    )
    return losses_N.float().sum()


def chunked_cross_entropy(heads: MedusaHeads, head: int, states_NC: Tensor, labels_N: Tensor) -> Tensor:
    """The same of any layout: the backward pass computes the logits of each chunk a second time."""
    losses = [
        checkpoint(whole_cross_entropy, heads, head, chunk_NC, chunk_N, use_reentrant=False)
        for chunk_NC, chunk_N in _chunks(heads, states_NC, labels_N)
    ]
    return torch.stack(losses).sum()


@torch.no_grad()
def num_hits(heads: MedusaHeads, head: int, states_NC: Tensor, labels_N: Tensor) -> Tensor:
    """How many labels are the likeliest token of their state."""
    hits = [
        (heads.logits_of(head, chunk_NC).argmax(dim=-1) == chunk_N).sum()
        for chunk_NC, chunk_N in _chunks(heads, states_NC, labels_N)
    ]
    return torch.stack(hits).sum()


def _chunks(heads: MedusaHeads, states_NC: Tensor, labels_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, MAX_LOGITS // heads.draft_vocab_size)
    return zip(states_NC.split(size), labels_N.split(size), strict=True)
