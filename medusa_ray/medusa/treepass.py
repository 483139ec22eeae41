"""Tokens of a tree -> logits and hidden states at its nodes, by one pass of the base.

A piece of a prompt is a tree as well, without branches. A pass is a function of tensors alone: what it reads it is
given, and what it changes is the cache. So it can be exported and compiled (compiled.py), for any number of
sequences, nodes and pages.

# B sequences   N tree nodes   W nodes wanted   P pages   S slots   C hidden   V vocab
"""

from torch import Tensor, nn

from medusa_ray.medusa.attention import tree_step
from medusa_ray.medusa.backbone import Backbone


class TreePass(nn.Module):
    """The base under trees, behind what the cache holds of their sequences. The baseline's tree is a root."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.model = backbone.model  # for its parameters
        self.backbone = backbone

    def forward(
        self,
        token_BN: Tensor,
        length_B: Tensor,
        table_BP: Tensor,
        depth_N: Tensor,
        mask_NN: Tensor,
        wanted_BW: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Returns logits_BWV and hidden_BWC, and leaves all nodes' keys and values behind the context.

        length_B: tokens in the cache. table_BP: pages with room for the nodes. depth_N, mask_NN: of the tree
        (tree.py). keys, values: a pool per layer.
        """
        step = tree_step(length_B, table_BP, depth_N, mask_NN, keys, values)
        return self.backbone.forward(token_BN, step, wanted_BW)
