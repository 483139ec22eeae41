"""What a step costs and what a tree is worth here: the figures are the machine's, their shape is ours."""

from pathlib import Path

import pyarrow as pa
import pytest

from medusa_ray import parts, profile, records
from medusa_ray.config import UserError
from medusa_ray.medusa import compiled
from medusa_ray.medusa.heads import MedusaHeads

PROMPTS = [[1, 70 + i, 80 + 2 * i, 90] for i in range(6)]


@pytest.fixture
def heads(tmp_path: Path, tiny_base: Path) -> str:
    heads = MedusaHeads(hidden_size=32, vocab_size=262)
    heads.save(tmp_path / "heads", str(tiny_base))
    return str(tmp_path / "heads")


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    rows = [
        dict.fromkeys(records.PROMPTS.names) | {"id": str(i), "prompt_ids": ids}
        for i, ids in enumerate(PROMPTS)
    ]
    parts.write(str(tmp_path / "prompts"), "part-000000", pa.Table.from_pylist(rows, records.PROMPTS))
    return str(tmp_path / "prompts")


def test_steps_and_replies_are_measured_for_every_arm(tiny_base, heads, prompts, monkeypatch) -> None:
    monkeypatch.setattr(compiled, "why_not", lambda device: "this test has no time for it")
    found = profile.run(str(tiny_base), heads, prompts, 4, (1, 3), 8, against_transformers=True)
    assert found["mode"] == "eager"
    assert {rows: list(row) for rows, row in found["step_ms"].items()} == {n: [0, 1, 2, 3] for n in (1, 2, 3)}
    assert found["prompts"] == 4
    for rates in found["replies"].values():
        assert list(rates) == [
            "generate, dynamic cache",
            "generate, static cache",
            "plain, eager",
            "plain",
            "tree of 1",
            "tree of 2",
            "tree of 3",
            "adaptive",
        ]
        assert min(rates.values()) > 0
    (headers, steps), (arms, replies) = profile.tables(found)
    assert headers == ["rows", "no tree", "1 nodes", "2 nodes", "3 nodes", "suggested"]
    assert [row[0] for row in steps] == ["1", "2", "3"]
    assert arms == ["arm", "batch 1", "batch 3"]
    assert replies[3][1].endswith("tokens/s (1.00x)")


def test_arms_that_say_different_things_are_not_compared() -> None:
    with pytest.raises(RuntimeError, match="b and a give other tokens on 1 of 2 prompts"):
        profile.compare({"a": lambda prompts: [[1], [2]], "b": lambda prompts: [[1], [3]]}, [[5], [6]])


def test_a_folder_without_prompts_is_a_users_mistake(tiny_base, tmp_path) -> None:
    with pytest.raises(UserError, match="holds no prompts"):
        profile.run(str(tiny_base), prompts=str(tmp_path))
