"""A base, its heads and this machine -> what a step costs, how much of a tree pays, and what that is worth.

Step times are measured by rows and nodes; with prompts, whole replies too: transformers' `generate`, the plain loop and
fixed and adaptive trees, in turns within each round.
"""

import logging
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from medusa_ray import parts, provenance
from medusa_ray.config import UserError
from medusa_ray.medusa import reference
from medusa_ray.medusa.engine import Engine

log = logging.getLogger("medusa_ray")

ROUNDS = 3
NUM_WARM_UP = 16  # prompts
Arm = Callable[[list[list[int]]], list[list[int]]]


def run(
    base: str,
    heads: str | None = None,
    prompts: str | None = None,
    num_prompts: int = 64,
    batch_sizes: tuple[int, ...] = (1, 8, 32),
    max_new_tokens: int = 128,
    against_transformers: bool = False,
    threads: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Everything measured, with hardware and versions.

    prompts: a prompts split that `medusa-ray data` wrote. Raises UserError for what cannot be loaded.
    """
    torch.set_num_threads(threads)
    asked = _read(prompts, num_prompts) if prompts else []
    longest = max(map(len, asked), default=256) + max_new_tokens

    def load(heads: str | None, tree: Any, compile: Any = "wait") -> Engine:
        rows = max(batch_sizes)
        try:
            return Engine.load(
                base, heads, tree, device, dtype, rows, longest, compile=compile, shares_prefixes=False
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{base} with the heads {heads} cannot be loaded: {error}") from error

    engine = load(heads, "auto")
    sizer = engine.sizer or engine.measure()
    times = sizer.times
    found: dict[str, Any] = {
        "base": base,
        "heads": heads,
        "mode": engine.mode,
        "threads": threads,
        "dtype": dtype,
        "step_ms": {rows: {n - 1: 1e3 * s for n, s in row.items()} for rows, row in times.items()},
        "hardware": provenance.hardware(),
        "versions": provenance.versions(),
    }
    if asked:
        engines = {"plain, eager": load(None, None, "no"), "plain": load(None, None)}
        if heads:
            sizes = [size for size in engine.trees if size > 1]
            engines |= {f"tree of {n - 1}": load(heads, engine.tree.paths[: n - 1]) for n in sizes}
            engines["adaptive"] = engine
        found["replies"] = {
            batch_size: compare(arms_of(engines, batch_size, max_new_tokens, against_transformers), asked)
            for batch_size in batch_sizes
        }
        found["prompts"] = len(asked)
        found["outside_share"] = {size: outside(engine, asked, size, max_new_tokens) for size in batch_sizes}
    found["suggested_nodes"] = {rows: sizer.best(rows) - 1 for rows in times}
    found["acceptance"] = [round(chance, 3) for chance in sizer.chances[1:]]
    return found


def compare(arms: dict[str, Arm], prompts: list[list[int]]) -> dict[str, float]:
    """Tokens per second of each arm, the median of the rounds. Raises RuntimeError where replies differ."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for reply in arms.values():
        reply(prompts[:NUM_WARM_UP])
    for round_ in range(ROUNDS):
        replies = {}
        for name in list(arms)[:: -1 if round_ % 2 else 1]:
            started = time.perf_counter()
            replies[name] = arms[name](prompts)
            seconds = time.perf_counter() - started
            rates[name].append(sum(map(len, replies[name])) / seconds)
            log.info("stage=profile round=%d arm=%r seconds=%.1f", round_, name.replace(" ", "_"), seconds)
        first = next(iter(replies))
        for name, said in replies.items():
            differ = sum(a != b for a, b in zip(said, replies[first], strict=True))
            if differ > len(prompts) // 100:  # near-ties may go either way
                raise RuntimeError(
                    f"{name} and {first} give other tokens on {differ} of {len(prompts)} prompts"
                )
    return {name: statistics.median(values) for name, values in rates.items()}


def outside(engine: Engine, prompts: list[list[int]], batch_size: int, max_new_tokens: int) -> float:
    """Share of the time of steps that goes by outside the base and the heads. Passes over prompts do not count."""
    seconds = dict.fromkeys(("_move_on", "_run", "topk"), 0.0)
    under_way: list[str] = []

    def timed(of: Any, name: str) -> None:
        inner = getattr(of, name)

        def run(*args: Any) -> Any:
            under_way.append(name)
            started = time.perf_counter()
            result = inner(*args)
            if "_move_on" in under_way:
                seconds[name] += time.perf_counter() - started
            under_way.pop()
            return result

        stack.enter_context(patch.object(of, name, run))

    engine.scheduler.max_batch_size = batch_size
    with ExitStack() as stack:
        timed(engine, "_move_on")
        timed(engine, "_run")
        if engine.guesser.stack:
            timed(engine.guesser.stack, "topk")
        engine.generate(prompts, max_new_tokens)
    return 1 - (seconds["_run"] + seconds["topk"]) / seconds["_move_on"]


def arms_of(
    engines: dict[str, Engine], batch_size: int, max_new_tokens: int, against_transformers: bool
) -> dict[str, Arm]:
    """What `compare` takes: each engine at a batch size, and `generate` of the one named "plain, eager"."""

    def of(engine: Engine) -> Arm:
        def reply(prompts: list[list[int]]) -> list[list[int]]:
            engine.scheduler.max_batch_size = batch_size
            return [done.token_ids for done in engine.generate(prompts, max_new_tokens)]

        return reply

    def generate(**options: Any) -> Arm:
        model = engines["plain, eager"].model
        return lambda prompts: reference.generate(model, prompts, max_new_tokens, batch_size, **options)

    arms = {name: of(engine) for name, engine in engines.items()}
    if not against_transformers:
        return arms
    static = generate(cache_implementation="static", disable_compile=True)
    return {"generate, dynamic cache": generate(), "generate, static cache": static, **arms}


def _read(prompts: str, num_prompts: int) -> list[list[int]]:
    ids = [
        row["prompt_ids"]
        for name in parts.names(prompts)
        for row in parts.read(prompts, name, ["prompt_ids", "error"]).to_pylist()
        if row["error"] is None
    ]
    if not ids:
        raise UserError(f"{prompts} holds no prompts. Give a folder such as RUN/prompts/test.")
    return ids[:num_prompts]


def tables(found: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Headers and rows of what `run` returned, to be shown."""
    nodes = list(next(iter(found["step_ms"].values())))
    headers = ["rows", *(f"{n} nodes" if n else "no tree" for n in nodes), "suggested"]
    steps = [
        [str(rows), *(f"{row[n]:.2f} ms" for n in nodes), f"{found['suggested_nodes'][rows]} nodes"]
        for rows, row in found["step_ms"].items()
    ]
    shown = [(headers, steps)]
    if replies := found.get("replies"):
        first = next(iter(replies.values()))
        rows = []
        for name in first:
            cells = [
                f"{rates[name]:.0f} tokens/s ({rates[name] / rates['plain']:.2f}x)"
                for rates in replies.values()
            ]
            rows.append([name, *cells])
        rows.append(["a step outside base and heads", *(f"{s:.1%}" for s in found["outside_share"].values())])
        shown.append((["arm", *(f"batch {size}" for size in replies)], rows))
    return shown
