"""prompts/ -> JSON lines for load generators: each good prompt as text, the generation prompt included."""

import json
from typing import Any

import fsspec

from medusa_ray import parts, provenance, shards
from medusa_ray.chat import Chat
from medusa_ray.config import RunConfig, UserError

COLUMNS = ["id", "messages", "prompt_ids", "error"]


def run(config: RunConfig, split: str | None = None, out: str | None = None) -> dict[str, int]:
    """Writes out/<split>.jsonl of {"prompt", "messages", "id"}, and returns the number of lines by split.

    split: all of them by default. out: the run's export/ by default. Raises UserError when prompts/ is not finished
    or has no such split.
    """
    prompts, out = config.artifact("prompts"), (out or config.artifact("export")).rstrip("/")
    record = provenance.read(prompts)
    if record is None:
        raise UserError(f"{prompts} is not finished. Run the data stage first.")
    splits = list(record["splits"])
    if split and split not in splits:
        raise UserError(f"{prompts} has no split {split!r}, but {splits}. Name one of these.")
    base = shards.base_of(config.model)
    try:
        chat = Chat.load(base, config.model.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer of {base} cannot be loaded: {error}. Set model.base.") from error
    return {
        name: _write(chat, f"{prompts}/{name}", f"{out}/{name}.jsonl")
        for name in ([split] if split else splits)
    }


def _write(chat: Chat, prompts: str, file: str) -> int:
    filesystem, path = fsspec.core.url_to_fs(file)
    number = 0
    try:
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        with filesystem.open(path, "w", encoding="utf-8") as lines:
            for name in parts.names(prompts):
                for row in parts.read(prompts, name, COLUMNS).to_pylist():
                    if row["error"] is None:
                        lines.write(json.dumps(_line(chat, row), ensure_ascii=False) + "\n")
                        number += 1
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error}. Set --out to a place that can be.") from error
    return number


def _line(chat: Chat, row: dict[str, Any]) -> dict[str, Any]:
    """Bare text is given back as it was tokenized, without what the tokenizer put before it."""
    messages = row["messages"]
    text = chat.text(row["prompt_ids"]) if messages is None else chat.prompt_text(messages)
    return {"prompt": text, "messages": messages, "id": row["id"]}
