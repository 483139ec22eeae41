"""Sources of every kind lead to the same chats, and every chat is accounted for by source and reason."""

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from transformers import AutoTokenizer

from medusa_ray import data, parts, provenance
from medusa_ray.cli import sample
from medusa_ray.config import DataConfig, RunConfig, UserError
from medusa_ray.data import choose, export, filters, render, scan
from medusa_ray.data.reading import cut, rows, whole_files

QUESTIONS = [f"question {i}, and what came of it?" for i in range(40)]


def chat_of(question: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"It is {len(question)}."},
    ]


CHATS = [chat_of(question) for question in QUESTIONS]
ROWS = [{"id": f"c{i}", "messages": chat} for i, chat in enumerate(CHATS)]
SHAREGPT = [
    {
        "id": row["id"],
        "conversations": [{"from": "human", "value": asked["content"]}, {"from": "gpt", "value": told["content"]}],
    }
    for row, (asked, told) in zip(ROWS, CHATS, strict=True)
]  # fmt: skip


def lines(values: list[Any]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def parquet(values: list[Any], row_group_size: int = 7) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(values), file, row_group_size=row_group_size)
    return file.getvalue()


def table(values: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(values[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(values)
    return file.getvalue().encode()


AS_JSON = [{"id": row["id"], "messages": json.dumps(row["messages"], indent=1)} for row in ROWS]
FILES: dict[str, tuple[str, bytes, dict[str, Any]]] = {
    "lines": ("a.jsonl", lines(ROWS), {}),
    "lines without their last end": ("a.jsonl", lines(ROWS)[:-1], {}),
    "lines that end as on Windows": ("a.ndjson", lines(ROWS).replace(b"\n", b"\r\n"), {}),
    "lines, packed": ("a.jsonl.gz", gzip.compress(lines(ROWS)), {}),
    "list": ("a.json", json.dumps(ROWS, indent=2).encode(), {}),
    "list, packed": ("a.json.gz", gzip.compress(json.dumps(ROWS).encode()), {}),
    "parquet": ("a.parquet", parquet(ROWS), {}),
    "parquet under no name": ("shard", parquet(ROWS), {}),
    "csv with newlines in cells": ("a.csv", table(AS_JSON), {}),
    "csv, packed": ("a.csv.gz", gzip.compress(table(AS_JSON)), {}),
    "tabs": ("a.tsv", table(AS_JSON, "\t"), {}),
    "sharegpt": ("a.jsonl", lines(SHAREGPT), {}),
    "sharegpt in parquet": ("a.parquet", parquet(SHAREGPT), {}),
    "a format said": ("a.log", lines(ROWS), {"format": "jsonl"}),
    "other names": (
        "a.parquet",
        parquet([{"key": row["id"], "chat": row["messages"]} for row in ROWS]),
        {"columns": {"messages": "chat", "id": "key"}},
    ),
    "prompt and completion as messages": (
        "a.jsonl",
        lines(
            [
                {"id": row["id"], "prompt": row["messages"][:1], "completion": row["messages"][1:]}
                for row in ROWS
            ]
        ),
        {},
    ),
}


def read(uri: str | Path, **options: Any) -> list[data.Kept]:
    source = {"uri": str(uri), **options}
    return list(data.chats(DataConfig(train=[source], test=[source]), "train"))


def said(chats: list[data.Kept]) -> list[tuple[str, Any]]:
    assert not [chat.error for chat in chats if chat.error]
    return [(chat.id, json.loads(chat.text)) for chat in chats]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_holds_the_same_chats(name: str, tmp_path: Path) -> None:
    file_name, content, options = FILES[name]
    (tmp_path / file_name).write_bytes(content)
    assert said(read(tmp_path / file_name, **options)) == [(row["id"], row["messages"]) for row in ROWS]


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 1000, 10**6])
@pytest.mark.parametrize("name", FILES)
def test_wherever_a_file_is_cut_each_row_is_read_once(name: str, piece_bytes: int, tmp_path: Path) -> None:
    """A line that ends just where a piece does is lost or read twice by a cut that is off by one."""
    file_name, content, options = FILES[name]
    (tmp_path / file_name).write_bytes(content)
    config = DataConfig(train=[{"uri": str(tmp_path / file_name), **options}], test=["-"])
    sources = data.sources._sources(config.train, "train", "train")
    pieces = cut(whole_files(sources), piece_bytes)
    assert len(pieces) > 1 or piece_bytes >= 1000 or file_name not in ("a.jsonl", "a.parquet")
    found = [row for piece in pieces for row in rows(piece) if row]
    assert [row.id for row in found] == [row["id"] for row in ROWS]


def test_a_line_that_ends_with_its_piece_belongs_to_it_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS[:5]))
    wholes = whole_files(data.find_sources(DataConfig(train=str(tmp_path / "a.jsonl")))["train"])
    ends = np.cumsum([len(lines([row])) for row in ROWS[:5]]).tolist()
    for piece_bytes in range(min(ends) - 3, max(ends) + 3):
        found = [[row.id for row in rows(piece) if row] for piece in cut(wholes, piece_bytes)]
        assert [row_id for ids in found for row_id in ids] == [f"c{i}" for i in range(5)]
        if piece_bytes in ends:
            assert found[0] == [f"c{i}" for i in range(ends.index(piece_bytes) + 1)]


def test_text_is_one_prompt_a_line_and_completions_are_references(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  two \n")
    assert [(chat.number, json.loads(chat.text)) for chat in read(tmp_path / "a.txt")] == [
        (1, "one"),
        (3, "two"),
    ]
    (tmp_path / "a.csv").write_text('question,answer\n"a, b",c\n')
    (chat,) = read(tmp_path / "a.csv", columns={"prompt": "question", "completion": "answer"})
    assert json.loads(chat.text) == {"prompt": "a, b", "completion": "c"}


def test_row_numbers_count_from_the_files_start_in_every_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "MIN_UNIT_BYTES", 100)
    text = lines(ROWS).replace(b"\n", b"\n\n")
    (tmp_path / "a.jsonl").write_bytes(text)
    assert [chat.number for chat in read(tmp_path / "a.jsonl")] == list(range(1, 80, 2))
    (tmp_path / "b.jsonl").write_bytes(text + b"\nno JSON\n")
    with pytest.raises(UserError, match=r"b\.jsonl line 82 is not JSON"):
        read(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_bytes(text + lines([{"id": "c3", "messages": CHATS[0]}]))
    with pytest.raises(UserError, match=r"c\.jsonl row 81 has the id 'c3', and so has another chat"):
        read(tmp_path / "c.jsonl")


BAD_BYTES: dict[str, tuple[bytes, str]] = {
    "a.jsonl": (lines([*ROWS, {"id": "bad", "messages": chat_of("BAD!")}]), "bad"),
    "a.json": (json.dumps([*ROWS, {"id": "bad", "messages": chat_of("BAD!")}]).encode(), "bad"),
    "a.parquet": (parquet([*ROWS, {"id": "bad", "messages": chat_of("BAD!")}]), "bad"),
    "a.csv": (table([{"id": i, "text": i} for i in ("a", "b")]) + b"bad,BAD!\n", "bad"),
    "a.txt": (b"a\nb\nBAD!\n", ""),
    "ids.jsonl": (lines([*ROWS, {"id": "BAD!", "messages": chat_of("x")}]), ""),
    "ids.csv": (table([{"id": i, "text": i} for i in ("a", "b")]) + b"BAD!,text\n", ""),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bytes_that_are_not_utf8_are_a_fault_of_their_row_alone(name: str, tmp_path: Path) -> None:
    """Nor do they cost the row its id, unless they are in it."""
    content, row_id = BAD_BYTES[name]
    (tmp_path / name).write_bytes(content.replace(b"BAD!", b"\xff\xfe(\xc3"))
    *good, bad = read(tmp_path / name)
    assert good
    assert not [chat for chat in good if chat.error]
    assert bad.error
    assert bad.error.startswith("not UTF-8")
    assert bad.id == row_id or (not row_id and len(bad.id) == 16)


def test_a_csv_row_of_another_shape_is_a_fault_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\na,one\nb,two,three\n\nc\nd,four\n")
    assert [(chat.number, chat.error) for chat in read(tmp_path / "a.csv")] == [
        (1, None),
        (2, "wrong shape: 3 cells under 2 names"),
        (4, "wrong shape: 1 cells under 2 names"),
        (5, None),
    ]


# -------------------------------------------------------------------------------------------- where chats are


def files_of(config: DataConfig) -> dict[str, list[str]]:
    return {
        split: [Path(file).name for source in each for file in source.files]
        for split, each in data.find_sources(config).items()
    }


def test_globs_and_lists_keep_their_order(tmp_path: Path) -> None:
    for name in ("x-2.jsonl", "x-1.jsonl", "y.jsonl"):
        (tmp_path / name).touch()
    config = DataConfig(train=[str(tmp_path / "y.jsonl"), str(tmp_path / "x-*.jsonl")])
    assert files_of(config) == {"train": ["y.jsonl", "x-1.jsonl", "x-2.jsonl"]}
    with pytest.raises(UserError, match=r"z-\*\.jsonl matches no file"):
        data.find_sources(DataConfig(train=str(tmp_path / "z-*.jsonl")))


def test_a_folder_of_the_hubs_shape_is_read_by_split_and_config(tmp_path: Path) -> None:
    names = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "test")]
    names += ["sql/dev.csv", "sql/train/0.parquet"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert files_of(DataConfig(train=str(tmp_path))) == {
        "train": ["train-00000-of-00001.parquet"],
        "test": ["test-00000-of-00001.parquet"],
    }
    sql = {"uri": str(tmp_path), "config": "sql"}
    assert files_of(DataConfig(train=[sql], test=[{**sql, "split": "dev"}])) == {
        "train": ["0.parquet"],
        "test": ["dev.csv"],
    }
    with pytest.raises(UserError, match=r"has no dev\.json.* in nosql"):
        data.find_sources(DataConfig(train=[{**sql, "config": "nosql", "split": "dev"}]))


class Hub(MemoryFileSystem):
    """Stands in for the hub: what is stored under hf://datasets/..."""

    protocol = "hf"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("hf://").strip("/") if path.strip("/") else ""

    def unstrip_protocol(self, name: str) -> str:
        return f"hf://{name.strip('/')}"


def test_a_data_set_of_the_hub_is_found_at_its_revision_or_as_the_hubs_parquet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(_registry, "hf", Hub)
    hub = Hub()
    for path in (
        "datasets/me/chats/data/train.jsonl",
        "datasets/me/chats@v1/data/train.jsonl",
        "datasets/me/script/load.py",
        "datasets/me/script@refs%2Fconvert%2Fparquet/default/train/0000.parquet",
    ):
        hub.pipe(f"hf://{path}", lines(ROWS) if path.endswith("jsonl") else parquet(ROWS))
    assert data.find_sources(DataConfig(train="hf://me/chats"))["train"][0].files == (
        "hf://datasets/me/chats/data/train.jsonl",
    )
    old = [{"uri": "hf://me/chats", "revision": "v1"}]
    assert data.find_sources(DataConfig(train=old))["train"][0].files == (
        "hf://datasets/me/chats@v1/data/train.jsonl",
    )
    made = data.find_sources(DataConfig(train="hf://datasets/me/script"))["train"]
    assert [(source.name, len(source.files)) for source in made] == [("script", 1)]
    assert len(list(data.chats(DataConfig(train="hf://me/script"), "train"))) == 36
    with pytest.raises(UserError, match="hf://datasets/me/none does not exist, or is not open to you"):
        data.find_sources(DataConfig(train="hf://me/none"))


def test_two_sources_of_one_name_are_refused_and_two_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").touch()
    uris = [str(tmp_path / folder / "train.jsonl") for folder in ("a", "b")]
    assert [source.name for source in data.find_sources(DataConfig(train=uris))["train"]] == uris
    with pytest.raises(UserError, match=r"two sources of data\.train are called x"):
        data.find_sources(DataConfig(train=[{"uri": uri, "name": "x"} for uri in uris]))


# -------------------------------------------------------------------------------------------- weights, ids


def test_a_weight_keeps_a_share_or_repeats(tmp_path: Path) -> None:
    many = [{"id": f"m{i}", "text": f"text {i}"} for i in range(2000)]
    (tmp_path / "a.jsonl").write_bytes(lines(many))
    kept = [chat.id for chat in read(tmp_path / "a.jsonl", weight=0.25)]
    assert 400 < len(kept) < 600
    (tmp_path / "b.jsonl").write_bytes(lines(many[::-1]))
    assert [chat.id for chat in read(tmp_path / "b.jsonl", weight=0.25)] == kept[::-1]
    (tmp_path / "c.jsonl").write_bytes(lines(ROWS[:2]))
    assert [chat.id for chat in read(tmp_path / "c.jsonl", weight=3)] == [
        "c0", "c0#2", "c0#3", "c1", "c1#2", "c1#3",
    ]  # fmt: skip


def slow_ids(given: list[str]) -> list[str]:
    """The rule for equal chats, one by one: the second of an id gets #2, unless another has it."""
    taken: set[str] = set()
    repeats: Counter[str] = Counter()
    ids = []
    for row_id in given:
        unique = row_id
        while unique in taken:
            repeats[row_id] += 1
            unique = f"{row_id}#{repeats[row_id] + 1}"
        taken.add(unique)
        ids.append(unique)
    return ids


def test_ids_of_equal_chats_are_numbered_as_one_by_one(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    for _ in range(60):
        given = numbers.choice(
            ["x", "x#2", "x#3", "x#2#2", "y", "y#4", "z"], numbers.integers(1, 12)
        ).tolist()
        (tmp_path / "a.jsonl").write_bytes(lines([{"id": row_id, "messages": CHATS[0]} for row_id in given]))
        assert [chat.id for chat in read(tmp_path / "a.jsonl")] == slow_ids(given)


# -------------------------------------------------------------------------------------------- filters


def left_out(config: DataConfig) -> tuple[set[str], dict[str, int]]:
    """Ids kept for training, and the others by reason."""
    plan = data.make_plan(data.find_sources(config), config)
    chats = [chat for shard in render.shards_of(plan, {}) for chat in render.kept_chats(shard)]
    kept = {chat.id for chat in chats if chat.split == "train"}
    return kept, dict(sum(plan.left_out["train"].values(), Counter()))


FILTERS: dict[str, tuple[dict[str, Any], set[str], dict[str, int]]] = {
    "none": ({}, {"long", "greek", "plain", "same", "digits"}, {}),
    "short": ({"min_characters": 5}, {"long", "greek", "plain", "same"}, {"filtered: too few characters": 1}),
    "long": (
        {"max_characters": 100},
        {"greek", "plain", "same", "digits"},
        {"filtered: too many characters": 1},
    ),
    "script": ({"scripts": ["latin"]}, {"long", "plain", "same", "digits"}, {"filtered: another script": 1}),
    "keep": ({"keep_pattern": "^(?i:p)lain"}, {"plain", "same"}, {"filtered: keep_pattern not found": 3}),
    "drop": (
        {"drop_pattern": r"\d"},
        {"long", "greek", "plain", "same"},
        {"filtered: drop_pattern found": 1},
    ),
    "equal": ({"dedup": "exact"}, {"long", "greek", "plain", "digits"}, {"filtered: equal to another": 1}),
}


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_counts_what_it_leaves_out(name: str, tmp_path: Path) -> None:
    options, kept, reasons = FILTERS[name]
    plain = {"plain": "plain words", "same": "plain words"}
    chats = {"long": "long " * 30, "greek": "ένα δύο τρία yes", **plain, "digits": "1234"}
    (tmp_path / "a.jsonl").write_bytes(
        lines([{"id": row_id, "text": text} for row_id, text in chats.items()])
    )
    (tmp_path / "test.jsonl").write_bytes(lines(ROWS[:3]))
    config = DataConfig(train=str(tmp_path / "a.jsonl"), test=str(tmp_path / "test.jsonl"), filters=options)
    if name == "keep":  # the same for test, which has to keep some
        config = config.model_copy(update={"test": config.train})
    assert left_out(config) == (kept, reasons)


def test_near_dedup_drops_small_changes_and_keeps_other_texts(tmp_path: Path) -> None:
    numbers = np.random.default_rng(1)
    words = [f"w{i}" for i in range(500)]
    texts = {f"t{i}": " ".join(numbers.choice(words, 120)) for i in range(60)}
    changed = {f"{row_id}'": f"{text[:300].upper()}  {text[300:]} indeed" for row_id, text in texts.items()}
    (tmp_path / "a.jsonl").write_bytes(lines([{"id": i, "text": t} for i, t in {**texts, **changed}.items()]))
    (tmp_path / "test.jsonl").write_bytes(lines(ROWS[:3]))
    paths = {"train": str(tmp_path / "a.jsonl"), "test": str(tmp_path / "test.jsonl")}
    kept, reasons = left_out(DataConfig(**paths, filters={"dedup": "near"}))
    assert kept == set(texts)
    assert reasons == {"filtered: nearly equal to another": 60}


def test_bands_of_equal_texts_agree_by_the_share_of_runs_in_common() -> None:
    """The chance that one band agrees is similarity ** 12; what few texts share must not be more."""
    numbers = np.random.default_rng(2)
    share, similarity = [], []
    for _ in range(40):
        text = "".join(numbers.choice(list("abcdefghij"), 400))
        other = text[:380] + "".join(numbers.choice(list("klmnopqrst"), 20))
        runs = [{t[i : i + 8] for i in range(len(t) - 7)} for t in (text, other)]
        similarity.append(len(runs[0] & runs[1]) / len(runs[0] | runs[1]))
        share.append((filters.bands(text) == filters.bands(other)).mean())
    expected = np.mean(np.array(similarity) ** 12)
    assert abs(np.mean(share) - expected) < 0.1  # 320 bands: a standard error of 0.03


def test_what_test_users_say_is_not_trained_on(tmp_path: Path) -> None:
    sentence = "please tell me which of all these many rivers flows north into the cold sea"
    train = {
        "inside": f"well now, {sentence.upper()}, thanks",
        "short": "how many?",
        "other": "which river flows south into the warm sea",
    }
    (tmp_path / "a.jsonl").write_bytes(lines([{"id": i, "messages": chat_of(t)} for i, t in train.items()]))
    (tmp_path / "b.jsonl").write_bytes(
        lines([{"messages": chat_of(sentence)}, {"messages": chat_of("How many")}])
    )
    paths = {"train": str(tmp_path / "a.jsonl"), "test": str(tmp_path / "b.jsonl")}
    kept, reasons = left_out(DataConfig(**paths, filters={"decontaminate": True}))
    assert kept == {"other"}
    assert reasons == {"filtered: also in test or out_of_domain": 2}
    assert left_out(DataConfig(**paths))[0] == set(train)


def test_decontamination_knows_a_test_split_that_comes_off_train(tmp_path: Path) -> None:
    """Chats of one question and other answers land on either side."""
    chats = [[chat_of(f"question {i % 20}")[0], {"role": "assistant", "content": f"{i}"}] for i in range(200)]
    (tmp_path / "a.jsonl").write_bytes(lines(chats))
    config = DataConfig(train=str(tmp_path / "a.jsonl"), num_test=5, filters={"decontaminate": True})
    questions = {
        split: {json.loads(chat.text)[0]["content"] for chat in data.chats(config, split)}
        for split in ("train", "test")
    }
    assert questions["train"]
    assert not questions["train"] & questions["test"]


def test_filters_that_leave_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    config = DataConfig(train=str(tmp_path / "a.jsonl"), filters={"min_characters": 10**6})
    assert left_out(config) == (set(), {"filtered: too few characters": 40})


# -------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    "name", ["lines", "lines, packed", "list", "parquet", "csv with newlines in cells", "sharegpt"]
)
def test_a_sample_of_a_small_source_counts_it(name: str, tmp_path: Path) -> None:
    """The oracle renders by hand: four tokens around each message, a quarter of a token for each character."""
    file_name, content, _ = FILES[name]
    (tmp_path / file_name).write_bytes(content)
    config = run_config(tmp_path, tmp_path, train=str(tmp_path / file_name))
    (source,) = data.find_sources(config.data)["train"]
    found = sample.take(source, config, sample.counter(None))
    assert found
    if name.startswith("csv"):
        assert not found.is_counted
        return
    assert (found.is_counted, found.num_chats, found.num_rows) == (True, 40, 40)
    assert found.prompt_tokens == pytest.approx(sum(8 - (-len(question) // 4) for question in QUESTIONS))
    assert found.mean_reply == pytest.approx(sum(1 - (-len(chat[1]["content"]) // 4) for chat in CHATS) / 40)


def test_a_large_source_is_judged_by_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "COUNTED_BYTES", 10_000)
    monkeypatch.setattr(sample, "HEAD_BYTES", 500_000)
    many = lines([{"id": f"r{i:05}", "text": f"text {i:05}"} for i in range(90_000)])
    for name, content, tolerance in (("a.jsonl", many, 0.01), ("a.jsonl.gz", gzip.compress(many, 1), 0.5)):
        (tmp_path / name).write_bytes(content)
        config = run_config(tmp_path, tmp_path, train=[{"uri": str(tmp_path / name), "weight": 0.5}])
        (source,) = data.find_sources(config.data)["train"]
        found = sample.take(source, config, sample.counter(None))
        assert found
        assert not found.is_counted
        assert found.num_chats == pytest.approx(45_000, rel=tolerance)  # what is packed is read in blocks
        assert found.mean_reply is None


# -------------------------------------------------------------------------------------------- the stage


def run_config(tmp_path: Path, base: Path, **options: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"output": str(tmp_path / "out"), "model": {"base": str(base)}, "data": options}
    )


def prompts(config: RunConfig, split: str = "train") -> list[dict[str, Any]]:
    folder = f"{config.artifact('prompts')}/{split}"
    return [row for name in parts.names(folder) for row in parts.read(folder, name).to_pylist()]


Write = Callable[[list[Any]], bytes]
POISON: dict[str, tuple[str, Write]] = {"jsonl": ("a.jsonl", lines), "parquet": ("a.parquet", parquet)}
MARK = "BAD!"  # becomes bytes that are not UTF-8


def poisoned(i: int) -> tuple[Any, str | None]:
    """Content of the i-th chat's only message, and the reason that it is set aside for."""
    kinds = {
        7: ("y" * 5000, "too long"), 107: ("", "empty"), 207: (f"{MARK} text", "not UTF-8"), 307: (None, "wrong type"),
    }  # fmt: skip
    return kinds.get(i % 400, (f"question {i}", None))


@pytest.mark.ray
@pytest.mark.parametrize("name", POISON)
def test_one_row_in_a_hundred_is_poisoned_and_the_rest_untouched(
    name: str, ray_cluster: None, tiny_base: Path, tmp_path: Path
) -> None:
    """Beside those: a message that is null, messages that are null, and in JSON messages that are a number."""
    file_name, write = POISON[name]
    values = [{"id": f"r{i}", "messages": [{"role": "user", "content": poisoned(i)[0]}]} for i in range(2000)]
    expected = Counter(reason for i in range(2000) if (reason := poisoned(i)[1]))
    values[50]["messages"] = [None]
    values[51]["messages"] = None
    expected += Counter({"wrong type": 1, "no messages": 1})
    if name == "jsonl":
        values[52]["messages"] = 3
        values[53]["messages"][0]["content"] = {"text": [None]}
        expected["wrong type"] += 2
    content = write(values).replace(MARK.encode(), b"\xff\xfe\xc3\x28")
    (tmp_path / file_name).write_bytes(content)
    (tmp_path / "test.jsonl").write_bytes(lines(ROWS[:3]))
    config = run_config(
        tmp_path,
        tiny_base,
        train=str(tmp_path / file_name),
        test=str(tmp_path / "test.jsonl"),
        max_prompt_tokens=300,
    )
    data.run(config)
    found = prompts(config)
    assert [row["id"] for row in found] == [f"r{i}/0" for i in range(2000)]
    assert Counter(row["error"].split(":")[0] for row in found if row["error"]) == expected
    good = {i: row for i, row in enumerate(found) if not row["error"]}
    assert all(row["messages"] == [{"role": "user", "content": f"question {i}"}] for i, row in good.items())
    record = provenance.read(config.artifact("prompts"))
    assert record
    assert record["chats"]["train"] == {
        file_name: {"in": 2000, "good": 2000 - expected.total(), "set_aside": dict(expected)}
    }


@pytest.mark.ray
def test_sources_and_reasons_add_up_and_units_change_nothing(
    ray_cluster: None, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([*ROWS, {"id": "bad", "messages": []}]))
    (tmp_path / "b.txt").write_text("".join(f"line {i}\n" for i in range(30)))
    options: dict[str, Any] = {
        "train": [str(tmp_path / "a.jsonl"), {"uri": str(tmp_path / "b.txt"), "name": "text", "weight": 0.5}],
        "filters": {"drop_pattern": "question 3,"},
        "num_test": 4,
    }
    config = run_config(tmp_path, tiny_base, **options)
    data.run(config)
    whole = {split: prompts(config, split) for split in ("train", "test")}
    record = provenance.read(config.artifact("prompts"))
    assert record
    counts = record["chats"]
    num_in = sum(found["in"] for split in counts.values() for found in split.values())
    assert num_in == 41 + 30
    for split in ("train", "test"):
        for source, found in counts[split].items():
            assert found["in"] == found["good"] + sum(found["set_aside"].values())
            assert found["good"] == sum(row["source"] == source and not row["error"] for row in whole[split])
    assert counts["train"]["a.jsonl"]["set_aside"] == {"no messages": 1, "filtered: drop_pattern found": 1}
    assert 5 < counts["train"]["text"]["set_aside"]["left out: weight"] < 25

    monkeypatch.setattr(choose, "MIN_UNIT_BYTES", 200)
    monkeypatch.setattr(data, "SMALL_BYTES", 0)
    again = run_config(tmp_path / "again", tiny_base, **options)
    data.run(again)
    assert {split: prompts(again, split) for split in ("train", "test")} == whole
    assert len(parts.names(f"{again.artifact('prompts')}/train")) > 10


@pytest.mark.ray
def test_parts_that_are_there_are_not_rendered_again(
    ray_cluster: None, tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        lines([{"id": f"r{i}", "messages": chat_of(f"q {i}")} for i in range(3000)])
    )
    config = run_config(tmp_path, tiny_base, train=str(tmp_path / "a.jsonl"))
    folder = Path(data.run(config))
    before, record = prompts(config), provenance.read(str(folder))
    (folder / "provenance.json").unlink()
    (folder / "train" / "part-000001.parquet").unlink()
    kept = (folder / "train" / "part-000000.parquet").stat().st_mtime_ns
    data.run(config)
    assert (folder / "train" / "part-000000.parquet").stat().st_mtime_ns == kept
    assert prompts(config) == before
    again = provenance.read(str(folder))
    assert again
    assert record
    assert (again["splits"], again["chats"]) == (record["splits"], record["chats"])


@pytest.mark.ray
def test_exported_prompts_are_the_text_of_their_tokens(
    ray_cluster: None, tiny_base: Path, tmp_path: Path
) -> None:
    """The original's text field lacked the generation prompt, so that load generators asked something else."""
    (tmp_path / "a.jsonl").write_bytes(
        lines([*ROWS[:12], {"messages": []}, {"id": "bare", "text": "once upon"}])
    )
    paths = {"train": str(tmp_path / "a.jsonl"), "test": str(tmp_path / "a.jsonl")}
    config = run_config(tmp_path, tiny_base, **paths)
    with pytest.raises(UserError, match="Run the data stage first"):
        export.run(config)
    data.run(config)
    assert export.run(config) == {"train": 13, "test": 13}
    written = [json.loads(line) for line in (tmp_path / "out" / "export" / "train.jsonl").open()]
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    good = {row["id"]: row for row in prompts(config) if not row["error"]}
    assert [row["id"] for row in written] == list(good)
    for row in written:
        assert (
            tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] == good[row["id"]]["prompt_ids"]
        )
        assert row["messages"] == good[row["id"]]["messages"]
    assert written[0]["prompt"].endswith("<|assistant|>")
    assert export.run(config, "test", str(tmp_path / "elsewhere")) == {"test": 13}
    with pytest.raises(UserError, match=r"has no split 'tset', but \['train', 'test'\]"):
        export.run(config, "tset")


def test_input_that_changes_between_the_passes_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(ROWS))
    config = DataConfig(train=str(file), test=str(file))
    plan = data.make_plan(data.find_sources(config), config)
    renamed = lines(ROWS).replace(b"c39", b"c38")
    for changed in (lines(ROWS[:-1]), lines(ROWS) + lines(ROWS[:1]), renamed, b"no JSON\n"):
        file.write_bytes(changed)
        with pytest.raises(UserError, match=r"a\.jsonl changed while it was read"):
            [chat for shard in render.shards_of(plan, {}) for chat in render.kept_chats(shard)]


def test_units_are_pieces_in_order() -> None:
    pieces = [data.reading.Piece("s", f"f{i}", "jsonl", size) for i, size in enumerate((4, 4, 1, 30, 2, 9))]
    units = scan.deal(pieces, 10)
    assert [piece for unit in units for piece in unit] == pieces
    assert [[piece.size for piece in unit] for unit in units] == [[4, 4, 1], [30], [2], [9]]
