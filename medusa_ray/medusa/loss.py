"""Hidden states and the tokens that came after them -> the loss of the heads, its share per head, and top-1.

Head k at position t is asked for token t + 2 + k. Logits are compared in fp32 whatever the heads' dtype.

# N positions   H heads   C hidden   V vocabulary
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa_ray.medusa.heads import MedusaHeads

IGNORED = -100  # torch's own label for "no loss here"
MAX_LOGITS = 2**24  # logits that may be held at once, 64 MiB in fp32
CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]  # states_NC, output_VC, labels_N -> their sum


class HeadLoss(NamedTuple):
    loss: Tensor  # scalar, the one to minimise
    head_loss_H: Tensor  # mean over each head's labels, 0 where there is none; without gradient
    top1_H: Tensor | None  # share of each head's labels that its likeliest token hits, 0 where there is none


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


def medusa_loss(
    heads: MedusaHeads,
    hidden_NC: Tensor,
    labels_NH: Tensor,
    head_weight: float,
    cross_entropy: CrossEntropy,
    with_top1: bool = True,
) -> HeadLoss:
    """Sum over heads of head_weight ** k times head k's mean cross entropy (arXiv 2401.10774, equation 1).

    cross_entropy: from `cross_entropy_for`, chosen once per run. A head without a label here adds 0, not NaN.
    """
    losses, top1 = [], []
    for head in range(heads.num_heads):
        states_NC, output_VC = heads.residual_of(head, hidden_NC), heads.output_weight(head)
        labels_N = labels_NH[:, head]
        num_labels = (labels_N != IGNORED).sum().clamp(min=1)
        losses.append(cross_entropy(states_NC, output_VC, labels_N) / num_labels)
        if with_top1:
            top1.append(num_hits(states_NC, output_VC, labels_N) / num_labels)
    head_loss_H = torch.stack(losses)
    weight_H = head_weight ** torch.arange(heads.num_heads, device=head_loss_H.device)
    return HeadLoss(head_loss_H @ weight_H, head_loss_H.detach(), torch.stack(top1) if with_top1 else None)


def cross_entropy_for(num_positions: int, vocab_size: int) -> CrossEntropy:
    """The faster of two equal functions: whole logits while they are small, never whole where they are large.

    Logits of 512 positions take 2 MiB for a vocabulary of 1,024, and 250 MiB several times over for 128,256.
    """
    large = num_positions * vocab_size > MAX_LOGITS
    return chunked_cross_entropy if large and hasattr(F, "linear_cross_entropy") else whole_cross_entropy


def whole_cross_entropy(states_NC: Tensor, output_VC: Tensor, labels_N: Tensor) -> Tensor:
    """Summed cross entropy by way of all logits [N, V]."""
    logits_NV = F.linear(states_NC, output_VC).float()
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="sum")


def chunked_cross_entropy(states_NC: Tensor, output_VC: Tensor, labels_N: Tensor) -> Tensor:
    """Summed cross entropy that holds the logits of a few positions at a time. Needs torch 2.13."""
    options = torch.nn.LinearCrossEntropyOptions()
    # Unreduced, as torch would add up bf16 losses in bf16: 0.7% off over 512 positions.
    losses_N = F.linear_cross_entropy(
        states_NC, output_VC, labels_N, reduction="none", ignore_index=IGNORED, options=options
    )
    return losses_N.float().sum()


@torch.no_grad()
def num_hits(states_NC: Tensor, output_VC: Tensor, labels_N: Tensor) -> Tensor:
    """How many labels are the likeliest token of their state."""
    size = max(1, MAX_LOGITS // len(output_VC))
    best = [F.linear(chunk_NC, output_VC).argmax(dim=-1) for chunk_NC in states_NC.split(size)]
    return (torch.cat(best) == labels_N).sum()
