"""What the base says at every node -> the tokens that a step commits, and their log-probabilities.

The rule is one for greedy decoding and for sampling: the base names its token at each node; where a child carries
that token the walk goes on, where none does the token itself is committed as the last one. Guesses are fixed before
the base speaks, so the committed tokens are exactly the base's own: equal to the plain greedy ones, and to the
plain sampled ones when the noise at a position is the same (sampling.py).

A sampled request may ask for typical acceptance instead (Medusa, arXiv 2401.10774, 2.3.1): a guess is taken when the
base finds it likely enough, whether or not it would have drawn it. That commits more tokens a step and CHANGES THE
DISTRIBUTION of the replies: they depend on heads, tree and batch, and no seed brings back what the baseline says.

# B requests   N tree nodes   D depth + 1   K alternatives   V vocab
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_ray.medusa.processors import History, process
from medusa_ray.medusa.sampling import Sampling, Typical, choose
from medusa_ray.medusa.tree import Shape, Tree


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one committed token, and the likeliest tokens in its place with theirs, likeliest first.

    Under the base's own distribution: before bias, penalties, masks, temperature and filters, as vLLM has it. A token
    that those ruled in or out has the log-probability that the base gave it, and need not be among the likeliest.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Verdict:
    """What a step decided, on the device."""

    node_B: Tensor  # the end of each walk
    committed_BD: Tensor  # the first depth_N[node_B] + 1 of a row count; -1 where no token may follow
    logprob_BD: Tensor | None = None
    top_id_BDK: Tensor | None = None
    top_logprob_BDK: Tensor | None = None

    def pack(self) -> Tensor:
        """All of it as one tensor, a row each, so that it takes one copy to the host; `unpack` reads a row."""
        parts = [self.node_B[:, None], self.committed_BD]
        for more in (self.logprob_BD, self.top_id_BDK, self.top_logprob_BDK):
            if more is not None:
                parts.append(more.flatten(1).double())  # holds token ids and float32 values exactly
        return torch.cat(parts, 1)


def unpack(row: list[float], num_walked: int) -> tuple[int, list[int], list[Logprob] | None]:
    """A row of `pack` -> its node, the num_walked tokens of the widest walk, and their log-probabilities, if any."""
    node, committed, rest = int(row[0]), [int(t) for t in row[1 : num_walked + 1]], row[num_walked + 1 :]
    if not rest:
        return node, committed, None
    num_top = (len(rest) // num_walked - 1) // 2
    ids, values = rest[num_walked : num_walked * (1 + num_top)], rest[num_walked * (1 + num_top) :]
    logprobs = []
    for i, token in enumerate(committed):
        span = slice(i * num_top, (i + 1) * num_top)
        top = [(int(t), value) for t, value in zip(ids[span], values[span], strict=True)]
        logprobs.append(Logprob(token, rest[i], top))
    return node, committed, logprobs


def decide(
    logits_BNV: Tensor,
    token_BN: Tensor,
    position_BN: Tensor,
    tree: Tree,
    sampling: Sampling,
    history: History | None = None,
    allowed_BNV: Tensor | None = None,
) -> Verdict:
    """What the base's logits after each node commit. No sync with the host.

    token_BN: token at each node, the root's first. position_BN: the position of the token after each node. history and
    allowed_BNV as `process` needs them.
    """
    scores_BNV = process(logits_BNV, token_BN, tree, sampling, history, allowed_BNV)
    target_BN = choose(scores_BNV, position_BN, sampling)
    if sampling.typical is None:
        node_B, committed_BD = walk(token_BN, target_BN, tree.shape, sampling.speculates_B)
    else:
        node_B, committed_BD = walk_typical(
            token_BN, target_BN, scores_BNV, tree, sampling.typical, sampling.speculates_B
        )
    if sampling.num_logprobs is None:
        return Verdict(node_B, committed_BD)
    row_B1 = torch.arange(len(node_B), device=node_B.device)[:, None]
    logprob_BDV = logits_BNV[row_B1, tree.walk_ND[node_B]].float().log_softmax(-1)
    logprob_BD = logprob_BDV.gather(-1, committed_BD.clamp_min(0)[..., None])[..., 0]
    top = logprob_BDV.topk(min(sampling.num_logprobs, logprob_BDV.shape[-1]))
    return Verdict(node_B, committed_BD, logprob_BD, top.indices, top.values)


def walk(
    token_BN: Tensor, target_BN: Tensor, tree: Shape, speculates_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The deepest node that the base agrees with, and the tokens committed on the way there.

    token_BN: token at each node, the root's first. target_BN: the base's own token after each node. speculates_B: rows
    that go beyond the root; None for all.
    Returns node_B and committed_BD: the tokens of the walk without the root, then the base's token after node_B;
    only the first depth_N[node_B] + 1 entries of a row count.
    """
    # Siblings differ in their tokens, so at most one node of each depth is reached: the deepest ends the walk.
    node_B = _reached_depth(token_BN == target_BN[:, tree.parent_N], tree, speculates_B).argmax(-1)
    return node_B, target_BN.gather(1, tree.walk_ND[node_B])


def walk_typical(
    token_BN: Tensor,
    target_BN: Tensor,
    scores_BNV: Tensor,
    tree: Tree,
    typical: Typical,
    speculates_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `walk`, but rows that ask for it take every guess that is typical of the base; the others walk as ever.

    A guess x after a node where the base has the distribution p is typical when p(x) > min(epsilon, alpha e^-H(p)), H
    being the entropy: the flatter p is, the less it takes. p is what the request samples from, so what its filters and
    masks forbid is never taken. Of the deepest nodes reached the likeliest ends the walk, and the token after it is
    sampled as ever (the authors' code takes the best one instead).
    """
    log_chance_BNV = scores_BNV.log_softmax(-1)
    entropy_BN = torch.special.entr(log_chance_BNV.exp()).sum(-1)
    least_BN = torch.minimum(typical.threshold_B[:, None], typical.alpha_B[:, None] * (-entropy_BN).exp())
    at_parent_BN = tree.parent_N * log_chance_BNV.shape[-1] + token_BN
    log_chance_BN = log_chance_BNV.flatten(1).gather(1, at_parent_BN)
    agrees_BN = torch.where(
        typical.is_asked_B[:, None],
        log_chance_BN.exp() > least_BN[:, tree.parent_N],
        token_BN == target_BN[:, tree.parent_N],
    )
    depth_BN = _reached_depth(agrees_BN, tree.shape, speculates_B)
    # Chances off the reached nodes may be 0, and their logarithms would spoil the sums.
    counted_BN = log_chance_BN.masked_fill(~agrees_BN, 0)
    counted_BN[:, 0] = 0
    log_chance_of_walk_BN = counted_BN @ tree.mask_NN.to(counted_BN.dtype).T
    is_deepest_BN = depth_BN == depth_BN.amax(-1, keepdim=True)
    node_B = log_chance_of_walk_BN.masked_fill(~is_deepest_BN, -torch.inf).argmax(-1)
    walk_BD = tree.walk_ND[node_B]
    # Column j holds the walk's node j + 1 while there is one, then the base's token after the end.
    guess_BD = token_BN.gather(1, torch.cat([walk_BD[:, 1:], walk_BD[:, -1:]], 1))
    is_guess_BD = torch.arange(walk_BD.shape[1], device=node_B.device) < tree.depth_N[node_B][:, None]
    return node_B, torch.where(is_guess_BD, guess_BD, target_BN.gather(1, walk_BD))


def _reached_depth(agrees_BN: Tensor, tree: Shape, speculates_B: Tensor | None) -> Tensor:
    """depth + 1 of the nodes on whose walk every guess is agreed with, and 0 elsewhere."""
    if speculates_B is not None:
        agrees_BN = agrees_BN & speculates_B[:, None]
    misses_BN = (~agrees_BN).float()
    misses_BN[:, 0] = 0  # the root is no guess
    return (tree.depth_N + 1) * (misses_BN @ tree.mask_NN.float().T == 0)
