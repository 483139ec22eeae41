"""A row that ends its process is named, and no other row is blamed for it."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from test_distill import Parrot, config_of, make_prompts, rows_of

from medusa_ray import distill, provenance
from medusa_ray.distill.attempts import DEATHS, FOLDER, Attempts
from medusa_ray.medusa.scheduler import Sequence

for name in (__name__, "test_distill"):
    ray.cloudpickle.register_pickle_by_value(sys.modules[name])  # workers cannot import a test

ROWS = list(range(10))


def start(folder: Path, run: str = "run", node: str = "n1", alive: str = "n1 n2") -> Attempts:
    return Attempts(str(folder), "part-000000", run, node, lambda: set(alive.split()))


def die(attempts: Attempts, row: int) -> list[int]:
    """Goes on until the group that holds the row, and returns it."""
    for group in attempts.groups([row for row in ROWS if row not in attempts.fatal], 4):
        if row in group:
            return group
    raise AssertionError


def test_a_fatal_row_is_closed_in_on_and_set_aside(tmp_path: Path) -> None:
    died = [die(start(tmp_path), 6) for _ in range(2 + DEATHS)]
    assert died == [ROWS, [4, 5, 6, 7], [6], [6], [6]]
    last = start(tmp_path)
    assert (last.fatal, last.num_earlier) == ({6: DEATHS}, 2 + DEATHS)
    others = [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert list(last.groups(others, 4)) == [[0, 1, 2, 3], [4, 5, 7, 8], [9]]
    last.end()
    assert list(start(tmp_path).groups(ROWS, 4)) == [ROWS]


def test_attempts_are_kept_wherever_parts_are() -> None:
    """Object stores have no folders and append to nothing."""
    for _ in range(2 + DEATHS):
        die(Attempts("memory://bucket/distilled", "part-000000", "run", "n1", lambda: {"n1"}), 6)
    last = Attempts("memory://bucket/distilled", "part-000000", "run", "n1", lambda: {"n1"})
    assert last.fatal == {6: DEATHS}
    last.end()
    assert Attempts("memory://bucket/distilled", "part-000000", "run", "n1", lambda: {"n1"}).num_earlier == 0


def test_two_fatal_rows_of_one_group_are_both_found(tmp_path: Path) -> None:
    for _ in range(20):
        attempts = start(tmp_path)
        left = [row for row in ROWS if row not in attempts.fatal]
        if not any({5, 6} & set(group) for group in attempts.groups(left, 4)):
            break
    assert attempts.fatal == {5: DEATHS, 6: DEATHS}


def test_lost_nodes_and_killed_drivers_blame_nobody(tmp_path: Path) -> None:
    """Each would look as if the row had killed its worker."""
    for _ in range(9):
        die(start(tmp_path, node="gone"), 6)
    for run in range(9):
        die(start(tmp_path, run=f"killed {run}"), 6)
    attempts = start(tmp_path)
    assert not attempts.is_careful
    assert not attempts.fatal
    assert (attempts.num_earlier, list(attempts.groups(ROWS, 4))) == (18, [ROWS])


def test_a_worker_lost_by_chance_while_a_row_is_alone_blames_nobody(tmp_path: Path) -> None:
    die(start(tmp_path), 6)
    die(start(tmp_path), 6)
    assert die(start(tmp_path), 4) == [4]  # an innocent row's turn
    assert [die(start(tmp_path), 6) for _ in range(DEATHS)] == [[6]] * DEATHS
    assert start(tmp_path).fatal == {6: DEATHS}


class Mortal(Parrot):
    """Dies of one prompt."""

    def __init__(self, deadly: list[int]) -> None:
        super().__init__()
        self.deadly = deadly

    def add(self, request: Any) -> Sequence:
        sequence = super().add(request)
        if request.prompt_ids == self.deadly:
            os._exit(1)
        return sequence


@pytest.mark.ray
def test_a_row_that_kills_its_worker_is_the_only_one_lost(
    ray_cluster: None, tmp_path: Path, tiny_base: Path
) -> None:
    prompts = make_prompts(tmp_path, tiny_base)
    config = config_of(tmp_path, tiny_base, batch_size=2)
    deadly = prompts[5]["prompt_ids"]
    distill.run(config, lambda base, **options: Mortal(deadly))
    (tmp_path / "fresh").mkdir()
    make_prompts(tmp_path / "fresh", tiny_base)
    fresh = config_of(tmp_path / "fresh", tiny_base, batch_size=2)
    distill.run(fresh, lambda base, **options: Parrot())
    rows, undisturbed = rows_of(config, "distilled"), rows_of(fresh, "distilled")
    assert rows[5]["id"] == "chat05/0/0"
    assert rows[5]["error"] == f"killed its worker {DEATHS} times: it generated nothing else"
    assert rows[:5] + rows[6:] == undisturbed[:5] + undisturbed[6:]
    facts = provenance.read(config.artifact("distilled"))
    assert facts["rows"]["errors"][f"killed its worker {DEATHS} times"] == 1
    assert facts["retries"] >= 2 + DEATHS
    assert not (tmp_path / "distilled" / FOLDER).exists()
