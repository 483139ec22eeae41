"""Chats from anywhere -> prompt rows: messages rendered to token ids, a row for each turn to be answered.

A chat that comes in comes out: as prompts, or as one row whose `error` says why not. What cannot be a file of
chats at all (not JSON, rows of another shape, two chats under one id) is refused before anything is written.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from medusa_ray import parts, provenance, records, shards
from medusa_ray.config import DataConfig, RunConfig, UserError

if TYPE_CHECKING:
    from medusa_ray.chat import Chat, Message

LOG = logging.getLogger("medusa_ray")

CHATS_PER_PART = 1024
PARTS_PER_PROCESS = 6  # rendering so many parts takes as long as starting a process with a tokenizer in it
TOO_LONG = "too long"  # begins the error of such a row
ROLES = ("system", "user", "assistant", "tool")
MAX_TEST_SHARE = 0.1  # of train, when there is no test file
EXPECTED = (
    'Expected {"messages": [{"role", "content"}, ...]}, a bare list of messages, {"prompt"} or {"text"}.'
)

Messages = list["Message"]


def run(config: RunConfig) -> str:
    """Writes prompts/<split>/*.parquet and returns the URI of prompts/. Rows keep the order of their chats.

    Raises UserError for input that cannot be used; then nothing is written.
    """
    folder = config.artifact("prompts")
    sources = find_sources(config.data)
    settings = {
        "revision": config.model.revision,
        **config.data.model_dump(exclude={"train", "test", "out_of_domain"}),
    }
    inputs = {split: ",".join(map(provenance.digest, files)) for split, files in sources.items()}
    inputs["base"] = provenance.digest(config.model.base)
    if provenance.is_complete(folder, settings, inputs):
        return folder

    refs = [shards.put(shard) for shard in plan(sources, config.data)]
    parts.begin(folder, provenance.key(settings, inputs))
    make_worker = functools.partial(Renderer, parts.absolute(folder), shards.base_of(config.model), config)
    try:
        results = shards.run("data", refs, make_worker, **shards.tasks(len(refs), PARTS_PER_PROCESS))
        splits = _count(results, sources, config.data.over_long)
    except UserError:
        parts.clear(folder)
        raise
    for split, counts in splits.items():
        LOG.info("stage=data split=%s chats=%d rows=%d good=%d errors=%s", split, *list(counts.values())[:4])
    provenance.write(folder, settings, inputs, sources=sources, splits=splits)
    return folder


def _count(
    results: Iterator[dict[str, Any]], sources: dict[str, list[str]], over_long: str
) -> dict[str, dict[str, Any]]:
    """Row counts by split. Raises UserError when a split has no good row, or one too long that must not be."""
    splits: dict[str, dict[str, Any]] = {}
    firsts: dict[str, tuple[int, str]] = {}  # by split, its first bad chat
    too_long: dict[str, tuple[int, str]] = {}  # and its first that is too long
    for result in results:
        empty = {"in": 0, "rows": 0, "good": 0, "errors": {}, "longest_prompt_tokens": 0}
        counts = splits.setdefault(result["split"], empty)
        for name in ("in", "rows", "good"):
            counts[name] += result[name]
        counts["errors"] = dict(Counter(counts["errors"]) + Counter(result["errors"]))
        most = max(counts["longest_prompt_tokens"], result["longest_prompt_tokens"])
        counts["longest_prompt_tokens"] = most
        for found, first in ((firsts, result["first_error"]), (too_long, result["first_too_long"])):
            if first:
                found[result["split"]] = min(tuple(first), found.get(result["split"], (2**63, "")))
    if too_long and over_long == "error":
        split = min(too_long)
        number, error = too_long[split]
        raise UserError(
            f"{_named(sources.get(split) or sources['train'])} row {number} is {error}. Allow more, or set "
            "data.over_long to truncate or skip, which leave such rows out."
        )
    for split in {*sources, "test"}:
        if not splits[split]["good"]:
            number, error = firsts[split]
            file = _named(sources.get(split) or sources["train"])
            raise UserError(
                f"{file}: none of {splits[split]['in']} chats for {split} can be used. "
                f"The first, row {number}, has this fault: {error}. {EXPECTED}"
            )
    return splits


# -------------------------------------------------------------------------------------------- where chats are


def find_sources(data: DataConfig) -> dict[str, list[str]]:
    """Files of each split; no entry for test when it has to be split off train.

    Raises UserError when a file is missing or a folder does not tell which it is.
    """
    sources = {"train": _files(data.train, "train")}
    test = _files(data.test, "test") if data.test else _files(data.train, "test", or_none=True)
    if test:
        sources["test"] = test
    if data.out_of_domain:
        sources["out_of_domain"] = _files(data.out_of_domain, "test")
    return {split: files for split, files in sources.items() if files}


def _files(uri: str, split: str, or_none: bool = False) -> list[str]:
    """The file, or a folder's files of that split. `or_none`: an empty list where a folder has none."""
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
        if filesystem.isfile(path):
            return [] if or_none else [filesystem.unstrip_protocol(path)]
        if not filesystem.isdir(path):
            raise UserError(f"{uri} does not exist. Give data.{split} a file or folder of chats, or a URI.")
        listed = sorted(filesystem.ls(path, detail=False))
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        message = f"{uri} cannot be read: {error}. Give data.{split} a file or folder of chats."
        raise UserError(message) from error
    # train.jsonl, and the hub's train-00000-of-00002.parquet
    pattern = re.compile(rf"{split}(-.*)?\.(json|jsonl|parquet)(\.gz)?")
    files = {os.path.basename(file): filesystem.unstrip_protocol(file) for file in listed}
    kinds = {name: match[2] for name in files if (match := pattern.fullmatch(name))}
    if not kinds and not or_none:
        raise UserError(f"{uri} has no {split}.json, .jsonl or .parquet; it holds {list(files)[:8]}.")
    if len(set(kinds.values())) > 1:
        raise UserError(f"{uri} has {sorted(kinds)}: which is meant? Give data.{split} one of the files.")
    return [files[name] for name in kinds]


# ------------------------------------------------------------------------------------------- reading chats


@dataclass(frozen=True)
class Row:
    """One chat of a file."""

    number: int  # line or row, from 1
    id: str
    digest: str  # of its content
    chat: str  # JSON of its messages, or of its bare text
    error: str | None


def plan(sources: dict[str, list[str]], data: DataConfig) -> Iterator[shards.Shard]:
    """Reads every chat and deals them out in parts, in order. Raises UserError at a row that is no chat."""
    rows: dict[str, Iterator[Row]] = {split: read_chats(files) for split, files in sources.items()}
    if "test" not in sources:
        last_held_out = _held_out(sources["train"], data.num_test)
        rows["train"] = (row for row in rows["train"] if row.digest > last_held_out)
        rows["test"] = (row for row in read_chats(sources["train"]) if row.digest <= last_held_out)
    for split in rows:
        limit = data.num_train if split == "train" else data.num_test
        kept = itertools.islice(rows[split], limit)
        for index in itertools.count():
            part = list(itertools.islice(kept, CHATS_PER_PART))
            if not part:
                break
            columns = {
                name: [getattr(row, name) for row in part] for name in ("number", "id", "chat", "error")
            }
            yield {"split": split, "part": parts.part_name(index), **columns}


def _held_out(files: list[str], num_test: int | None) -> str:
    """The last digest that belongs to test. Equal chats have equal digests, so they stay on one side."""
    digests = sorted(row.digest for row in read_chats(files))
    most = max(1, int(len(digests) * MAX_TEST_SHARE))
    last = digests[min(num_test or most, most) - 1]
    if last == digests[-1]:
        raise UserError(
            f"{_named(files)} has {len(set(digests))} different chats, too few to hold some out as test. "
            "Add chats, or set data.test."
        )
    return last


def read_chats(files: list[str]) -> Iterator[Row]:
    """Every chat of the files, under an id of its own.

    Without an id a chat is named by its content; equal ids of equal chats get `#2` and so on. Raises
    UserError for a file that is unreadable or empty, and for a row that is no chat or whose id another has.
    """
    digests: dict[str, str] = {}  # by id
    repeats: Counter[str] = Counter()
    for file in files:
        for number, value in _values(file):
            chat, given_id, error = _chat(value, f"{file} row {number}")
            text = json.dumps(chat, sort_keys=True, default=str)
            digest = hashlib.sha256(text.encode()).hexdigest()
            row_id = digest[:16] if given_id in (None, "") else str(given_id)
            if digests.get(row_id, digest) != digest:
                raise UserError(
                    f"{file} row {number} has the id {row_id!r}, and so has another chat. "
                    "Make ids unique, or leave them out."
                )
            unique = row_id
            while unique in digests:
                repeats[row_id] += 1
                unique = f"{row_id}#{repeats[row_id] + 1}"
            digests[unique] = digest
            yield Row(number, unique, digest, text, error)
    if not digests:
        raise UserError(f"{_named(files)} is empty. {EXPECTED}")


def _chat(value: Any, where: str) -> tuple[Any, Any, str | None]:
    """A row's messages or bare text, its id if it has one, and why it cannot be used, if so."""
    if isinstance(value, bytes):
        return value.hex(), None, "not UTF-8"
    if isinstance(value, list):
        return value, None, _fault_of_messages(value)
    if isinstance(value, dict):
        if "messages" in value:
            return value["messages"], value.get("id"), _fault_of_messages(value["messages"])
        for name in ("prompt", "text"):
            if name in value:
                return value[name], value.get("id"), _fault_of_text(value[name], f"the {name}")
    found = f"the keys {sorted(value)}" if isinstance(value, dict) else f"a {type(value).__name__}"
    raise UserError(f"{where} has no messages, but {found}. {EXPECTED}")


def _fault_of_messages(messages: Any) -> str | None:
    if not messages:
        return "no messages"
    if not isinstance(messages, list):
        return f"wrong type: messages is a {type(messages).__name__}, expected a list"
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"wrong type: message {i} is a {type(message).__name__}, expected role and content"
        if message.get("role") not in ROLES:
            return (
                f"wrong role: message {i} has the role {message.get('role')!r}, expected {', '.join(ROLES)}"
            )
        fault = _fault_of_text(message.get("content"), f"the content of message {i}")
        if fault and not (message["role"] == "system" and message.get("content") == ""):
            return fault
    return _fault_of_order([message["role"] for message in messages])


def _fault_of_order(roles: list[str]) -> str | None:
    """Templates render turns in any order, most of them, but no model was trained on all of it."""
    for i, role in enumerate(roles):
        before = roles[i - 1] if i else "the start"
        is_known = {
            "system": before in ("the start", "system"),
            "user": before != "user",
            "assistant": before in ("user", "tool"),
            "tool": before in ("assistant", "tool"),
        }
        if not is_known[role]:
            return f"wrong order: message {i} is of role {role} after {before}"
    return None


def _fault_of_text(text: Any, name: str) -> str | None:
    if not isinstance(text, str):
        return f"wrong type: {name} is a {type(text).__name__}, expected text"
    if not text.strip():
        return f"empty: {name} has no text"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"not Unicode: {name} has half of a surrogate pair"
    return None


# ------------------------------------------------------------------------------------------- reading files


def _values(file: str) -> Iterator[tuple[int, Any]]:
    """Number and value of each row; the raw line where it is not UTF-8. Raises UserError naming the row."""
    read = _parquet_values if re.search(r"\.parquet(\.gz)?$", file) else _json_values
    try:
        with fsspec.open(file, "rb", compression="infer") as stream:
            yield from read(stream, file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read: {error}. {EXPECTED}") from error


def _parquet_values(stream: Any, file: str) -> Iterator[tuple[int, Any]]:
    table = pq.ParquetFile(stream)
    present = table.schema_arrow.names
    columns = [name for name in ("id", "messages", "prompt", "text") if name in present]
    if columns in ([], ["id"]):
        raise UserError(f"{file} has no messages, but the columns {present}. {EXPECTED}")
    values = (value for batch in table.iter_batches(columns=columns) for value in batch.to_pylist())
    yield from enumerate(values, 1)


def _json_values(stream: Any, file: str) -> Iterator[tuple[int, Any]]:
    """A JSON list, or one JSON value a line. The suffix does not tell: many a .json holds lines."""
    start = stream.read(256).lstrip(b"\xef\xbb\xbf \t\r\n")
    stream.seek(0)
    if start.startswith(b"[") and re.search(r"\.json(\.gz)?$", file):
        values = _parse(stream.read().removeprefix(b"\xef\xbb\xbf"), file)
        yield from enumerate(values, 1)
        return
    for number, line in enumerate(stream, 1):
        if line := line.removeprefix(b"\xef\xbb\xbf").strip():
            try:
                line.decode()
            except UnicodeDecodeError:
                yield number, line
                continue
            yield number, _parse(line, f"{file} line {number}")


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"{where} is not JSON: {error}. Expected a JSON list of chats, or one chat a line."
        raise UserError(message) from error


def _named(files: list[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


# ------------------------------------------------------------------------------------------- rendering


class Renderer:
    """A part of chats -> the same part of prompts, on disk."""

    def __init__(self, folder: str, base: str, config: RunConfig) -> None:
        from medusa_ray.chat import Chat  # here and not above: the driver reads chats and needs no tokenizer

        self.folder, self.data = folder, config.data
        try:
            self.chat = Chat.load(base, config.model.revision)
            self.chat.check_vocabulary(base, config.model.revision)
        except (OSError, ValueError) as error:
            message = (
                f"the tokenizer of {base} cannot be loaded: {error}. Set model.base to a model with one."
            )
            raise UserError(message) from error

    def __call__(self, shard: shards.Shard) -> dict[str, Any]:
        chats = zip(shard["id"], shard["chat"], shard["error"], strict=True)
        rows_by_chat = [prompt_rows(self.chat, *chat, self.data) for chat in chats]
        rows = [row for chat_rows in rows_by_chat for row in chat_rows]
        table = pa.Table.from_pylist(rows, records.PROMPTS)
        parts.write(self.folder, f"{shard['split']}/{shard['part']}", table)
        bad = [
            (number, row["error"])
            for number, chat_rows in zip(shard["number"], rows_by_chat, strict=True)
            for row in chat_rows
            if row["error"]
        ]
        return {
            "split": shard["split"],
            "in": len(rows_by_chat),
            "rows": len(rows),
            "good": len(rows) - len(bad),
            "errors": Counter(error.split(":")[0] for _, error in bad),
            "first_error": bad[0] if bad else None,
            "first_too_long": next((row for row in bad if row[1].startswith(TOO_LONG)), None),
            "longest_prompt_tokens": max((len(row["prompt_ids"]) for row in rows), default=0),
        }


def prompt_rows(
    chat: "Chat", chat_id: str, text: str, error: str | None, data: DataConfig
) -> list[dict[str, Any]]:
    """Rows of PROMPTS for one chat: one for each turn to be answered, or a single one with an error."""
    turns: list[tuple[Messages | None, str | None]] = []
    content = json.loads(text)
    if error is None and isinstance(content, str):
        turns = [(None, None)]
    elif error is None:
        messages = [{"role": message["role"], "content": message["content"]} for message in content]
        turns = _turns(messages)
        error = None if turns else "no turn: there is no message of a user's to answer"
    if error is not None:
        return [_row(f"{chat_id}/0", None, error=error)]
    # Where all tokens are labels, the last turn holds the others.
    numbered = list(enumerate(turns))[0 if data.loss_on == "assistant" else -1 :]
    return [
        _render(chat, f"{chat_id}/{turn}", messages, content, reference, data.max_prompt_tokens)
        for turn, (messages, reference) in numbered
    ]


def _turns(messages: Messages) -> list[tuple[Messages | None, str | None]]:
    """What comes before each assistant turn, with that turn; what is left unanswered at the end has none."""
    turns: list[tuple[Messages | None, str | None]] = [
        (messages[:i], message["content"]) for i, message in enumerate(messages) if message["role"] == "assistant"
    ]
    if messages[-1]["role"] in ("user", "tool"):
        turns.append((messages, None))
    return turns


def _render(
    chat: "Chat",
    row_id: str,
    messages: Messages | None,
    text: str,
    reference: str | None,
    max_prompt_tokens: int,
) -> dict[str, Any]:
    try:
        prompt_ids = chat.text_ids(text) if messages is None else chat.prompt_ids(messages)
    except ValueError as error:
        return _row(row_id, messages, reference, error=f"template refuses: {error}")
    if not prompt_ids:
        return _row(row_id, messages, reference, error="empty: the tokenizer makes no tokens of the prompt")
    if len(prompt_ids) > max_prompt_tokens:
        fault = f"{TOO_LONG}: {len(prompt_ids)} tokens, over data.max_prompt_tokens = {max_prompt_tokens}"
        return _row(row_id, messages, reference, error=fault)
    reference_ids = None
    if messages is not None and reference is not None:
        try:
            reference_ids = chat.reply_ids(messages, reference, prompt_ids)
        except ValueError:  # the prompt is good all the same; only distill.replies: given needs these ids
            reference_ids = None
    return _row(row_id, messages, reference, prompt_ids, reference_ids)


def _row(
    row_id: str,
    messages: Messages | None,
    reference: str | None = None,
    prompt_ids: list[int] | None = None,
    reference_ids: list[int] | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    return {
        "id": row_id, "messages": messages, "prompt_ids": prompt_ids or [], "reference": reference,
        "reference_ids": reference_ids, "error": error,
    }  # fmt: skip
