import json

import pytest
import torch

from medusa_ray.medusa.tree import Tree, ancestor_bits


def test_the_drawn_tree_has_the_drawn_mask():
    tree = Tree.from_paths([(0,), (1,), (0, 0)])
    assert tree.mask_NN.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    assert ancestor_bits(tree.mask_NN).tolist() == [0b1, 0b11, 0b101, 0b1011]
    assert tree.depth_N.tolist() == [0, 1, 1, 2]
    assert tree.parent_N.tolist() == [0, 0, 0, 1]
    assert tree.walk_ND.tolist() == [[0, 0, 0], [0, 1, 1], [0, 2, 2], [0, 1, 3]]
    # Two ranks a head: root, head 0 rank 0, head 0 rank 1, head 1 rank 0.
    assert tree.guess_N.tolist() == [0, 1, 2, 3]
    assert (len(tree), tree.depth, tree.num_ranks) == (4, 2, 2)
    assert tree.is_in_place == [True, True, False, False]


def test_a_chain_takes_each_heads_best_guess():
    chain = Tree.chain(3)
    assert chain.paths == ((0,), (0, 0), (0, 0, 0))
    assert all(chain.is_in_place)
    assert chain.mask_NN.equal(torch.ones(4, 4).tril().bool())
    assert ancestor_bits(Tree.chain(63).mask_NN).tolist() == [*(2**n - 1 for n in range(1, 64)), -1]


def test_the_published_tree_has_63_guesses_of_four_heads_with_at_most_ten_ranks():
    tree = Tree.published()
    assert (len(tree), tree.depth, tree.num_ranks) == (64, 4, 10)
    assert [sum(len(path) == depth for path in tree.paths) for depth in (1, 2, 3, 4)] == [10, 28, 23, 2]
    parents = {path[:-1] for path in tree.paths}
    assert sum(path not in parents for path in tree.paths) == 42
    # Best first, so its prefixes are trees of their own.
    assert tree.paths[:5] == ((0,), (0, 0), (1,), (0, 1), (2,))
    assert all(Tree.from_paths(tree.paths[:size]).paths == tree.paths[:size] for size in range(64))


def test_the_empty_tree_is_the_root_alone():
    assert (len(Tree()), Tree().depth, Tree().num_ranks) == (1, 0, 0)


def test_children_listed_before_their_parents_are_put_behind_them():
    assert Tree.from_paths([(0, 1), (0,), (1,)]).paths == ((0,), (0, 1), (1,))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0,), (1, 0)], r"\(1, 0\) has no parent in the tree; add \(1,\)"),
        ([(0,), (0,)], "comes twice"),
        ([()], "not a rank path"),
        ([(-1,)], r"\(-1,\) is not a rank path"),
        ([(0,), (0, True)], r"\(0, True\) is not a rank path"),
        ([(0,), (0, 1.0)], "not a rank path"),
        ([(0,), ([1],)], "not a rank path"),
        ([(0,), 5], "no list of rank paths"),
        (None, "None is no list of rank paths"),
        ([(rank,) for rank in range(256)], "the tree has 256 guesses; expected at most 255"),
    ],
)
def test_a_malformed_tree_is_refused_by_its_path(paths, message):
    with pytest.raises(ValueError, match=message):
        Tree.from_paths(paths)


def test_calibration_takes_the_paths_that_text_followed_most_often():
    """Separate accuracies would prefer (0, 0); only the joint count sees that head 1 is right when head 0 is not."""
    ranks = [[0, 5], [0, 5], [0, 5], [1, 0], [1, 0], [2, 0], *[[-1, 0]] * 9, *[[3, -2]]]
    tree = Tree.calibrated(torch.tensor(ranks), num_nodes=4)
    assert tree.paths == ((0,), (0, 5), (1,), (1, 0))


def test_every_prefix_of_a_calibrated_tree_is_a_tree():
    ranks = torch.randint(0, 4, (500, 3), generator=torch.Generator().manual_seed(0))
    tree = Tree.calibrated(ranks, num_nodes=30)
    assert len(tree) == 31
    for size in range(31):
        assert Tree.from_paths(tree.paths[:size]).paths == tree.paths[:size]


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_tree_has_at_least_one_guess_where_a_size_is_asked_for(size):
    with pytest.raises(ValueError, match=rf"num_nodes is {size}; expected a whole number, at least 1"):
        Tree.calibrated(torch.tensor([[0, 0], [1, 0]]), size)
    with pytest.raises(ValueError, match=f"num_heads is {size}"):
        Tree.chain(size)


def test_a_file_that_holds_no_tree_is_refused_by_its_name(tmp_path):
    file = tmp_path / "tree.json"
    file.write_text(json.dumps({"nodes": 3}))
    with pytest.raises(ValueError, match='has no "paths"'):
        Tree.load(file)
    for content, message in (
        ("{", "tree.json is not JSON"),
        ("[" * 100_000, "tree.json is not JSON"),
        ("[[0]]", 'has no "paths"'),
        ('{"paths": 3}', r"tree.json: 3 is no list of rank paths"),
        ('{"paths": [[0], [1, 0]]}', r"tree.json: \(1, 0\) has no parent"),
        ('{"paths": [[NaN]]}', r"\(nan,\) is not a rank path"),
        (" " * 2**20 + "{}", "has 1048578 bytes; a tree has at most 1048576"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            Tree.load(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not JSON"):
        Tree.load(file)
    file.write_text(json.dumps({"paths": [[0], [0, 1]]}))
    assert Tree.load(file).paths == ((0,), (0, 1))
