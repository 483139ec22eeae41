"""What is on disk at any moment is what a killed run can go on with."""

import time
from pathlib import Path

import pyarrow as pa
import pytest

from medusa_ray import parts, provenance
from medusa_ray.config import UserError

TABLE = pa.table({"id": ["a", "b"]})


def test_parts_of_the_same_key_are_kept_and_others_are_cleared(tmp_path: Path) -> None:
    folder = str(tmp_path / "distilled")
    assert parts.begin(folder, "key") == set()
    parts.write(folder, parts.part_name(1), TABLE)
    assert parts.begin(folder, "key") == {"part-000001"}
    assert parts.begin(folder, "another key") == set()
    assert parts.names(folder) == []
    assert parts.begin(folder, "key") == set()


def test_parts_too_dear_to_lose_are_refused_by_name_of_what_changed(tmp_path: Path) -> None:
    folder, of = str(tmp_path / "distilled"), {"distill": {"seed": 0, "top_p": 1.0}}
    parts.begin(folder, "key", of)
    assert (
        parts.begin(folder, "another", {"distill": {"seed": 1}}, is_dear=True) == set()
    )  # nothing there to lose
    parts.begin(folder, "key", of)
    parts.write(folder, parts.part_name(1), TABLE)
    with pytest.raises(
        UserError, match=r"distilled holds 1 parts of another run: distill\.seed was 0, and is 1\. Set"
    ):
        parts.begin(folder, "another", {"distill": {"seed": 1, "top_p": 1.0}}, is_dear=True)
    assert parts.begin(folder, "key", of, is_dear=True) == {"part-000001"}


def test_a_folder_half_cleared_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path)
    parts.write(folder, parts.part_name(0), TABLE)
    provenance.write(folder, {}, {})
    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.find", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        parts.clear(folder)
    assert not provenance.is_complete(folder, {}, {})


def test_clearing_leaves_what_others_put_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    parts.write(str(tmp_path), "train/part-000000", TABLE)
    (tmp_path / "train" / "part-000001.parquet.0123.unfinished").touch()
    parts.clear(str(tmp_path))
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["notes.txt"]


def test_a_part_that_could_not_be_written_whole_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts.write(str(tmp_path), "part-000000", TABLE)

    def fall_over(table: pa.Table, file: object) -> None:
        file.write(b"PAR1")  # type: ignore[attr-defined]  # any binary file
        raise OSError("no space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", fall_over)
    for name in ("part-000000", "part-000001"):
        with pytest.raises(OSError, match="no space"):
            parts.write(str(tmp_path), name, TABLE.slice(1))
    assert parts.names(str(tmp_path)) == ["part-000000"]
    assert [file.name for file in tmp_path.iterdir()] == ["part-000000.parquet"]
    assert parts.read(str(tmp_path), "part-000000") == TABLE


def test_parts_are_named_in_the_order_of_their_rows(tmp_path: Path) -> None:
    for index in (10, 2, 100):
        parts.write(str(tmp_path), parts.part_name(index), TABLE.slice(0, 1))
    assert parts.names(str(tmp_path)) == ["part-000002", "part-000010", "part-000100"]
    assert parts.num_rows(str(tmp_path), "part-000010") == 1
    assert parts.names(str(tmp_path / "nowhere")) == []


def test_parts_can_live_wherever_fsspec_reaches() -> None:
    folder = "memory://bucket/distilled"
    parts.begin(folder, "key")
    parts.write(folder, "part-000000", TABLE)
    assert parts.begin(folder, "key") == {"part-000000"}
    assert parts.read(folder, "part-000000", ["id"]) == TABLE
    assert parts.absolute(folder) == "memory:///bucket/distilled"


def test_an_output_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/distilled cannot be written: .* Set output to a place"):
        parts.begin(str(tmp_path / "file" / "distilled"), "key")


def test_a_folder_that_does_not_answer_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec's own isdir and exists say no then, and a run would begin again from nothing."""
    folder = str(tmp_path / "prompts")
    parts.begin(folder, "key")
    parts.write(folder, parts.part_name(0), TABLE)

    def no_answer(*_: object, **__: object) -> None:
        raise OSError("503 Slow Down")

    with monkeypatch.context() as patch:
        patch.setattr("fsspec.implementations.local.LocalFileSystem.info", no_answer)
        for act in (
            lambda: parts.names(folder),
            lambda: parts.begin(folder, "key"),
            lambda: provenance.digest(folder),
        ):
            with pytest.raises((OSError, UserError), match="503 Slow Down"):
                act()
    assert parts.begin(folder, "key") == {"part-000000"}


def test_parts_are_read_ahead_in_their_order_and_only_so_far(tmp_path: Path) -> None:
    """A bucket answers after tens of milliseconds, of which a driver that waits for each has a million."""
    for index in range(5):
        parts.write(str(tmp_path), parts.part_name(index), TABLE.slice(0, index % 3))
    assert list(parts.sizes(str(tmp_path))) == [(parts.part_name(i), i % 3) for i in range(5)]
    begun: list[int] = []

    def read(item: int) -> int:
        begun.append(item)
        time.sleep(0.02 if item == 0 else 0)
        if item == 90:
            raise OSError("gone")
        return item

    found = parts.ahead(read, range(100))
    assert next(found) == 0
    assert len(begun) <= parts.READERS + 1
    assert next(found) == 1
    with pytest.raises(OSError, match="gone"):
        list(found)
