"""Prompts and OpenAI servers -> a row per request. GuideLLM sends the traffic; this knows HTTP and no engine.

Each arm gets the same prompts in the same order, and the arms take turns within every load, so that whatever
else the machine does meets both.
"""

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from medusa_ray import parts, provenance, records
from medusa_ray.bench import guidellm, ramp, targets
from medusa_ray.bench.guidellm import GuideLLM, Row
from medusa_ray.bench.prompts import Prompt, overlap, read_prompts
from medusa_ray.config import TrafficConfig
from medusa_ray.report.numbers import concurrency, tpot_ms
from medusa_ray.report.samples import Samples

LOG = logging.getLogger("medusa_ray")

MAX_SEARCH_STEPS = 6


@dataclass
class Measured:
    """What all runs gave."""

    rows: list[Row] = field(default_factory=list)
    aggregates: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)  # GuideLLM's own
    client: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def run(config: TrafficConfig) -> str:
    """Sends the traffic of `config` to its targets and returns the URI of the results, its `output`.

    Writes requests.parquet (records.REQUESTS), bench.json, GuideLLM's own files under guidellm/, and the
    provenance last. Raises UserError before any traffic when the prompts cannot be read or a target cannot
    serve them.
    """
    settings = config.model_dump(mode="json", exclude={"output"})
    inputs = {f"prompts.{i}": provenance.digest(uri) for i, uri in enumerate(config.prompts)}
    if config.overlap_with:
        inputs["overlap_with"] = provenance.digest(config.overlap_with)
    if provenance.is_complete(config.output, settings, inputs):
        return config.output
    prompts = read_prompts(config.prompts)[: config.num_requests]
    for name, target in config.targets.items():
        targets.api_key(name, target)
    with (
        tempfile.TemporaryDirectory(prefix="medusa_ray_bench_", ignore_cleanup_errors=True) as folder,
        GuideLLM(Path(folder)) as client,
    ):
        # While GuideLLM imports what it needs.
        infos = {
            name: targets.check(name, target, prompts[0], config) for name, target in config.targets.items()
        }
        checks = check_prompts(config, prompts)
        for name, target in config.targets.items():
            targets.warm_up(name, target, prompts, config)
        clear(config.output)
        before = {name: targets.replicas(target) for name, target in config.targets.items()}
        for name in [name for name, found in before.items() if found and found[2]]:
            LOG.warning("the replicas of %s follow the load; set num_replicas, or nothing can be compared", name)
        measured = measure(config, prompts, client, Path(folder))
        after = {name: targets.replicas(target) for name, target in config.targets.items()}
    parts.write(config.output, "requests", pa.Table.from_pylist(measured.rows, schema=records.REQUESTS))
    arms = {}
    for name in config.targets:
        start, end = before[name], after[name]
        arms[name] = {
            "info": infos[name],
            "guidellm": measured.aggregates[name],
            "replicas": [start[0], end[0]] if start and end else None,
            "autoscales": start[2] if start else None,
        }
    bench = {
        "hardware": provenance.hardware(),
        "versions": provenance.versions(),
        "traffic": settings,
        "arms": arms,
        "client": measured.client,
        "checks": checks,
        "not_comparable": not_comparable(measured.rows, config),
        "ramp": ramp.run(config, prompts),
    }
    provenance.write_json(f"{config.output}/bench.json", bench)
    failed = num_failed(measured.rows)
    provenance.write(config.output, settings, inputs, requests=len(measured.rows), failed=failed)
    return config.output


def check_prompts(config: TrafficConfig, prompts: list[Prompt]) -> dict[str, Any]:
    """Whether a template has been applied twice, and whether the heads know the prompts; both are logged."""
    doubled = [targets.count_double_bos(target, prompts) for target in config.targets.values()]
    double_bos = max((count for count in doubled if count is not None), default=None)
    if double_bos:
        LOG.warning("%d of %d prompts begin with two tokens that begin a sequence", double_bos, len(prompts))
    found: dict[str, Any] = {"checked": False, "exact": 0, "near": 0, "of": len(prompts)}
    if config.overlap_with:
        found = overlap(prompts, read_prompts([config.overlap_with]))
        if found["exact"]:
            LOG.warning("%d of %d prompts are training chats", found["exact"], len(prompts))
    return {"double_bos": double_bos, "overlap": found}


def measure(config: TrafficConfig, prompts: list[Prompt], client: GuideLLM, folder: Path) -> Measured:
    """The listed loads in all rounds, and then those of the search for the break-even concurrency."""
    # Prompts come again when there are fewer of them than requests.
    sent = [prompts[i % len(prompts)] for i in range(config.num_requests)]
    measured = Measured(
        aggregates={arm: {} for arm in config.targets}, client={arm: {} for arm in config.targets}
    )

    def send(loads: list[str]) -> None:
        for round_, load, arm in plan(config, loads):
            target = config.targets[arm]
            due_s = guidellm.due_s(load, len(sent), config.seed + round_)
            data = folder / (f"{load}-{round_}.parquet" if due_s else "closed.parquet")
            if not data.exists():
                guidellm.write_data(sent, data, due_s)
            words = guidellm.arguments(config, target, load, data, prompts[0], targets.api_key(arm, target))
            report = guidellm.run_whole(client, words, config)
            found = guidellm.rows_of(report, prompts, config.max_seconds, is_open=due_s is not None)
            measured.rows += [{"arm": arm, "load": load, "round": round_, **row} for row in found]
            measured.aggregates[arm].setdefault(load, []).append(guidellm.aggregates_of(report))
            busiest = client.watch.busiest(*span_s(found))
            measured.client[arm].setdefault(load, []).append(busiest)
            provenance.write_json(f"{config.output}/guidellm/round{round_}-{load}-{arm}.json", report)
            LOG.info(
                "stage=bench round=%d load=%s arm=%s requests=%d failed=%d client_cpu=%.2f",
                round_, load, arm, len(found), num_failed(found), busiest,
            )  # fmt: skip

    send(config.loads)
    if config.search_break_even:
        most = min(config.max_concurrency, config.num_requests)
        for _ in range(MAX_SEARCH_STEPS):
            if (streams := next_concurrency(measured.rows, most)) is None:
                break
            send([f"concurrency={streams}"])
    return measured


def span_s(rows: list[Row]) -> tuple[float, float]:
    """First send and last byte, in seconds since the epoch."""
    began = [row for row in rows if row["start_s"] is not None]
    if not began:
        return 0.0, 0.0
    return min(row["start_s"] for row in began), max(row["start_s"] + (row["latency_s"] or 0) for row in began)


def clear(output: str) -> None:
    """Removes the results of other traffic, and nothing else."""
    parts.clear(output)
    filesystem, path = fsspec.core.url_to_fs(f"{output}/guidellm")
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def plan(config: TrafficConfig, loads: list[str]) -> Iterator[tuple[int, str, str]]:
    """(round, load, arm) in the order of measurement: arms take turns at each load, and in who is first."""
    for round_ in range(config.rounds):
        arms = list(config.targets)[:: -1 if round_ % 2 else 1]
        for load in loads:
            for arm in arms:
                yield round_, load, arm


def next_concurrency(rows: list[Row], most: int) -> int | None:
    """The concurrency between the last where medusa is faster than baseline and the first where it is not.

    Beyond the last, doubled up to `most`, while it is faster everywhere. None once the two are neighbours or within an
    eighth, which noise would drown.
    """
    faster: dict[int, bool] = {}
    samples = Samples(rows)
    for load in samples.loads("baseline", "medusa"):
        streams, ratio = concurrency(load), samples.quotient(load, tpot_ms)
        if streams is not None and ratio is not None:
            faster[streams] = ratio.point > 1
    if not faster:
        return None
    first_lost = min((streams for streams, won in faster.items() if not won), default=None)
    last_won = max((n for n, won in faster.items() if won and (first_lost is None or n < first_lost)), default=0)
    if first_lost is None:
        return min(2 * last_won, most) if last_won < most else None
    middle = (last_won + first_lost) // 2
    return middle if middle > last_won and first_lost - last_won > last_won // 8 else None


def not_comparable(rows: list[Row], config: TrafficConfig) -> list[str]:
    """The loads at which the arms did not get the same prompts in every round."""
    loads = list(dict.fromkeys([*config.loads, *(row["load"] for row in rows)]))
    sent: dict[tuple[str, str], list[tuple[int, int]]] = {
        (load, arm): [] for load in loads for arm in config.targets
    }
    for row in rows:
        sent[row["load"], row["arm"]].append((row["round"], row["prompt"]))
    first = next(iter(config.targets))
    return [
        load for load in loads if any(sorted(sent[load, arm]) != sorted(sent[load, first]) for arm in config.targets)
    ]


def num_failed(rows: list[Row]) -> int:
    return sum(row["error"] is not None for row in rows)
