"""Rows in equal rows out: every chat comes out once, as prompts or with the reason why not."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medusa_ray import data, parts, provenance, records, shards
from medusa_ray.chat import Chat
from medusa_ray.config import DataConfig, RunConfig, UserError
from medusa_ray.data.chats import parse


def chat_of(question: str, answer: str | None = "yes") -> list[dict[str, str]]:
    messages = [{"role": "user", "content": question}]
    return messages + ([{"role": "assistant", "content": answer}] if answer else [])


def write_lines(path: Path, values: list[Any]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def read(file: Path | str, **options: Any) -> list[data.Kept]:
    """All chats of a file that is train and test at once, so that nothing is held out."""
    source = {"uri": str(file), **options}
    return list(data.chats(DataConfig(train=[source], test=[source]), "train"))


CHATS = [chat_of(f"question {i}") for i in range(12)]
ROWS = [{"messages": chat} for chat in CHATS]

# -------------------------------------------------------------------------------------------- files


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


FORMATS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "json list": ("a.json", lambda path: path.write_text(json.dumps(ROWS, indent=1))),
    "bare list of message lists": ("a.json", lambda path: path.write_text(json.dumps(CHATS))),
    "lines": ("a.jsonl", lambda path: write_lines(path, ROWS)),
    "lines of bare message lists": ("a.jsonl", lambda path: write_lines(path, CHATS)),
    "lines in a .json": ("a.json", lambda path: write_lines(path, ROWS)),
    "lines with a byte order mark": ("a.jsonl", lambda p: p.write_bytes(b"\xef\xbb\xbf" + json_lines(ROWS))),
    "lines, packed": ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(json_lines(ROWS)))),
    "parquet": ("a.parquet", lambda path: write_parquet(path, ROWS)),
}


def json_lines(values: list[Any]) -> bytes:
    return "\n".join(map(json.dumps, values)).encode() + b"\n\n"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_chats(name: str, tmp_path: Path) -> None:
    file_name, write = FORMATS[name]
    write(tmp_path / file_name)
    rows = read(tmp_path / file_name)
    assert [json.loads(row.text) for row in rows] == CHATS
    assert [row.number for row in rows] == list(range(1, 13))
    assert not any(row.error for row in rows)
    assert len({row.id for row in rows}) == 12


def test_bare_text_comes_as_prompt_or_text(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"prompt": "one", "id": 7}, {"text": "two"}])
    rows = read(file)
    assert [json.loads(row.text) for row in rows] == ["one", "two"]
    assert rows[0].id == "7"


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"a\.jsonl is empty. Expected"),
    "only blank lines": (b"\n\n  \n", "is empty"),
    "not JSON": (b'{"messages": []}\nhello\n', r"a\.jsonl line 2 is not JSON: .* Expected a JSON list"),
    "cut off": (json_lines(ROWS)[:-9], r"line 12 is not JSON"),
    "nested too deeply": (b"[" * 100_000, "line 1 is not JSON"),
    "another shape": (
        json_lines([ROWS[0], {"dialogue": []}]),
        r"row 2 has no messages, but the keys \['dialogue'\]. Expected",
    ),
    "numbers": (b"3\n", "row 1 has no messages, but a int"),
    "two chats of one id": (
        json_lines([{"id": "x", **ROWS[0]}, {"id": "x", **ROWS[1]}]),
        "row 2 has the id 'x', and so has another chat",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_file_of_chats_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.jsonl")


def test_parquet_that_is_damaged_or_has_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
        read(tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", [{"question": "?"}])
    with pytest.raises(UserError, match=r"the columns \['question'\]"):
        read(tmp_path / "b.parquet")


def test_the_same_chat_twice_gets_two_ids(tmp_path: Path) -> None:
    given_ids = [{"id": row_id, **ROWS[0]} for row_id in ("x", "x", "x#2")]
    rows = [*given_ids, ROWS[1], ROWS[1], ROWS[1]]
    ids = [row.id for row in read(write_lines(tmp_path / "a.jsonl", rows))]
    assert len(set(ids)) == len(ids) == 6
    assert ids[:2] == ["x", "x#2"]
    assert ids[4:] == [f"{ids[3]}#2", f"{ids[3]}#3"]


def test_ids_depend_on_content_and_not_on_place_or_format(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", ROWS)
    second = write_lines(tmp_path / "b.jsonl", CHATS[::-1])
    assert [row.id for row in read(first)] == [row.id for row in read(second)][::-1]


# -------------------------------------------------------------------------------------------- where chats are


def test_a_folder_means_its_train_and_test_files(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test.jsonl", "README.md"):
        (tmp_path / name).touch()
    sources = data.find_sources(DataConfig(train=str(tmp_path)))
    files = {split: [file for source in each for file in source.files] for split, each in sources.items()}
    assert {split: [Path(file).name for file in each] for split, each in files.items()} == {
        "train": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        "test": ["test.jsonl"],
    }


def test_a_path_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json does not exist. Give data\.train"):
        data.find_sources(DataConfig(train=str(tmp_path / "nowhere.json")))
    with pytest.raises(UserError, match=r"has no train\.json"):
        data.find_sources(DataConfig(train=str(tmp_path)))
    with pytest.raises(UserError, match=r"nosuch://x cannot be read"):
        data.find_sources(DataConfig(train="nosuch://x"))


def test_two_candidates_in_a_folder_are_not_guessed_between(tmp_path: Path) -> None:
    (tmp_path / "train.json").touch()
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(UserError, match="which is meant"):
        data.find_sources(DataConfig(train=str(tmp_path)))


# -------------------------------------------------------------------------------------------- splits


def dealt(file: str, **options: Any) -> dict[str, list[str]]:
    config = DataConfig(train=file, **options)
    return {split: [chat.id for chat in data.chats(config, split)] for split in ("train", "test")}


def test_without_a_test_file_a_tenth_is_held_out_whatever_the_order(tmp_path: Path) -> None:
    chats = [chat_of(f"question {i}") for i in range(100)]
    forward = dealt(write_lines(tmp_path / "a.jsonl", chats))
    backward = dealt(write_lines(tmp_path / "b.jsonl", chats[::-1]))
    assert len(forward["train"]) == 90
    assert len(forward["test"]) == 10
    assert set(forward["test"]) == set(backward["test"])
    assert not set(forward["test"]) & set(forward["train"])
    assert len(dealt(write_lines(tmp_path / "a.jsonl", chats), num_test=4)["test"]) == 4


def test_equal_chats_are_never_on_both_sides(tmp_path: Path) -> None:
    chats = [chat_of(f"question {i % 10}") for i in range(100)]
    sides = dealt(write_lines(tmp_path / "a.jsonl", chats))
    train, test = ({row_id.split("#")[0] for row_id in sides[split]} for split in ("train", "test"))
    assert len(train) == 9
    assert len(test) == 1
    assert not train & test
    assert sum(map(len, sides.values())) == 100


def test_a_single_chat_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too few to hold some out"):
        dealt(write_lines(tmp_path / "a.jsonl", ROWS[:1]))


def test_limits_keep_the_first_rows_of_each_split(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", ROWS)
    test = write_lines(tmp_path / "test.jsonl", ROWS[::-1])
    sides = dealt(train, test=test, num_train=5, num_test=3)
    ids = [row.id for row in read(train)]
    assert sides == {"train": ids[:5], "test": ids[:-4:-1]}


# -------------------------------------------------------------------------------------------- prompts

TALK = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


@pytest.fixture(scope="module")
def chat(tiny_base: Path) -> Chat:
    return Chat.load(str(tiny_base))


def prompts(chat: Chat, value: Any, **options: Any) -> list[dict[str, Any]]:
    content, _, error = parse(value, "here", 1)
    return data.prompt_rows(chat, "c", json.dumps(content), error, DataConfig(train="-", **options))


def test_loss_on_assistant_makes_a_row_of_every_answer_and_of_an_open_question(chat: Chat) -> None:
    rows = prompts(chat, [*TALK, {"role": "user", "content": "e"}], loss_on="assistant")
    assert [(row["id"], len(row["messages"]), row["reference"]) for row in rows] == [
        ("c/0", 2, "b"), ("c/1", 4, "d"), ("c/2", 6, None),
    ]  # fmt: skip
    assert rows[0]["prompt_ids"] == chat.prompt_ids(TALK[:2])
    assert rows[1]["reference_ids"] == chat.reply_ids(TALK[:4], "d")
    assert rows[2]["reference_ids"] is None


def test_loss_on_last_or_all_takes_the_same_row_that_loss_on_assistant_ends_with(chat: Chat) -> None:
    last = prompts(chat, TALK, loss_on="assistant")[-1:]
    assert prompts(chat, TALK, loss_on="last") == prompts(chat, TALK, loss_on="all") == last


def test_bare_text_is_not_rendered_as_a_chat(chat: Chat) -> None:
    (row,) = prompts(chat, {"prompt": "once upon"})
    assert row["prompt_ids"] == chat.text_ids("once upon")
    assert (row["id"], row["messages"], row["reference"]) == ("c/0", None, None)


FAULTS: dict[str, Any] = {
    "no messages": {"messages": []},
    "no messages ": {"messages": None},
    "wrong type: messages is a str, expected a list": {"messages": "hello"},
    "wrong type: message 0 is a str, expected role and content": ["hello"],
    "wrong role: message 0 has the role 'bot', expected system, user, assistant, tool": [
        {"role": "bot", "content": "x"}
    ],
    "wrong type: the content of message 0 is a list, expected text": [{"role": "user", "content": [1]}],
    "wrong type: the prompt is a int, expected text": {"prompt": 3},
    "empty: the content of message 0 has no text": [{"role": "user", "content": " "}],
    "not Unicode: the prompt has half of a surrogate pair": {"prompt": "\ud83d"},
    "no turn: there is no message of a user's to answer": [{"role": "system", "content": "x"}],
    "wrong order: message 0 is of role assistant after the start": [{"role": "assistant", "content": "x"}],
    "wrong order: message 1 is of role user after user": [{"role": "user", "content": "x"}] * 2,
    "wrong order: message 2 is of role assistant after assistant": chat_of("x") + chat_of("x")[1:],
    "wrong order: message 1 is of role system after user": [
        {"role": "user", "content": "x"},
        {"role": "system", "content": "x"},
    ],
    "empty: the content of message 1 has no text": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": ""},
    ],
    "not UTF-8": b"\xff\xfe",
    "too long: 1024 tokens, over data.max_prompt_tokens = 9": [{"role": "user", "content": "x" * 1020}],
}


@pytest.mark.parametrize("error", FAULTS)
def test_a_chat_that_cannot_be_used_is_one_row_with_its_reason(chat: Chat, error: str) -> None:
    (row,) = prompts(chat, FAULTS[error], max_prompt_tokens=9)
    assert row["error"] == error.strip()
    assert row["prompt_ids"] == []
    assert row["reference_ids"] is None
    pa.Table.from_pylist([row], records.PROMPTS)


def test_a_template_that_refuses_is_a_reason_of_the_row(tiny_base: Path) -> None:
    chat = Chat.load(str(tiny_base))
    chat.tokenizer.chat_template = "{{ raise_exception('no') }}"
    (row,) = prompts(chat, ROWS[0])
    assert row["error"].startswith("template refuses: ")


# -------------------------------------------------------------------------------------------- the stage


def config_of(tmp_path: Path, base: Path | str, **options: Any) -> RunConfig:
    options = {"output": str(tmp_path / "out"), "model": {"base": str(base)}, "data": options}
    return RunConfig.model_validate(options)


@pytest.mark.ray
def test_every_chat_comes_out_once(ray_cluster: None, tiny_base: Path, tmp_path: Path) -> None:
    bad = [{"messages": []}, [{"role": "user", "content": "long " * 100}]]
    config = config_of(
        tmp_path,
        tiny_base,
        train=write_lines(tmp_path / "train.jsonl", [*ROWS[:6], *bad, *ROWS[6:]]),
        test=write_lines(tmp_path / "test.jsonl", ROWS[:4]),
        out_of_domain=write_lines(tmp_path / "other.jsonl", [{"text": "far away"}]),
        max_prompt_tokens=100,
        num_test=3,
    )
    folder = data.run(config)
    tables = {
        split: parts.read(f"{folder}/{split}", "part-000000") for split in data.find_sources(config.data)
    }
    assert all(table.schema == records.PROMPTS for table in tables.values())
    assert [row["messages"] and row["messages"][0]["content"] for row in tables["train"].to_pylist()] == [
        *[f"question {i}" for i in range(6)], None, "long " * 100, *[f"question {i}" for i in range(6, 12)],
    ]  # fmt: skip
    longest = max(map(len, tables["train"]["prompt_ids"].to_pylist()))
    assert provenance.read(folder)["splits"] == {
        "train": {
            "in": 14, "rows": 14, "good": 12, "errors": {"no messages": 1, "too long": 1},
            "longest_prompt_tokens": longest,
        },
        "test": {"in": 3, "rows": 3, "good": 3, "errors": {}, "longest_prompt_tokens": longest - 1},
        "out_of_domain": {"in": 1, "rows": 1, "good": 1, "errors": {}, "longest_prompt_tokens": 8},
    }  # fmt: skip

    written = provenance.read(folder)["written"]
    assert data.run(config) == folder
    assert provenance.read(folder)["written"] == written
    changed = config.model_copy(update={"data": config.data.model_copy(update={"num_train": 2})})
    data.run(changed)
    assert parts.num_rows(f"{folder}/train", "part-000000") == 2


@pytest.mark.ray
def test_when_no_row_is_good_nothing_is_left(ray_cluster: None, tiny_base: Path, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", [{"messages": []}, {"messages": "x"}])
    config = config_of(tmp_path, tiny_base, train=train, test=write_lines(tmp_path / "test.jsonl", ROWS))
    with pytest.raises(UserError, match=r"train\.jsonl: none of 2 chats for train .* row 1, .*: no messages"):
        data.run(config)
    assert not list((tmp_path / "out").rglob("*.*"))


def test_storage_that_fails_takes_no_finished_part_along(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, tiny_base, train=write_lines(tmp_path / "train.jsonl", ROWS))

    def fail_after_a_part(*_: object, **__: object) -> Iterator[Any]:
        parts.write(f"{config.artifact('prompts')}/train", "part-000000", pa.table({"id": ["a"]}))
        raise parts.StorageError("storage failed: 503")
        yield

    monkeypatch.setattr(shards, "block", lambda shard: shard)
    monkeypatch.setattr(shards, "tasks", lambda *_: {})
    monkeypatch.setattr(shards, "run", fail_after_a_part)
    with pytest.raises(UserError, match="storage failed"):
        data.run(config)
    assert parts.names(f"{config.artifact('prompts')}/train") == ["part-000000"]


@pytest.mark.ray
def test_a_base_without_a_tokenizer_is_the_users_mistake(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "empty_base").mkdir()
    config = config_of(tmp_path, tmp_path / "empty_base", train=write_lines(tmp_path / "train.jsonl", ROWS))
    with pytest.raises(UserError, match=r"the tokenizer of .*empty_base cannot be loaded"):
        data.run(config)


@pytest.mark.ray
def test_a_file_that_is_refused_leaves_earlier_prompts_alone(
    ray_cluster: None, tiny_base: Path, tmp_path: Path
) -> None:
    good = config_of(tmp_path, tiny_base, train=write_lines(tmp_path / "a.jsonl", ROWS))
    data.run(good)
    with pytest.raises(UserError, match="no messages"):
        data.run(config_of(tmp_path, tiny_base, train=write_lines(tmp_path / "b.jsonl", [*ROWS, {"x": 1}])))
    written = provenance.read(good.artifact("prompts"))["written"]
    data.run(good)
    assert provenance.read(good.artifact("prompts"))["written"] == written
