"""Prompts -> what the base itself answers to them, token by token, and the hidden states it passed through.

Ray Data deals shards of prompts to a pool of engines that have no heads, or to one that asks a running server. A shard
becomes one part of distilled/ (and of hidden/, when it is captured) that is whole or absent, and a row draws its noise
from the seed and its own id alone: a run that was killed anywhere goes on with the missing parts and ends with the same
rows.
"""

import functools
import itertools
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np

from medusa_ray import parts, provenance, shards
from medusa_ray.config import RunConfig, UserError
from medusa_ray.distill import attempts, rows
from medusa_ray.distill.given import TEMPLATE, Copier
from medusa_ray.distill.rows import Facts

if TYPE_CHECKING:
    from medusa_ray.distill.generate import LoadEngine

# Generators and askers are imported where they are used: the driver deals shards and needs no model.

MOST_ROWS = (
    512  # of a part, where the config leaves it open: minutes of an actor's work, and files worth opening
)
LEAST_PARTS = 64  # so that actors end together where there are few rows
MOST_PARTS = 250_000  # each costs the driver memory; in a billion rows they are larger
PARTS_PER_PROCESS = 64  # of replies that only have to be copied


def run(config: RunConfig, load_engine: "LoadEngine | None" = None) -> str:
    """Writes distilled/*.parquet, a row for each training prompt and sample in their order, and returns its URI.

    With hidden.mode `capture` the parts of hidden/ are written too; the hidden stage declares them finished.
    load_engine: stands in for Engine.load. Raises UserError when prompts/ is not finished or names a row twice, or
    when distilled/ holds rows of another config.
    """
    prompts, distilled, hidden = (
        parts.absolute(config.artifact(name)) for name in ("prompts", "distilled", "hidden")
    )
    settings, inputs = identity(config)
    if provenance.is_complete(distilled, settings, inputs):
        return config.artifact("distilled")
    made = provenance.read(prompts)
    if made is None:
        raise UserError(f"{prompts} is not finished. Run the data stage first.")

    captured = hidden if config.hidden.mode == "capture" and config.distill.replies == "generate" else None
    done = begin(config, distilled, captured, settings, inputs)
    num_rows = rows_per_part(config, prompts)
    all_shards = list(plan(f"{prompts}/train", max(1, num_rows // config.distill.samples)))
    if len(all_shards) > parts.MOST:
        raise UserError(
            f"distill.rows_per_part is {num_rows}, which makes {len(all_shards):,} files; expected {parts.MOST:,} at "
            "most. Raise it, or leave it out."
        )
    blocks = [shards.block(shard) for shard in all_shards if shard["part"] not in done]
    if blocks:
        _refuse_twins(f"{prompts}/train")
    longest = made["splits"]["train"]["longest_prompt_tokens"]
    make_worker, resources = _workers(
        config, prompts, distilled, captured, longest, len(blocks), num_rows, load_engine
    )
    started_s, ours, total = time.monotonic(), Facts(), Facts()
    for facts in shards.run("distill", blocks, make_worker, **resources):
        rows.add(ours, facts)
    seconds = time.monotonic() - started_s
    earlier = [shard["part"] for shard in all_shards if shard["part"] in done]
    for facts in parts.ahead(lambda part: rows.read_facts(distilled, part), earlier):
        rows.add(total, facts)
    rows.add(total, ours)
    if not total["rows"]["good"]:
        raise UserError(_why_none(config, shards.base_of(config.model), total["rows"]))
    _remove_attempts(distilled)
    provenance.write(distilled, settings, inputs, **_manifest(total, ours, seconds))
    return config.artifact("distilled")


def identity(config: RunConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings and inputs that the rows depend on."""
    free: Any = {"num_actors": True, "gpus_per_actor": True, "accelerator_type": True, "batch_size": True}
    free["server"] = {"url", "api_key_env", "concurrency", "timeout_s", "retries"}
    settings = {
        "model": config.model.model_dump(include={"revision", "dtype", "quantization"}),
        "distill": config.distill.model_dump(exclude=free),
        "over_long": config.data.over_long,
    }
    prompts, base = config.artifact("prompts"), config.model.base
    return settings, {"prompts": provenance.digest(prompts), "base": provenance.digest(base)}


def begin(
    config: RunConfig, distilled: str, captured: str | None, settings: dict[str, Any], inputs: dict[str, str]
) -> set[str]:
    """Makes the folders ready, and names the parts that are done.

    captured: hidden/, where states are captured. Generated rows are dear, so that none is ever removed: raises
    UserError where the config has changed since.
    """
    key = provenance.key(settings, inputs)
    done = parts.begin(distilled, key, {**settings, **inputs}, is_dear=True)
    if captured is None:
        return done
    from medusa_ray.states import settings_of  # here and not above: it loads torch

    states, of = settings_of(config), {"distilled": key}
    # States of rows that are no more are nothing to keep.
    there = parts.begin(captured, provenance.key(states, of), {**states, **of}, is_dear=bool(done))
    # They are written before their rows, so that whoever was killed left none without.
    if bare := done - there:
        raise UserError(
            f"{len(bare)} of {len(done)} parts of {distilled} have no states in {captured}: they were generated with "
            "another hidden.mode. Set hidden.mode to compute, or remove both folders, or set output to another place."
        )
    return done


def rows_per_part(config: RunConfig, prompts: str) -> int:
    """The same for the same config and prompts, whatever runs them."""
    if config.distill.rows_per_part:
        return config.distill.rows_per_part
    folder = f"{prompts}/train"
    num_rows = config.distill.samples * sum(size for _, size in parts.sizes(folder))
    return max(min(MOST_ROWS, -(-num_rows // LEAST_PARTS)), -(-num_rows // MOST_PARTS)) or 1


def plan(prompts: str, most_rows: int) -> Iterator[shards.Shard]:
    """Runs of at most so many consecutive prompts, none across two files: the same ones every time."""
    index = itertools.count()
    for name, num_rows in parts.sizes(prompts):
        for start in range(0, num_rows, most_rows):
            length = min(most_rows, num_rows - start)
            yield {"part": parts.part_name(next(index)), "source": name, "start": start, "length": length}


def _workers(
    config: RunConfig,
    prompts: str,
    distilled: str,
    captured: str | None,
    longest_prompt_tokens: int,
    num_shards: int,
    num_rows: int,
    load_engine: "LoadEngine | None",
) -> tuple[shards.MakeWorker, dict[str, Any]]:
    """Who makes the replies, and how many of them. num_rows: of a part."""
    base, settings = shards.base_of(config.model), config.distill
    if settings.replies == "given":
        copier = functools.partial(Copier, config, base, prompts, distilled)
        return copier, shards.tasks(num_shards, PARTS_PER_PROCESS)
    if settings.server is not None:
        from medusa_ray.distill.http import Asker

        # Two rounds of requests wait, so that as many as may are in flight.
        at_a_time = 1 + -(-2 * settings.server.concurrency // num_rows)
        return (
            functools.partial(Asker, config, base, prompts, distilled),
            shards.actors(1, num_shards, "cpu", at_a_time=at_a_time),
        )
    from medusa_ray.distill.generate import Generator, shards_at_a_time

    device = shards.device_of(config.model)
    generator = functools.partial(
        Generator,
        config,
        base,
        device,
        longest_prompt_tokens,
        prompts,
        distilled,
        captured,
        load_engine,
        uuid.uuid4().hex,
    )
    return generator, shards.actors(
        settings.num_actors,
        num_shards,
        device,
        settings.gpus_per_actor if device == "cuda" else 1,
        at_a_time=shards_at_a_time(settings, num_rows),
        retries=attempts.MOST_STARTS,
        accelerator_type=settings.accelerator_type,
    )


def _refuse_twins(prompts: str) -> None:
    """Raises UserError when two rows have one id: their replies could not be told apart.

    Holds 8 bytes of each id, and looks at those alone that these cannot tell from another.
    """

    def ids() -> Iterator[list[str]]:
        yield from parts.ahead(
            lambda name: parts.read(prompts, name, ["id"])["id"].to_pylist(), parts.names(prompts)
        )

    hashes = np.concatenate([np.fromiter(map(hash, some), np.int64) for some in ids()])
    hashes.sort()
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not suspects:
        return
    counts = Counter(row_id for some in ids() for row_id in some if hash(row_id) in suspects)
    twins = [row_id for row_id, count in counts.items() if count > 1]
    if twins:
        raise UserError(
            f"{len(twins)} ids in {prompts} stand there twice, {twins[0]} for one. Give each chat an id of its own "
            "and run the data stage again."
        )


def _manifest(total: Facts, ours: Facts, seconds: float) -> dict[str, Any]:
    """What provenance says of all rows. ours: of the parts that this run wrote, in so many seconds."""
    slots, taken = total.pop("slots", {}), total.pop("taken", {})
    occupancy = {name: round(taken[name] / num, 4) for name, num in slots.items() if num}
    speed = ours["num_reply_tokens"] / seconds if ours else None
    return {**total, "occupancy": occupancy, "this_run": {"seconds": seconds, "reply_tokens_per_s": speed}}


def _remove_attempts(distilled: str) -> None:
    filesystem, path = fsspec.core.url_to_fs(f"{distilled}/{attempts.FOLDER}")
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def _why_none(config: RunConfig, base: str, counts: dict[str, Any]) -> str:
    """No row is good, so that no token is a label."""
    why = f"none of {counts['in']} training rows leaves a label: {counts['errors']}. "
    if TEMPLATE in counts["errors"]:
        from medusa_ray.chat import Chat

        start = Chat.load(base, config.model.revision).template_start
        return (
            f"{why}The chat template of {config.model.base}, {start!r}..., renders a chat differently once it is "
            "answered, and has no {% generation %} marks. Set distill.replies to generate, or mark what the assistant "
            "says in the template."
        )
    return f"{why}The error of each row is in {config.artifact('distilled')}."
