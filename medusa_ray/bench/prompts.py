"""Files of chats or of templated text -> the prompts of a benchmark, and whether the heads were trained on them."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow.parquet as pq

from medusa_ray import parts, records
from medusa_ray.config import UserError

Messages = list[dict[str, str]]

NEAR_WORDS = 13  # in a row, as data.filters.decontaminate has it
EXPECTED = (
    '{"messages": [{"role": ..., "content": ...}, ...]}, such a list alone, {"text": ...} or {"prompt": ...}'
)


@dataclass(frozen=True)
class Prompt:
    """What one request asks: a chat that the server puts into its template, or text that is sent as it is."""

    asked: Messages | str
    category: str | None = None

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.asked, str)

    @property
    def user_text(self) -> str:
        """What the user says; all of a text, in which nobody can tell who speaks."""
        if isinstance(self.asked, str):
            return self.asked
        return "\n".join(message["content"] for message in self.asked if message["role"] == "user")


def read_prompts(uris: list[str]) -> list[Prompt]:
    """The prompts of all files, a row of each in turns; chats up to the reply that is asked for.

    Raises UserError when there are none, or when some are chats and others text.
    """
    per_uri = [_read(uri) for uri in uris]
    prompts = [
        prompt for taken in itertools.zip_longest(*per_uri) for prompt in taken if prompt is not None
    ]
    if len({prompt.is_chat for prompt in prompts}) > 1:
        raise UserError(
            f"{', '.join(uris)} hold both chats and templated text, which go to different endpoints: no figure would "
            "mean anything. Give prompts of one kind."
        )
    return prompts


def _read(uri: str) -> list[Prompt]:
    filesystem, path = fsspec.core.url_to_fs(uri)
    if filesystem.isdir(path):
        files = [f"{uri.rstrip('/')}/{name}.parquet" for name in parts.names(uri)]
    elif filesystem.isfile(path):
        files = [uri]
    else:
        raise UserError(
            f"prompts is {uri!r}, but nothing is there. Run `medusa-ray data`, or give a file of chats."
        )
    prompts = [prompt for file in files for prompt in _prompts_in(file)]
    if not prompts:
        raise UserError(
            f"{uri} holds no chats to send; expected rows of {EXPECTED}, and of a folder, in Parquet."
        )
    return prompts


def _prompts_in(file: str) -> Iterator[Prompt]:
    name = re.sub(r"\.(gz|bz2|xz|zst)$", "", file)
    if name.endswith(".parquet"):
        with fsspec.open(file, "rb") as opened:
            table = pq.read_table(opened)
        if "prompt_ids" in table.column_names:  # a split of ours, some of whose rows are not to be sent
            for row in records.check_columns(table, records.PROMPTS, file).to_pylist():
                if row["error"] is None and row["messages"]:
                    yield Prompt(row["messages"], row["source"])
            return
        rows: Iterable[tuple[str, Any]] = ((f"row {i}", row) for i, row in enumerate(table.to_pylist(), 1))
    else:
        with fsspec.open(file, "r", encoding="utf-8", compression="infer") as opened:
            rows = list(_rows_in(opened.read(), file, is_lines=not name.endswith(".json")))
    for where, row in rows:
        yield _prompt_of(row, f"{file}, {where},")


def _rows_in(text: str, file: str, is_lines: bool) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of JSON lines, or of one JSON list."""
    lines = [(f"line {i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    for where, part in lines if is_lines else [("the whole", text)]:
        try:
            found = json.loads(part)
        except ValueError as error:
            raise UserError(f"{file}, {where}, is no chat ({error!r}); expected was {EXPECTED}.") from error
        if is_lines:
            yield where, found
        else:
            yield from ((f"row {i}", row) for i, row in enumerate(found if isinstance(found, list) else [found], 1))


def _prompt_of(row: Any, where: str) -> Prompt:
    category = row.get("source") or row.get("category") if isinstance(row, dict) else None
    try:
        asked = row if isinstance(row, list) else row.get("messages") or row.get("text") or row["prompt"]
        if isinstance(asked, str):
            return Prompt(asked, category)
        messages = [{"role": str(message["role"]), "content": str(message["content"])} for message in asked]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{where} is no chat ({error!r}); expected was {EXPECTED}.") from error
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise UserError(f"{where} has nothing to answer: no message stands before the assistant's.")
    return Prompt(messages, category)


def overlap(prompts: list[Prompt], training: list[Prompt]) -> dict[str, Any]:
    """How many prompts are among the training chats, and how many more have words in a row with one.

    exact: the same but for white space. near: the user says NEAR_WORDS in a row that a user of training says, or the
    whole of something shorter.
    """
    known, runs = {_plain(prompt) for prompt in training}, set[int]()
    for prompt in training:
        runs |= _runs(prompt)
    is_exact = [_plain(prompt) in known for prompt in prompts]
    is_near = [bool(_runs(prompt) & runs) for prompt in prompts]
    num_near = sum(near and not exact for exact, near in zip(is_exact, is_near, strict=True))
    return {"checked": True, "exact": sum(is_exact), "near": num_near, "of": len(prompts)}


def _plain(prompt: Prompt) -> str:
    return " ".join(json.dumps(prompt.asked).split())


def _runs(prompt: Prompt) -> set[int]:
    """Hashes of the runs of words, which take less room than the words."""
    words = re.findall(r"\w+", prompt.user_text.lower())
    last = max(len(words) - NEAR_WORDS, 0)
    return {hash(tuple(words[i : i + NEAR_WORDS])) for i in range(last + 1)}
