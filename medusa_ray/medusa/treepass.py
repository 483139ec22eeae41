"""Tokens of a tree -> logits and hidden states at its nodes by one pass of the base, and all of a greedy step.

A piece of a prompt is a tree as well, without branches. A pass is a function of tensors alone: what it reads it is
given, and what it changes is the cache. So it can be exported and compiled (compiled.py), for any number of
sequences, nodes and pages.

# B sequences   N tree nodes   W nodes wanted   D depth + 1   P pages   S slots   C hidden   V vocab
"""

from typing import NamedTuple

from torch import Tensor, nn

from medusa_ray.medusa.acceptance import Verdict, walk
from medusa_ray.medusa.attention import tree_step
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.cache import compact
from medusa_ray.medusa.tree import Shape


class Ahead(NamedTuple):
    """Where the next step starts from."""

    root_B: Tensor
    hidden_BC: Tensor  # at the token before the root
    length_B: Tensor  # tokens in the cache


class Outcome(NamedTuple):
    """What a pass says of the wanted nodes, and what it comes to where all decode greedily."""

    logits_BWV: Tensor
    hidden_BWC: Tensor
    verdict_BX: Tensor  # as Verdict.pack
    root_B: Tensor  # this and the next two as in Ahead
    hidden_BC: Tensor
    length_B: Tensor


class TreePass(nn.Module):
    """The base under trees, behind what the cache holds of their sequences. The baseline's tree is a root."""

    def __init__(self, backbone: Backbone, cpu_threads: int | None = None) -> None:
        """cpu_threads: as tree_step takes them."""
        super().__init__()
        self.model = backbone.model  # for its parameters
        self.backbone, self.cpu_threads = backbone, cpu_threads

    def forward(
        self,
        token_BN: Tensor,
        length_B: Tensor,
        table_BP: Tensor,
        depth_N: Tensor,
        mask_NN: Tensor,
        wanted_BW: Tensor,
        depth_W: Tensor,
        mask_WW: Tensor,
        parent_W: Tensor,
        walk_WD: Tensor,
        is_greedy: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """An Outcome's tensors. Leaves all nodes' keys and values behind the context, and those of the walk in a row.

        length_B: tokens in the cache. table_BP: pages with room for the nodes. depth_N, mask_NN: of the tree. The
        wanted nodes are a tree of their own, with the shape depth_W ... walk_WD (tree.py): all of it, or a prompt's
        last token alone. is_greedy: bool, whether the greedy walk is the right one; if not, nothing is moved. keys,
        values: a pool per layer.
        """
        step = tree_step(length_B, table_BP, depth_N, mask_NN, keys, values, self.cpu_threads)
        logits_BWV, hidden_BWC = self.backbone.forward(token_BN, step, wanted_BW)
        shape = Shape(depth_W, mask_WW, parent_W, walk_WD)
        verdict = Verdict(*walk(token_BN.gather(1, wanted_BW), logits_BWV.argmax(-1), shape))
        compact(keys, values, table_BP, length_B, walk_WD[verdict.node_B] * is_greedy)
        ahead = advance(verdict, hidden_BWC, length_B, depth_W)
        return logits_BWV, hidden_BWC, verdict.pack(), *ahead


def advance(verdict: Verdict, hidden_BNC: Tensor, length_B: Tensor, depth_N: Tensor) -> Ahead:
    """Where walks have led. length_B: tokens in the cache before the step."""
    depth_B = depth_N[verdict.node_B]
    node_B1C = verdict.node_B[:, None, None].expand(-1, 1, hidden_BNC.shape[2])
    return Ahead(
        verdict.committed_BD.gather(1, depth_B[:, None])[:, 0],
        hidden_BNC.gather(1, node_B1C)[:, 0],
        length_B + depth_B + 1,
    )
