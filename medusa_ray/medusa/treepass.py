"""Tokens of a tree -> logits and hidden states at its nodes, by one pass of the base.

A piece of a prompt is a tree as well, without branches. A pass is a function of tensors alone: what it reads it is
given, and what it changes is the cache. So it can be exported and compiled (compiled.py), for any number of
sequences, nodes and pages.

# B sequences   N tree nodes   W nodes wanted   P pages   S slots   C hidden   V vocab
"""

import torch
from torch import Tensor, nn

from medusa_ray.medusa.attention import Step
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.cache import all_slots


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


def tree_step(
    length_B: Tensor,
    table_BP: Tensor,
    depth_N: Tensor,
    mask_NN: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
) -> Step:
    """Nodes stand behind the context, in their order; each sees the context, its ancestors and itself."""
    num_nodes = depth_N.shape[0]  # and not len(), which a compiled pass would take for a constant
    read_BS = all_slots(table_BP)
    slot_S = torch.arange(read_BS.shape[1], device=read_BS.device)
    node_BN = length_B[:, None] + torch.arange(num_nodes, device=read_BS.device)
    behind_BS = slot_S - length_B[:, None]  # negative in the context, else the node that stands there
    is_node_BS = (behind_BS >= 0) & (behind_BS < num_nodes)
    inner_BS = behind_BS.clamp(0, num_nodes - 1)
    among_nodes_BNS = mask_NN.T[inner_BS].transpose(1, 2) & is_node_BS[:, None]
    return Step(
        keys,
        values,
        write_BT=read_BS.gather(1, node_BN),
        read_BS=read_BS,
        visible_BTS=(behind_BS < 0)[:, None] | among_nodes_BNS,
        position_BT=length_B[:, None] + depth_N,
        position_BS=torch.where(is_node_BS, length_B[:, None] + depth_N[inner_BS], slot_S),
    )
