"""Trees, ways to accept, temperatures and splits -> tokens per step of each combination, as rows and a plot.

Greedy and exact, the figure follows from the ranks of one pass of the base, for any tree. What is sampled is generated.
"""

import io
import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from torch import Tensor

from medusa_ray import parts
from medusa_ray.config import SweepConfig
from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.ranks import steps_by_accepted
from medusa_ray.medusa.tree import Tree
from medusa_ray.records import SWEEP

MIN_PROMPTS = 5  # fewer give no interval
NUM_RESAMPLES = 1000

Counts = list[tuple[int, int]]  # of each prompt: tokens after the prefill's, and steps


@dataclass(frozen=True)
class Split:
    """Prompts, and the ranks [T - 1, H] that the heads gave the base's greedy replies."""

    prompts: list[list[int]]
    ranks: list[Tensor]


def measure(
    config: SweepConfig,
    trees: dict[str, Tree],
    engine_of: Callable[[Tree], Engine],
    splits: dict[str, Split],
    layout: str,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Rows of records.SWEEP; trees by name. Typical acceptance has no greedy rows."""
    rows = []
    for name, tree in trees.items():
        # One at a time, as each takes memory for keys and values; none where nothing is sampled.
        engine = engine_of(tree) if any(config.temperatures) else None
        for acceptance, temperature, (split, held) in itertools.product(
            config.acceptance, config.temperatures, splits.items()
        ):
            if not held.prompts or (temperature == 0 and acceptance != "exact"):
                continue
            seconds = None
            if temperature == 0:
                counts = [(len(rank_TH), sum(steps_by_accepted([rank_TH], tree))) for rank_TH in held.ranks]
            else:
                assert engine is not None
                started = time.perf_counter()
                counts = _generate(engine, held.prompts, max_new_tokens, temperature, acceptance)
                seconds = time.perf_counter() - started
            point, low, high = interval(counts)
            rows.append(
                {
                    "tree": name, "nodes": len(tree.paths), "layout": layout, "acceptance": acceptance,
                    "temperature": temperature, "split": split, "prompts": len(counts), "tokens_per_step": point,
                    "low": low, "high": high, "steps": sum(steps for _, steps in counts), "seconds": seconds,
                }
            )  # fmt: skip
    return rows


def _generate(
    engine: Engine, prompts: list[list[int]], max_new_tokens: int, temperature: float, acceptance: str
) -> Counts:
    kind, _, values = acceptance.partition("=")
    settings: dict[str, Any] = {"temperature": temperature, "acceptance": kind}
    if values:
        epsilon, alpha = values.split("/")
        settings |= {"typical_threshold": float(epsilon), "typical_alpha": float(alpha)}
    done = engine.generate(prompts, max_new_tokens, seed=list(range(len(prompts))), **settings)
    return [(len(reply.token_ids) - 1, reply.num_steps) for reply in done]


def interval(counts: Counts) -> tuple[float, float | None, float | None]:
    """Tokens per step over all prompts, and its 95% interval: a bootstrap over prompts, which steps are parts of."""
    tokens_P, steps_P = np.array(counts, dtype=float).T
    point = float(tokens_P.sum() / max(steps_P.sum(), 1))
    if len(counts) < MIN_PROMPTS:
        return point, None, None
    draws_SP = np.random.default_rng(0).integers(len(counts), size=(NUM_RESAMPLES, len(counts)))
    found_S = tokens_P[draws_SP].sum(1) / np.maximum(steps_P[draws_SP].sum(1), 1)
    low, high = np.percentile(found_S, [2.5, 97.5])
    return point, float(low), float(high)


def write(rows: list[dict[str, Any]], folder: str) -> None:
    """sweep.parquet, sweep.png and sweep.svg in the folder."""
    parts.write(folder, "sweep", pa.Table.from_pylist(rows, schema=SWEEP))
    figure = plot(rows)
    for kind in ("png", "svg"):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, dpi=150)
        with fsspec.open(f"{folder}/sweep.{kind}", "wb") as file:
            file.write(drawn.getvalue())


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Tokens per step by guesses of a step: a line for each acceptance, temperature and split."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        lines[f"{row['acceptance']}, temperature {row['temperature']:g}, {row['split']}"].append(row)
    for label, points in lines.items():
        points = sorted(points, key=lambda row: row["nodes"])
        (line,) = axes.plot(
            [row["nodes"] for row in points], [row["tokens_per_step"] for row in points], marker="o", label=label
        )
        banded = [row for row in points if row["low"] is not None]
        axes.fill_between(
            [row["nodes"] for row in banded],
            [row["low"] for row in banded],
            [row["high"] for row in banded],
            color=line.get_color(),
            alpha=0.15,
        )
    axes.set_xlabel("guesses of a step")
    axes.set_ylabel("tokens per step")
    axes.set_ylim(bottom=1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
