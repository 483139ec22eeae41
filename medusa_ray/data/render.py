"""The second pass: the kept chats of a unit -> parts of prompts/, a row for each turn to be answered."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from medusa_ray import parts, records
from medusa_ray.config import DataConfig, ModelConfig, UserError
from medusa_ray.data import scan
from medusa_ray.data.chats import Refusal
from medusa_ray.data.choose import KEEP, Plan
from medusa_ray.data.reading import rows

if TYPE_CHECKING:
    from medusa_ray.chat import Chat

CHATS_PER_PART = 1024
TOO_LONG = "too long"  # begins the error of such a row

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Kept:
    """One chat that becomes prompts."""

    split: str
    id: str
    source: str
    file: str
    number: int  # line or row of the file, from 1
    text: str  # JSON of the chat
    error: str | None


def shards_of(plan: Plan, done: dict[str, set[str]]) -> list[dict[str, Any]]:
    """What workers are sent, for each unit with chats. done: by split, the parts that are there already."""
    shards = []
    next_part = dict.fromkeys(plan.keeps, 0)
    for index, unit in enumerate(plan.units):
        keeps = {split: plan.keeps[split][index] for split in plan.keeps if len(plan.keeps[split][index])}
        if not keeps:
            continue
        names: dict[str, list[str]] = {}
        for split, keep in keeps.items():
            first = next_part[split]
            next_part[split] += -(-len(keep) // CHATS_PER_PART)
            names[split] = [parts.part_name(part) for part in range(first, next_part[split])]
        facts = {
            "line_offsets": plan.line_offsets[index],
            "seal": plan.seals[index],
            "parts": names,
            "done": {split: sorted(done.get(split, set()) & set(names[split])) for split in names},
        }
        shards.append(scan.shard_of(index, unit, **keeps) | {"facts": json.dumps(facts)})
    return shards


def kept_chats(shard: dict[str, Any]) -> Iterator[Kept]:
    """The chats of a unit that are kept, in order. Raises UserError when its rows are not those of the first pass."""
    facts, seal, place = json.loads(shard["facts"]), scan.Seal(), 0
    waiting = {split: iter(np.frombuffer(shard[split], KEEP).tolist()) for split in facts["parts"]}
    heads = {split: next(keeps, None) for split, keeps in waiting.items()}
    try:
        for piece, offset in zip(scan.pieces_of(shard), facts["line_offsets"], strict=True):
            for row in rows(piece):
                if row is None:
                    continue
                seal.add(row)
                for split, keeps in waiting.items():
                    while (head := heads[split]) is not None and head[0] == place:
                        row_id = f"{row.id}#{head[1]}" if head[1] else row.id
                        number = offset + row.number
                        yield Kept(split, row_id, piece.source, piece.file, number, row.text, row.error)
                        heads[split] = next(keeps, None)
                place += 1
    except Refusal as error:
        raise UserError(scan.changed(shard)) from error
    if seal.value != facts["seal"]:
        raise UserError(scan.changed(shard))


class Renderer:
    """A unit -> parts of prompts on disk, and what is in them."""

    def __init__(self, folder: str, base: str, model: ModelConfig, data: DataConfig) -> None:
        from medusa_ray.chat import Chat  # here and not above: the driver needs no tokenizer

        self.folder, self.data = folder, data
        try:
            self.chat = Chat.load(base, model.revision)
            self.chat.check_vocabulary(base, model.revision)
        except (OSError, ValueError) as error:
            message = (
                f"the tokenizer of {base} cannot be loaded: {error}. Set model.base to a model with one."
            )
            raise UserError(message) from error

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        facts = json.loads(shard["facts"])
        names = {split: iter(facts["parts"][split]) for split in facts["parts"]}
        waiting: dict[str, list[Kept]] = {split: [] for split in names}
        summaries: dict[str, dict[str, Any]] = {}
        for chat in kept_chats(shard):
            part = waiting[chat.split]
            part.append(chat)
            if len(part) == CHATS_PER_PART:
                name = next(names[chat.split])
                self._write(part, name, name in facts["done"][chat.split], summaries)
                part.clear()
        for split, part in waiting.items():
            if part:
                name = next(names[split])
                self._write(part, name, name in facts["done"][split], summaries)
        return {"unit": shard["unit"], "splits": summaries}

    def _write(
        self, chats: list[Kept], name: str, is_done: bool, summaries: dict[str, dict[str, Any]]
    ) -> None:
        """One part, where it is not there already, and adds what is in it to the summary of its split."""
        split = chats[0].split
        if is_done:
            table = parts.read(f"{self.folder}/{split}", name, ["id", "prompt_ids", "source", "error"])
        else:
            made = [
                row | {"source": chat.source}
                for chat in chats
                for row in prompt_rows(self.chat, chat.id, chat.text, chat.error, self.data)
            ]
            table = pa.Table.from_pylist(made, records.PROMPTS)
            parts.write(self.folder, f"{split}/{name}", table)
        empty = {"in": 0, "rows": 0, "good": 0, "errors": {}, "longest_prompt_tokens": 0, "sources": {}}
        add(summaries.setdefault(split, empty), summary(table, chats))


def summary(table: pa.Table, chats: list[Kept]) -> dict[str, Any]:
    """What a part holds. A chat counts as good for its source when all its rows are."""
    errors = dict(zip(table["id"].to_pylist(), table["error"].to_pylist(), strict=True))
    bad = {row_id: error for row_id, error in errors.items() if error}
    of_chat: dict[str, str] = {}  # the first error of each chat with one
    for row_id, error in bad.items():
        of_chat.setdefault(row_id.rpartition("/")[0], error)
    sources: dict[str, Counter[str]] = {}
    first_error = first_too_long = None
    for chat in chats:
        error = of_chat.get(chat.id)
        sources.setdefault(chat.source, Counter())[error.split(":")[0] if error else "good"] += 1
        if error and first_error is None:
            first_error = (chat.file, chat.number, error)
        if error and first_too_long is None and error.startswith(TOO_LONG):
            first_too_long = (chat.file, chat.number, error)
    lengths = table["prompt_ids"].combine_chunks().value_lengths().to_pylist()
    return {
        "in": len(chats),
        "rows": len(table),
        "good": len(table) - len(bad),
        "errors": Counter(error.split(":")[0] for error in bad.values()),
        "longest_prompt_tokens": max(lengths, default=0),
        "sources": sources,
        "first_error": first_error,
        "first_too_long": first_too_long,
    }


def add(counts: dict[str, Any], more: dict[str, Any]) -> None:
    """Adds one summary to another, of parts in their order."""
    for name in ("in", "rows", "good"):
        counts[name] += more[name]
    counts["errors"] = dict(Counter(counts["errors"]) + Counter(more["errors"]))
    most = max(counts["longest_prompt_tokens"], more["longest_prompt_tokens"])
    counts["longest_prompt_tokens"] = most
    for source, reasons in more["sources"].items():
        counts["sources"][source] = dict(Counter(counts["sources"].get(source, {})) + Counter(reasons))
    for name in ("first_error", "first_too_long"):
        counts[name] = counts.get(name) or more[name]


@dataclass(frozen=True)
class Turn:
    """One thing to be answered: messages, or bare text."""

    number: int  # within its chat
    messages: Messages | None  # all that comes before the answer
    text: str
    reference: str | None  # the chat's own answer


def turns_of(chat: Any, loss_on: str) -> list[Turn]:
    """The turns of a good chat that are answered: each assistant's, and what is left unanswered at the end."""
    if isinstance(chat, dict):
        return [Turn(0, None, chat["prompt"], chat["completion"])]
    if isinstance(chat, str):
        return [Turn(0, None, chat, None)]
    messages = [{"role": message["role"], "content": message["content"]} for message in chat]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [Turn(number, messages[:i], "", messages[i]["content"]) for number, i in enumerate(answers)]
    if messages[-1]["role"] in ("user", "tool"):
        turns.append(Turn(len(turns), messages, "", None))
    # Where all tokens are labels, the last turn holds the others.
    return turns if loss_on == "assistant" else turns[-1:]


def prompt_rows(
    chat: "Chat", chat_id: str, text: str, error: str | None, data: DataConfig
) -> list[dict[str, Any]]:
    """Rows of PROMPTS for one chat: one for each turn to be answered, or a single one with an error."""
    turns = turns_of(json.loads(text), data.loss_on) if error is None else []
    if not turns:
        error = error or "no turn: there is no message of a user's to answer"
        return [_row(f"{chat_id}/0", None, error=error)]
    return [_render(chat, f"{chat_id}/{turn.number}", turn, data.max_prompt_tokens) for turn in turns]


def _render(chat: "Chat", row_id: str, turn: Turn, max_prompt_tokens: int) -> dict[str, Any]:
    messages, text, reference = turn.messages, turn.text, turn.reference
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
    if reference is not None:
        try:
            if messages is None:
                reference_ids = chat.completion_ids(text, reference, prompt_ids)
            else:
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
