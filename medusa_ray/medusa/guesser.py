"""Heads and a tree -> the tokens that a step puts to the base.

What a request is answered depends on the base alone, so an engine can take another guesser between any two steps.

# B running sequences   N tree nodes   H heads   K ranks
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.heads import HeadStack, MedusaHeads
from medusa_ray.medusa.sizing import doublings
from medusa_ray.medusa.tree import Tree
from medusa_ray.medusa.treepass import Ahead

Heads = str | Path | MedusaHeads | None
TreeLike = Tree | Rows[Rows[int]] | str | None


@dataclass(frozen=True, eq=False)
class Guesser:
    """Heads, stacked, and the trees that a step may choose from; without heads, the baseline's root."""

    heads: MedusaHeads | None
    stack: HeadStack | None
    tree: Tree  # the largest
    trees: dict[int, Tree]  # by number of nodes
    root_only: Tree

    @classmethod
    def of(
        cls, backbone: Backbone, heads: MedusaHeads | None, tree: Tree | None, is_adaptive: bool
    ) -> "Guesser":
        """tree: None for a chain of all heads. is_adaptive: steps take as much of the tree as pays at the load.

        Raises ValueError when base, heads and tree do not fit together.
        """
        tree = tree or (Tree.chain(heads.num_heads) if heads else Tree())
        _check_fit(backbone, heads, tree)
        sizes = tree_sizes(len(tree)) if is_adaptive else [len(tree)]
        trees = {size: tree.prefix(size).to(backbone.device) for size in sizes}
        root_only = Tree().to(backbone.device)
        return cls(heads, heads.stack() if heads else None, trees[len(tree)], trees, root_only)

    @property
    def is_adaptive(self) -> bool:
        return len(self.trees) > 1

    def propose(self, ahead: Ahead, tree: Tree) -> Tensor:
        """Token [B, N] of each node: the root, then the heads' guesses. tree: one of the guesser's own."""
        root_B1 = ahead.root_B[:, None]
        if self.stack is None or len(tree) == 1:
            return root_B1
        guess_BHK = self.stack.topk(ahead.hidden_BC, tree.num_ranks)
        return torch.cat([root_B1, guess_BHK.flatten(1)], 1)[:, tree.guess_N]

    def within(self, tree: Tree, room: int) -> Tree:
        """The tree, or where it has more nodes than `room` the largest that has not."""
        if len(tree) <= room:
            return tree
        return self.trees[max(sizes)] if (sizes := [n for n in self.trees if n <= room]) else self.root_only


def load(backbone: Backbone, heads: Heads, tree: TreeLike) -> tuple[MedusaHeads | None, Tree | None]:
    """Heads and tree for a Guesser, as Engine.load takes them. Raises ValueError or OSError."""
    folder = None if isinstance(heads, MedusaHeads) or heads is None else str(heads)
    if folder is not None:
        heads = MedusaHeads.load(folder, dtype=backbone.dtype, device=str(backbone.device))
    assert heads is None or isinstance(heads, MedusaHeads)
    if heads is not None:
        if heads.shares_output:
            heads.init_from(backbone.output_weight_VC)
        heads = heads.to(backbone.device, backbone.dtype).eval().requires_grad_(False)
    return heads, _as_tree(tree, heads, folder)


def tree_sizes(largest: int) -> list[int]:
    """Nodes of the trees that an adaptive step chooses from, the root counted: 1, 2, 3, 5, 9, 17 ... and all."""
    return sorted({1, largest, *(1 + num for num in doublings(largest - 1))})


def _check_fit(backbone: Backbone, heads: MedusaHeads | None, tree: Tree) -> None:
    if Tree.from_paths(tree.paths).paths != tree.paths:
        raise ValueError("the tree has children before their parents; make it by Tree.from_paths.")
    if heads is None:
        if tree.paths:
            raise ValueError(f"a tree of {len(tree.paths)} guesses needs heads, but none were given.")
        return
    for what, ours, theirs in (
        ("hidden size", heads.hidden_size, backbone.hidden_size),
        ("vocabulary", heads.vocab_size, backbone.vocab_size),
    ):
        if ours != theirs:
            raise ValueError(
                f"the heads have a {what} of {ours}, but the base has {theirs}: they were trained for another base."
            )
    if tree.depth > heads.num_heads:
        raise ValueError(
            f"the tree is {tree.depth} deep, but there are only {heads.num_heads} heads; shorten its paths."
        )
    if tree.num_ranks > heads.draft_vocab_size:
        raise ValueError(
            f"the tree asks for rank {tree.num_ranks - 1}, counted from 0, but the heads guess only "
            f"{heads.draft_vocab_size} tokens; leave its higher ranks out."
        )


def _as_tree(tree: Any, heads: MedusaHeads | None, folder: str | None) -> Tree | None:
    """What the caller named, or None for the default."""
    if isinstance(tree, Tree):
        return tree
    if tree == "chain":
        return Tree.chain(heads.num_heads) if heads else Tree()
    if isinstance(tree, str) and tree != "auto":
        raise ValueError(f'tree is {tree!r}; expected "auto", "chain", rank paths or a Tree.')
    if tree is not None and tree != "auto":
        return Tree.from_paths(tree)
    try:
        return Tree.load(f"{folder}/tree.json") if folder else None
    except FileNotFoundError:
        return None
