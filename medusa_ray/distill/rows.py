"""Rows of prompts/ -> rows of distilled/, and parts of them that say what they cost.

Each part carries its own figures, so that a run that was killed and went on accounts for all that it wrote.
"""

import hashlib
import json
import threading
from collections import Counter
from typing import Any

import pyarrow as pa

from medusa_ray import parts, records, shards

Row = dict[str, Any]
Facts = dict[str, Any]  # numbers, and dicts of them

FACTS = b"facts"  # in a part's schema metadata


class Prompts:
    """prompts/train, for the threads of one process."""

    def __init__(self, prompts: str) -> None:
        self.folder = f"{prompts}/train"
        self._lock = threading.Lock()
        self._newest: tuple[str, pa.Table] | None = None  # shards of one file come one after the other

    def of(self, shard: shards.Shard) -> list[Row]:
        with self._lock:
            if self._newest is None or self._newest[0] != shard["source"]:
                self._newest = shard["source"], parts.read(self.folder, shard["source"], self._columns(shard))
            table = self._newest[1]
        return table.slice(shard["start"], shard["length"]).to_pylist()

    def _columns(self, shard: shards.Shard) -> list[str]:
        wanted = {"id", "source", "prompt_ids", "reference", "reference_ids", "error"}
        return [name for name in parts.schema(self.folder, shard["source"]).names if name in wanted]


def reply(
    prompt: Row,
    reply_ids: list[int] | None = None,
    finish_reason: str | None = None,
    error: str | None = None,
    sample: int = 0,
) -> Row:
    """A row of DISTILLED."""
    return {
        "id": f"{prompt['id']}/{sample}",
        "prompt_ids": prompt["prompt_ids"],
        "reply_ids": reply_ids or [],
        "finish_reason": finish_reason,
        "error": error,
    }


def sources_of(prompts: list[Row]) -> list[str]:
    """Where each prompt's chat came from."""
    return [prompt.get("source") or "train" for prompt in prompts]


def seed_of(seed: int, row_id: str, sample: int = 0) -> int:
    """The seed of one reply, wherever and whenever it is generated; 63 bits."""
    # The first sample is what it would be as the only one.
    name = f"{seed}/{row_id}/{sample}" if sample else f"{seed}/{row_id}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1


def write(folder: str, part: str, rows: list[Row], sources: list[str], **cost: Any) -> Facts:
    """Writes a part of distilled/ and returns its facts. sources: of each row. cost: further facts."""
    facts = {**_facts(rows, sources), **cost}
    table = pa.Table.from_pylist(rows, records.DISTILLED.with_metadata({FACTS: json.dumps(facts)}))
    parts.write(folder, part, table)
    return facts


def read_facts(folder: str, part: str) -> Facts:
    """The facts of a part, none of its rows read."""
    return dict(json.loads(parts.schema(folder, part).metadata[FACTS]))


def add(total: Facts, more: Facts) -> None:
    """Adds number by number."""
    for name, value in more.items():
        if isinstance(value, dict):
            add(total.setdefault(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value


def _facts(rows: list[Row], sources: list[str]) -> Facts:
    counts: Facts = {"in": 0, "good": 0, "errors": {}}
    by_source: dict[str, Facts] = {}
    for row, source in zip(rows, sources, strict=True):
        error = row["error"]
        one = {"in": 1, "good": int(error is None), "errors": {error.split(":")[0]: 1} if error else {}}
        add(counts, one)
        add(by_source.setdefault(source, {}), one)
    good = [row for row in rows if row["error"] is None]
    return {
        "rows": counts,
        "sources": by_source,
        "finish_reasons": dict(Counter(row["finish_reason"] for row in good)),
        "num_prompt_tokens": sum(len(row["prompt_ids"]) for row in good),
        "num_reply_tokens": sum(len(row["reply_ids"]) for row in good),
    }
