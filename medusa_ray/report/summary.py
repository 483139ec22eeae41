"""What the stages left -> report.json."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from medusa_ray.records import SCHEMA_VERSION
from medusa_ray.report.numbers import measure_arm, measure_speedup
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


def summarise(inputs: Inputs) -> dict[str, Any]:
    """report.json. Its keys are stable; see the module `numbers` for what each figure means."""
    evaluation, bench = inputs.evaluation, inputs.bench
    rows = defaultdict(list)
    for row in inputs.requests:
        rows[row["arm"]].append(row)
    arms = {arm: measure_arm(sent) for arm, sent in rows.items()}
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
        "parity": {key: evaluation.get("parity", {}).get(key) for key in ("prompts", "token_exact")},
        "engine": in_process | {"speedup": engine.get("speedup")},
        "arms": arms,
        "speedup": measure_speedup(inputs.requests, arms),
    }
    greedy = bench.get("traffic", {}).get("temperature", 0) == 0
    return report | {"verdict": judge(report, inputs.requests, greedy, inputs.near_ties)}


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
