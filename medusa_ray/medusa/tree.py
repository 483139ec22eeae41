"""Rank paths -> the tree of guesses that one forward pass verifies.

A path lists, head by head, the rank of the guess it takes: (0, 2) is head 0's best guess followed by head 1's third.
Node 0 is the root, the token already decided; node i + 1 is the end of path i. Paths are kept best first, parents
before children, so a prefix of the paths is itself a tree: changing size is a slice.

    paths (0,), (1,), (0, 0)          mask_NN   root (0,) (1,) (0,0)
                                      root       x
        root ── (0,) ── (0, 0)        (0,)       x    x
           └─── (1,)                  (1,)       x         x
                                      (0, 0)     x    x         x

# N tree nodes, the root included   D depth   P positions   H heads
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import fsspec
import torch
from torch import Tensor

RankPath = tuple[int, ...]

MASK_BITS = 64  # nodes that ancestor_bits can tell apart
MAX_GUESSES = (
    255  # four times those of the published tree; a step computes them all, and for each a score a token
)
MAX_FILE_BYTES = 2**20

# Each path's ranks, a digit a head: "mc_sim_7b_63" of the Medusa authors (github.com/FasterDecoding/Medusa).
PUBLISHED = (
    "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 40 21 004 005 "
    "0000 011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070"
)


class Shape(NamedTuple):
    """What a walk needs to know of a tree."""

    depth_N: Tensor
    mask_NN: Tensor
    parent_N: Tensor
    walk_ND: Tensor


@dataclass(frozen=True)
class Tree:
    """A tree of guesses. `Tree()` has only the root: the baseline."""

    paths: tuple[RankPath, ...] = ()

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> "Tree":
        """The tree of these rank paths, put in an order where parents come first.

        Raises ValueError for an empty or repeated path, a negative rank, a path whose parent is missing, or too many.
        """
        try:
            wanted = [tuple(path) for path in paths]
        except TypeError:
            raise ValueError(f"{paths!r} is no list of rank paths; expected such as [[0], [0, 2]].") from None
        if len(wanted) > MAX_GUESSES:
            raise ValueError(f"the tree has {len(wanted)} guesses; expected at most {MAX_GUESSES}.")
        for path in wanted:
            if not path or any(type(rank) is not int or rank < 0 for rank in path):  # a bool is no rank
                raise ValueError(f"{path} is not a rank path; expected ranks from 0, such as (0,) or (0, 2).")
            if wanted.count(path) > 1:
                raise ValueError(f"the path {path} comes twice; keep one.")
            if path[:-1] and path[:-1] not in wanted:
                raise ValueError(f"{path} has no parent in the tree; add {path[:-1]} or leave the path out.")
        ordered: dict[RankPath, None] = {}
        for path in wanted:
            for depth in range(1, len(path) + 1):
                ordered.setdefault(path[:depth])
        return cls(tuple(ordered))

    @classmethod
    def chain(cls, num_heads: int) -> "Tree":
        """Each head's best guess in a row. Raises ValueError when there are no heads."""
        _check_size("num_heads", num_heads)
        return cls(tuple((0,) * depth for depth in range(1, num_heads + 1)))

    @classmethod
    def published(cls) -> "Tree":
        """The 63 guesses, four heads deep, that the Medusa authors found for Vicuna 7B."""
        return cls.from_paths([int(rank) for rank in path] for path in PUBLISHED.split())

    @classmethod
    def calibrated(cls, rank_PH: Tensor, num_nodes: int) -> "Tree":
        """The tree of `num_nodes` guesses that held-out text would have accepted most often.

        rank_PH[p, h] is the rank that head h, asked at position p, gave the token that came; negative where that
        token is not among the ranks kept, or none came. A path's worth is the number of positions that follow it to
        its end. Counting whole paths measures each node's chance given that its parent was right; the product of
        the heads' separate accuracies (Medusa, arXiv 2401.10774, optimised tree
        construction) assumes that heads fail independently, which they do not. A child is never worth more than its
        parent, so taking the best paths one by one always gives a tree. Raises ValueError for a size below 1.
        """
        _check_size("num_nodes", num_nodes)
        worth: Counter[RankPath] = Counter()
        for ranks in rank_PH.tolist():
            followed = list(itertools.takewhile(lambda rank: rank >= 0, ranks))
            worth.update(tuple(followed[:depth]) for depth in range(1, len(followed) + 1))
        best = sorted(worth, key=lambda path: (-worth[path], len(path), path))
        return cls.from_paths(best[:num_nodes])

    @classmethod
    def load(cls, file: str | Path) -> "Tree":
        """From tree.json, a path or a URI. Raises FileNotFoundError, and ValueError when it holds no tree."""
        filesystem, path = fsspec.core.url_to_fs(str(file))
        if (num_bytes := filesystem.size(path)) > MAX_FILE_BYTES:
            raise ValueError(f"{file} has {num_bytes} bytes; a tree has at most {MAX_FILE_BYTES}.")
        try:
            record = json.loads(filesystem.cat_file(path))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON: {error}.") from None
        if not isinstance(record, dict) or "paths" not in record:
            raise ValueError(f'{file} has no "paths"; expected {{"paths": [[0], [0, 0], ...]}}.')
        try:
            return cls.from_paths(record["paths"])
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def __len__(self) -> int:
        """Nodes, the root included."""
        return len(self.paths) + 1

    @cached_property
    def depth(self) -> int:
        """Guesses on the longest path, which is also the number of heads it asks."""
        return max((len(path) for path in self.paths), default=0)

    @cached_property
    def num_ranks(self) -> int:
        """Guesses that each head must give."""
        return max((max(path) + 1 for path in self.paths), default=0)

    @cached_property
    def depths(self) -> list[int]:
        """Depth of each node, on the host."""
        return [0, *map(len, self.paths)]

    @cached_property
    def is_in_place(self) -> list[bool]:
        """Whether the walk to a node already lies in a row, as all of a chain's do: then nothing need be moved."""
        return [
            walked[: depth + 1] == [*range(depth + 1)]
            for walked, depth in zip(self.walk_ND.tolist(), self.depths, strict=True)
        ]

    @cached_property
    def depth_N(self) -> Tensor:
        return torch.tensor([0, *map(len, self.paths)])

    @cached_property
    def parent_N(self) -> Tensor:
        """Node of each node's parent; the root is its own."""
        node_of = {path: i + 1 for i, path in enumerate(self.paths)}
        return torch.tensor([0, *(node_of.get(path[:-1], 0) for path in self.paths)])

    @cached_property
    def guess_N(self) -> Tensor:
        """Where each node's token stands in [root | head 0's ranks | head 1's ranks | ...]."""
        return torch.tensor([0, *(1 + (len(path) - 1) * self.num_ranks + path[-1] for path in self.paths)])

    @cached_property
    def mask_NN(self) -> Tensor:
        """bool: the row's node sees the column's, that is, itself and its ancestors."""
        mask_NN = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parent_N.tolist()):
            mask_NN[node] |= mask_NN[parent]
        return mask_NN

    @cached_property
    def walk_ND(self) -> Tensor:
        """Nodes from the root to each node, D = depth + 1 of them, the last one repeated."""
        walk_ND = torch.zeros(len(self), self.depth + 1, dtype=torch.long)
        for node, (parent, depth) in enumerate(
            zip(self.parent_N.tolist(), self.depth_N.tolist(), strict=True)
        ):
            walk_ND[node] = walk_ND[parent]
            walk_ND[node, depth:] = node
        return walk_ND

    @cached_property
    def shape(self) -> Shape:
        return Shape(self.depth_N, self.mask_NN, self.parent_N, self.walk_ND)

    def prefix(self, num_nodes: int) -> "Tree":
        """The tree of the first nodes, the root counted, that takes its guesses from as many ranks as this one."""
        assert 1 <= num_nodes <= len(self), (num_nodes, len(self))
        smaller = Tree(self.paths[: num_nodes - 1])
        smaller.__dict__["num_ranks"] = self.num_ranks
        return smaller

    def to(self, device: str | torch.device) -> "Tree":
        """The same tree with its tables on a device."""
        moved = Tree(self.paths)
        moved.__dict__["num_ranks"] = self.num_ranks
        for name in ("depth_N", "parent_N", "guess_N", "mask_NN", "walk_ND"):
            moved.__dict__[name] = getattr(self, name).to(device)
        return moved


def _check_size(name: str, size: int) -> None:
    if type(size) is not int or size < 1:
        raise ValueError(f"{name} is {size!r}; expected a whole number, at least 1.")


def ancestor_bits(mask_NN: Tensor) -> Tensor:
    """int64 [N]: a tree's mask row by row, bit a for node a. Of at most MASK_BITS nodes."""
    return (mask_NN.long() << torch.arange(mask_NN.shape[0], device=mask_NN.device)).sum(1)
