"""Where heads had the tokens that came -> what they would have guessed, and how many tokens a step would commit.

# T positions of a reply   N positions   H heads   K ranks
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from medusa_ray.medusa.tree import Tree

NUM_RANKS = 10  # guesses of a head that are looked at: published trees use no more
MISSED, ENDED = -1, -2  # not among them; no token came


def ranks_in(guess_NK: Tensor, label_N: Tensor, is_asked_N: Tensor) -> Tensor:
    """The rank [N] of each label among the guesses of one head, best first; MISSED, or ENDED where nothing is asked."""
    hit_NK = guess_NK == label_N[:, None]
    rank_N = torch.where(hit_NK.any(dim=1), hit_NK.int().argmax(dim=1), MISSED)
    return torch.where(is_asked_N, rank_N, ENDED)


def top_accuracy(rank_TH: Tensor) -> dict[str, list[float]]:
    """Share of tokens that each head named first, and among its first five."""
    accuracy: dict[str, list[float]] = {}
    for name, limit in (("top1", 1), ("top5", 5)):
        columns = [column[column != ENDED] for column in rank_TH.T]
        accuracy[name] = [((c >= 0) & (c < limit)).float().mean().item() if len(c) else 0.0 for c in columns]
    return accuracy


def tokens_per_step(ranks: Sequence[Tensor], tree: Tree) -> float:
    """Acceleration on replies whose ranks [T, H] are known: tokens after the prefill's, over steps.

    It is exact: what a step accepts depends on the ranks at its root alone.
    """
    steps = sum(steps_by_accepted(ranks, tree))
    return sum(len(rank_TH) for rank_TH in ranks) / steps if steps else 0.0


def accepted_per_position(ranks: Sequence[Tensor], tree: Tree) -> list[float]:
    """Share of steps in which guess k, from 0, was accepted: 1 and these shares add up to `tokens_per_step`."""
    steps = steps_by_accepted(ranks, tree)
    return [sum(steps[k:]) / sum(steps) if sum(steps) else 0.0 for k in range(1, len(steps))]


def steps_by_accepted(ranks: Sequence[Tensor], tree: Tree) -> list[int]:
    """[j]: steps that commit j + 1 tokens, so j guesses, up to the tree's depth.

    One of the guesses takes the place of the base's own token where that is the reply's last, as the engine counts it.
    """
    paths = set(tree.paths)
    steps = [0] * (tree.depth + 1)
    for rank_TH in ranks:
        rows, root = rank_TH.tolist(), 0
        while root < len(rows):
            depth = 0
            while depth < tree.depth and tuple(rows[root][: depth + 1]) in paths:
                depth += 1
            steps[min(depth, len(rows) - root - 1)] += 1
            root += depth + 1
    return steps
