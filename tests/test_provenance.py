"""Provenance says what is done again: too coarse a key keeps what is stale, too fine a one resumes nothing."""

import json
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from medusa_ray import provenance

CONFIG = {"epochs": 2, "splits": ["a", "b"]}


def test_an_artifact_is_complete_for_just_its_config_and_inputs(tmp_path: Path) -> None:
    folder = str(tmp_path / "heads")
    assert not provenance.is_complete(folder, CONFIG, {"hidden": "1"})
    provenance.write(folder, CONFIG, {"hidden": "1"}, num_rows=3)
    assert provenance.is_complete(folder, CONFIG, {"hidden": "1"})
    assert not provenance.is_complete(folder, CONFIG | {"epochs": 3}, {"hidden": "1"})
    assert not provenance.is_complete(folder, CONFIG, {"hidden": "2"})
    assert not provenance.is_complete(folder, CONFIG, {})


def test_a_record_says_how_the_artifact_came_about(tmp_path: Path) -> None:
    provenance.write(str(tmp_path), CONFIG, {"hidden": "1"}, num_rows=3)
    record = json.loads((tmp_path / "provenance.json").read_text())
    assert record.keys() == {
        "key",
        "written",
        "command",
        "config",
        "inputs",
        "revision",
        "versions",
        "num_rows",
    }
    assert (record["config"], record["inputs"], record["num_rows"]) == (CONFIG, {"hidden": "1"}, 3)
    assert {"python", "torch", "ray", "medusa_ray"} <= record["versions"].keys()


def test_the_order_of_keys_does_not_matter_but_that_of_values_does() -> None:
    assert provenance.key({"a": 1, "b": 2}, {}) == provenance.key({"b": 2, "a": 1}, {})
    assert provenance.key(["a", "b"], {}) != provenance.key(["b", "a"], {})


def test_a_tuple_and_what_json_makes_of_it_have_one_key() -> None:
    assert provenance.key({"paths": ((0,), (0, 1))}, {}) == provenance.key({"paths": [[0], [0, 1]]}, {})


def test_the_digest_of_a_file_follows_its_contents(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("aaaa")
    first = provenance.digest(str(file))
    file.write_text("bbbb")  # of the same size
    assert provenance.digest(str(file)) != first


def test_the_digest_of_an_artifact_is_its_key_wherever_it_lies(tmp_path: Path) -> None:
    for name in ("a", "b"):
        provenance.write(str(tmp_path / name), CONFIG, {})
        (tmp_path / name / "rows.parquet").write_text(name)
    assert (
        provenance.digest(str(tmp_path / "a"))
        == provenance.digest(str(tmp_path / "b"))
        == provenance.key(CONFIG, {})
    )


def test_the_digest_of_a_plain_folder_follows_names_and_sizes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("weights")
    first = provenance.digest(str(tmp_path / "a"))
    assert provenance.digest(str(tmp_path / "b")) == first
    (tmp_path / "b" / "config.json").write_text("{}")
    assert provenance.digest(str(tmp_path / "b")) != first


def test_a_hub_name_stands_for_itself() -> None:
    assert provenance.digest("some-owner/some-model") == "some-owner/some-model"


def test_a_folder_is_not_declared_finished_by_a_write_that_fails(tmp_path: Path) -> None:
    """A reader sees the whole file or none: a half-written record would make every later run fail on it."""
    provenance.write(str(tmp_path), CONFIG, {})
    before = (tmp_path / "provenance.json").read_text()
    with pytest.raises(TypeError):
        provenance.write_json(str(tmp_path / "provenance.json"), {"good": 1, "bad": object()})
    assert (tmp_path / "provenance.json").read_text() == before


def test_a_url_that_fsspec_opens_works_as_a_folder() -> None:
    folder = "memory://runs/heads"
    provenance.write(folder, CONFIG, {})
    assert provenance.is_complete(folder, CONFIG, {})
    assert provenance.digest(folder) == provenance.key(CONFIG, {})


def test_the_hardware_is_named() -> None:
    hardware = provenance.hardware()
    assert hardware["cores"] >= 1
    assert hardware["cpu"]


def test_two_writers_of_one_file_leave_each_other_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs on one folder, or a driver and what is left of an earlier one."""
    file = str(tmp_path / "mark.json")
    move = LocalFileSystem.mv

    def move_after_the_other(*paths: object) -> None:
        monkeypatch.undo()
        provenance.write_json(file, "theirs")
        move(*paths)

    monkeypatch.setattr(LocalFileSystem, "mv", move_after_the_other)
    provenance.write_json(file, "ours")
    assert provenance.read_json(file) == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["mark.json"]


def test_what_killed_writers_left_goes_once_the_folder_is_finished(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / f"part-000001.parquet.0123{provenance.UNFINISHED}").touch()
    (tmp_path / "train" / "part-000001.parquet").touch()
    provenance.write(str(tmp_path), CONFIG, {})
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["part-000001.parquet"]
