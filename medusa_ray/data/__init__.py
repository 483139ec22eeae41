"""Chats from anywhere -> prompt rows: messages rendered to token ids, a row for each turn to be answered.

A chat that comes in comes out: as prompts, or as one row whose `error` says why not, or it is counted by the reason
why it was left out. What cannot be a file of chats at all (not JSON, rows of another shape, two chats under one id)
is refused before anything is written.

The files are read twice, a piece at a time by Ray Data: `scan` makes a few numbers of each row, `choose` decides by
them, `render` writes what is kept.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from medusa_ray import parts, provenance
from medusa_ray.config import DataConfig, RunConfig, UserError
from medusa_ray.data.chats import EXPECTED
from medusa_ray.data.choose import Plan, here, make_plan
from medusa_ray.data.render import Kept, Renderer, add, kept_chats, prompt_rows, shards_of
from medusa_ray.data.sources import Source, all_files, digest, find_sources, named

__all__ = ["Kept", "chats", "find_sources", "make_plan", "prompt_rows", "run"]

LOG = logging.getLogger("medusa_ray")

SMALL_BYTES = 2**23  # of all inputs: the driver looks at them faster than it has others do so
UNITS_PER_PROCESS = 4  # rendering so many takes as long as starting a process with a tokenizer in it


def run(config: RunConfig) -> str:
    """Writes prompts/<split>/*.parquet and returns the URI of prompts/. Rows keep the order of their chats.

    Raises UserError for input that cannot be used; then nothing is written.
    """
    folder = config.artifact("prompts")
    sources = find_sources(config.data)
    settings = {
        "revision": config.model.revision,
        **config.data.model_dump(exclude={"train", "test", "out_of_domain"}),
        "sources": {
            split: [
                (source.name, source.format, source.weight, source.columns.model_dump()) for source in each
            ]
            for split, each in sources.items()
        },
    }
    inputs = {split: ",".join(map(digest, all_files(each))) for split, each in sources.items()}
    inputs["base"] = provenance.digest(config.model.base)
    if provenance.is_complete(folder, settings, inputs):
        return folder

    from medusa_ray import shards  # here and not above: who only reads chats needs no Ray

    plan = make_plan(sources, config.data, _by_ray)
    parts.begin(folder, provenance.key(settings, inputs))
    done = {split: set(parts.names(f"{folder}/{split}")) for split in plan.keeps}
    blocks = [shards.block(shard) for shard in shards_of(plan, done)]
    base = shards.base_of(config.model)
    make_worker = functools.partial(Renderer, parts.absolute(folder), base, config.model, config.data)
    try:
        results = shards.run("data", blocks, make_worker, **shards.tasks(len(blocks), UNITS_PER_PROCESS))
        splits, by_source = _count(results, plan, sources, config.data.over_long)
    except parts.StorageError:
        raise
    except UserError:
        parts.clear(folder)
        raise
    for split, counts in splits.items():
        LOG.info("stage=data split=%s chats=%d rows=%d good=%d errors=%s", split, *list(counts.values())[:4])
    files = {split: list(all_files(each)) for split, each in sources.items()}
    provenance.write(folder, settings, inputs, sources=files, splits=splits, chats=by_source)
    return folder


def chats(data: DataConfig, split: str) -> Iterator[Kept]:
    """The chats of a split, in this process and without a file. Raises UserError for input that cannot be used."""
    for shard in shards_of(make_plan(find_sources(data), data), {}):
        yield from (chat for chat in kept_chats(shard) if chat.split == split)


def _by_ray(work: list[dict[str, Any]], make_worker: Callable[[], Any], num_bytes: int) -> Iterable[Any]:
    """A pass in the cluster's processes, or in this one where there is little to read."""
    from medusa_ray import shards

    if num_bytes <= SMALL_BYTES:
        return here(work, make_worker, num_bytes)
    blocks = [shards.block(shard) for shard in work]
    return shards.run("data", blocks, make_worker, **shards.tasks(len(blocks), UNITS_PER_PROCESS))


def _count(
    results: Iterator[dict[str, Any]], plan: Plan, sources: dict[str, list[Source]], over_long: str
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Counts by split, of rows and then of chats by source.

    Raises UserError when a split has no good row, or one too long that must not be.
    """
    empty = {"in": 0, "rows": 0, "good": 0, "errors": {}, "longest_prompt_tokens": 0}
    splits: dict[str, dict[str, Any]] = {split: {**empty, "sources": {}} for split in plan.keeps}
    for result in sorted(results, key=lambda result: result["unit"]):
        for split, found in result["splits"].items():
            add(splits[split], found)
    by_source: dict[str, dict[str, Any]] = {}
    for split, counts in splits.items():
        files = named(sources.get(split) or sources["train"])
        rendered = counts.pop("sources")
        first_error, first_too_long = counts.pop("first_error", None), counts.pop("first_too_long", None)
        by_source[split] = {
            source: _accounted(Counter(rendered.get(source, {})), left_out)
            for source, left_out in plan.left_out[split].items()
        }
        if first_too_long and over_long == "error":
            file, number, error = first_too_long
            raise UserError(
                f"{file} row {number} is {error}. Allow more, or set data.over_long to truncate or skip, which leave "
                "such rows out."
            )
        if not counts["in"]:
            raise UserError(
                f"{files}: no chat is left for {split}; set aside are {by_source[split]}. Loosen data.filters or the "
                "weights of sources."
            )
        if not counts["good"]:
            _, number, error = first_error
            raise UserError(
                f"{files}: none of {counts['in']} chats for {split} can be used. "
                f"The first, row {number}, has this fault: {error}. {EXPECTED}"
            )
    return splits, by_source


def _accounted(rendered: Counter[str], left_out: Counter[str]) -> dict[str, Any]:
    """Chats of one source: in = good + set aside."""
    good = rendered.pop("good", 0)
    set_aside = dict(rendered + left_out)
    return {"in": good + sum(set_aside.values()), "good": good, "set_aside": set_aside}
