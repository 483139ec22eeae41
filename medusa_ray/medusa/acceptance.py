"""What the base says at every node -> the tokens that a step commits.

The rule is one for greedy decoding and for sampling: the base names its token at each node; where a child carries
that token the walk goes on, where none does the token itself is committed as the last one. Guesses are fixed before
the base speaks, so the committed tokens are exactly the base's own: equal to the plain greedy ones, and to the
plain sampled ones when the noise at a position is the same (sampling.py).

# B requests   N tree nodes   D depth + 1
"""

import torch
from torch import Tensor

from medusa_ray.medusa.tree import Tree


def walk(token_BN: Tensor, target_BN: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
    """The deepest node that the base agrees with, and the tokens committed on the way there.

    token_BN: token at each node, the root's first. target_BN: the base's own token after each node.
    Returns node_B and committed_BD: the tokens of the walk without the root, then the base's token after node_B;
    only the first depth_N[node_B] + 1 entries of a row count.
    """
    if len(tree) == 1:
        return torch.zeros_like(target_BN[:, 0]), target_BN
    agrees_BN = token_BN == target_BN[:, tree.parent_N]
    agrees_BN[:, 0] = True
    # A node is reached when no node on its walk disagrees. Siblings differ in their tokens, so at most one node of
    # each depth is reached, and the deepest one is the end of the walk.
    misses_BN = (~agrees_BN).float() @ tree.mask_NN.float().T
    reached_BN = (tree.depth_N + 1) * (misses_BN == 0)
    node_B = reached_BN.argmax(-1)
    walk_BD = tree.walk_ND[node_B]
    committed_BD = target_BN.gather(1, walk_BD)
    return node_B, committed_BD
