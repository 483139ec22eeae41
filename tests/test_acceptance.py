import pytest
import torch

from medusa_ray.medusa.acceptance import walk
from medusa_ray.medusa.tree import Tree

TREE = Tree.from_paths([(0,), (1,), (0, 0), (1, 0), (1, 1)])
TOKENS = [7, 10, 11, 20, 30, 31]  # root; its children 10 and 11; 20 under 10; 30 and 31 under 11


@pytest.mark.parametrize(
    ("target", "node", "committed"),
    [
        ([99, 0, 0, 0, 0, 0], 0, [99]),  # never accepts: the root's own successor is all there is
        ([10, 20, 0, 55, 0, 0], 3, [10, 20, 55]),  # always accepts, along the first branch
        ([11, 20, 31, 0, 0, 66], 5, [11, 31, 66]),  # along the second
        ([11, 20, 77, 0, 0, 0], 2, [11, 77]),  # sometimes: one guess, then the base's own token
        ([99, 20, 31, 55, 0, 66], 0, [99]),  # children that agree count for nothing under one that does not
    ],
)
def test_the_walk_goes_as_far_as_the_base_agrees(target, node, committed):
    node_B, committed_BD = walk(torch.tensor([TOKENS]), torch.tensor([target]), TREE)
    assert node_B.tolist() == [node]
    assert committed_BD[0, : len(committed)].tolist() == committed


def test_rows_of_a_batch_walk_apart():
    token_BN = torch.tensor([TOKENS, TOKENS])
    target_BN = torch.tensor([[10, 20, 0, 55, 0, 0], [99, 0, 0, 0, 0, 0]])
    node_B, _ = walk(token_BN, target_BN, TREE)
    assert node_B.tolist() == [3, 0]


def test_random_trees_agree_with_a_slow_walk():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ranks = torch.randint(0, 3, (40, 3), generator=generator)
        tree = Tree.calibrated(ranks, int(torch.randint(1, 12, (1,), generator=generator)))
        token_BN = torch.zeros(1, len(tree), dtype=torch.long)
        for node, path in enumerate(tree.paths, 1):
            token_BN[0, node] = path[-1]  # siblings differ, cousins do not
        target_BN = torch.randint(0, 4, (1, len(tree)), generator=generator)
        path: tuple[int, ...] = ()
        committed = []
        while True:
            node = tree.paths.index(path) + 1 if path else 0
            said = int(target_BN[0, node])
            committed.append(said)
            if (*path, said) not in tree.paths:
                break
            path = (*path, said)
        node_B, committed_BD = walk(token_BN, target_BN, tree)
        assert node_B.item() == node
        assert committed_BD[0, : len(committed)].tolist() == committed
