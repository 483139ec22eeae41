"""How much of a tree a step takes: by hand-made step times, so that the right size is known."""

import random

import pytest

from medusa_ray.medusa.sizing import PROBE_EVERY, REVIEW_EVERY, TreeSizer
from medusa_ray.medusa.tree import Tree

TREE = Tree.from_paths([(0,), (0, 0), (1,), (0, 0, 0)])
FLAT = {1: 1.0, 3: 1.0, 5: 1.0}
STEEP = {1: 1.0, 3: 3.0, 5: 5.0}


def taught(times, chances: list[float], num_steps: int = 2000, rows: int = 1, seed: int = 0) -> TreeSizer:
    """A sizer that has seen steps in which a walk goes on to a node with the given chance, given its parent."""
    sizer, chance = TreeSizer(TREE, times), random.Random(seed)
    for _ in range(num_steps):
        size = sizer.pick(rows)
        ends = []
        for _ in range(rows):
            end = 0
            if size > 1 and chance.random() < chances[0]:
                end = 1
                if size > 2 and chance.random() < chances[1]:
                    end = 4 if size > 4 and chance.random() < chances[2] else 2
            ends.append(end)
        sizer.learn(size, ends)
    return sizer


def test_the_whole_tree_where_nodes_are_free_and_none_where_each_costs_a_step() -> None:
    assert taught({1: FLAT}, [0.8, 0.7, 0.6]).size == 5
    assert taught({1: STEEP}, [0.8, 0.7, 0.6]).size == 1


def test_the_size_follows_the_load() -> None:
    """The same tree pays for one sequence and not for many: a size chosen once would lose in one of the cases."""
    times = {1: FLAT, 8: STEEP}
    sizer = taught(times, [0.8, 0.7, 0.6])
    assert sizer.pick(1) == 5
    assert sizer.pick(8) == 1
    assert sizer.pick(1) == 5


def test_the_size_follows_the_share_of_those_that_want_guesses() -> None:
    """One of eight that gains a token and a half does not make up for the time that all eight lose."""
    sizer = taught({8: {1: 1.0, 3: 1.3, 5: 1.3}}, [0.8, 0.7, 0.6], rows=8)
    assert [sizer.pick(8, share) for share in (1.0, 1 / 8, 1.0)] == [5, 1, 5]
    assert sizer.rate(8, 5, 0.25) == pytest.approx((0.75 + 0.25 * sizer.tokens(5)) / 1.3)


def test_acceptance_is_learnt_and_forgotten_again() -> None:
    sizer = taught({1: FLAT}, [0.9, 0.5, 0.5])
    assert sizer.chances == pytest.approx([1.0, 0.9, 0.45, 0.0, 0.225], abs=0.08)
    assert sizer.tokens(5) == pytest.approx(1 + 0.9 + 0.45 + 0.225, abs=0.15)
    for _ in range(4000):
        sizer.learn(5, [0])
    assert sizer.chances == pytest.approx([1.0, 0, 0, 0, 0], abs=0.01)


def test_a_tree_that_did_not_pay_is_tried_again_now_and_then() -> None:
    """Without a probe a tree given up in a bad minute would never come back."""
    sizer = taught({1: {1: 1.0, 3: 1.5, 5: 2.0}}, [0.0, 0.0, 0.0])
    assert sizer.size == 1
    picked = [sizer.pick(1) for _ in range(PROBE_EVERY)]
    assert picked.count(5) == 1
    assert picked.count(1) == PROBE_EVERY - 1


def test_a_little_better_is_no_reason_to_change() -> None:
    times = {1: {1: 1.0, 3: 1.0, 5: 0.97}}
    sizer = TreeSizer(TREE, times)
    sizer.chances, sizer.size = [1.0, 0.0, 0.0, 0.0, 0.0], 1
    assert sizer.pick(1) == 1
    times[1][5] = 0.9
    assert [sizer.pick(1) for _ in range(REVIEW_EVERY)][-1] == 5


def test_seconds_lie_on_the_line_between_what_was_measured() -> None:
    sizer = TreeSizer(TREE, {1: {1: 1.0, 5: 2.0}, 4: {1: 4.0, 5: 8.0}})
    assert [sizer.seconds(rows, 1) for rows in (1, 2, 4)] == pytest.approx([1.0, 2.0, 4.0])
    assert sizer.seconds(3, 5) == pytest.approx(6.0)
    assert TreeSizer(TREE, {1: {1: 1.0, 5: 2.0}}).seconds(1, 5) == 2.0


def test_what_steps_take_beside_what_was_measured_speaks_for_larger_trees():
    """Each step costs Python its part, however many nodes it has: fewer steps are then worth more."""
    sizer = TreeSizer(TREE, {1: {1: 1.0, 5: 2.0}})
    without = sizer.rate(1, 5) / sizer.rate(1, 1)
    for _ in range(500):
        sizer.took(1, 1, 1.5)
        sizer.took(1, 5, 2.5)
    assert sizer.seconds(1, 1) == pytest.approx(1.5, abs=0.01)
    assert sizer.seconds(1, 5) == pytest.approx(2.5, abs=0.01)
    assert sizer.rate(1, 5) / sizer.rate(1, 1) == pytest.approx(without * (2.0 / 1.0) / (2.5 / 1.5), rel=0.01)
