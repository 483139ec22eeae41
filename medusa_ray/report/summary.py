"""What the stages left -> report.json."""

from dataclasses import dataclass, field
from typing import Any

from medusa_ray.records import SCHEMA_VERSION
from medusa_ray.report.comparable import find_faults, served_parity
from medusa_ray.report.numbers import measure_arm
from medusa_ray.report.predicted import predict
from medusa_ray.report.ratios import (
    compared_loads,
    measure_break_even,
    measure_categories,
    measure_equal_latency,
    measure_speedup,
)
from medusa_ray.report.samples import Samples
from medusa_ray.report.verdict import judge

ENGINE_ARMS = ("baseline", "medusa", "transformers")


@dataclass(frozen=True)
class Inputs:
    """What a report is made of; a part is empty when the run has not got that far. Keys: see records.py."""

    requests: list[dict[str, Any]] = field(default_factory=list)
    bench: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    tree: dict[str, Any] = field(default_factory=dict)
    heads_config: dict[str, Any] = field(default_factory=dict)
    training: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)  # of heads, evaluation and bench

    @property
    def near_ties(self) -> int:
        """Prompts whose texts differ where the base's two best scores all but coincide."""
        return int(self.evaluation.get("parity", {}).get("near_ties", 0))

    @property
    def traffic(self) -> dict[str, Any]:
        """The benchmark's config."""
        return dict(self.bench.get("traffic", {}))


def summarise(inputs: Inputs) -> dict[str, Any]:
    """report.json: see the module `schema` for its keys, which are stable, and `definitions` for what they mean."""
    evaluation, bench = inputs.evaluation, inputs.bench
    samples, greedy = Samples(inputs.requests), inputs.traffic.get("temperature", 0) == 0
    slo = inputs.traffic.get("slo") or {}
    arms = {arm: measure_arm(samples, arm, slo) for arm in samples.arms()}
    parity = {key: evaluation.get("parity", {}).get(key) for key in ("prompts", "token_exact")}
    near_ties = inputs.near_ties / parity["prompts"] if parity["prompts"] else 0.0
    faults = find_faults(samples, arms, bench, greedy, near_ties)
    engine = evaluation.get("engine") or {}  # null when the speed run was left out
    in_process = {arm: {"tokens_per_s": engine.get(arm, {}).get("tokens_per_s")} for arm in ENGINE_ARMS}
    report = {
        "schema_version": SCHEMA_VERSION,
        "hardware": bench.get("hardware") or evaluation.get("hardware") or {},
        "versions": bench.get("versions") or inputs.provenance.get("evaluation", {}).get("versions") or {},
        "model": _model(inputs),
        "quality": {
            "exact_match": evaluation.get("quality", {}).get("exact_match"),
            "execution_accuracy": inputs.quality.get("execution_accuracy"),
        },
        "heads": {key: inputs.accuracy.get("heads", {}).get(key, []) for key in ("top1", "top5")},
        "tree": {"nodes": inputs.tree.get("nodes"), "paths": inputs.tree.get("paths", [])},
        "acceptance": {
            "chain": None,
            "out_of_domain_chain": None,
            **inputs.accuracy.get("acceptance", {}),
            "served": arms.get("medusa", {}).get("acceleration"),
        },
        "parity": parity | {"served": served_parity(samples, compared_loads(samples))},
        "engine": in_process | {"speedup": engine.get("speedup")},
        "slo": slo or None,
        "arms": arms,
        "speedup": measure_speedup(samples, arms, faults),
        "equal_latency": measure_equal_latency(samples, faults),
        "break_even": measure_break_even(samples, faults),
        "categories": measure_categories(samples, faults),
        "checks": bench.get("checks"),
    }
    info = bench.get("arms", {}).get("medusa", {}).get("info")
    report["predicted"] = predict(evaluation, info, report)
    return report | {"verdict": judge(report, samples, greedy, inputs.near_ties)}


def _model(inputs: Inputs) -> dict[str, Any]:
    """Base, shape of the heads, and how the in-process engine ran: eager or compiled, on how many threads."""
    heads, engine = inputs.heads_config, inputs.evaluation.get("engine") or {}
    found = {
        "base": heads.get("base_model_name_or_path"),
        "num_heads": heads.get("medusa_num_heads"),
        "num_layers": heads.get("medusa_num_layers"),
        **inputs.evaluation.get("model", {}),
        "engine_mode": engine.get("mode"),
        "engine_threads": engine.get("threads"),
    }
    return {key: value for key, value in found.items() if value is not None}
