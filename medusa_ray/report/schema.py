"""The types of report.json and of a comparison of two: what machines may rely on, as a JSON schema beside each report.

Keys are stable: some are added, none is renamed, and records.SCHEMA_VERSION rises when one changes its meaning.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

Interval = tuple[float, float] | None  # of 95%, by bootstrap; null where too few prompts were measured
Number = float | None


class Part(BaseModel):
    """Knows all its keys."""

    model_config = ConfigDict(extra="forbid")


class Percentile(Part):
    """One percentile, over the good requests of all rounds, of each figure that a request has."""

    request_latency_s: Number
    ttft_ms: Number
    tpot_ms: Number
    gap_ms: Number = Field(description="Mean gap between the stream events of a request.")
    user_tokens_per_s: Number = Field(description="Tokens of a reply over its latency.")
    wait_s: Number = Field(description="Due to sent, at open loads.")


class Goodput(Part):
    """Requests that met every limit of the SLO."""

    requests_per_s: Number
    share: float
    ci95: tuple[float, float] = Field(description="Wilson's interval of the share.")
    attained: bool | None = Field(
        description="Is the share that was asked for below the interval? Null: inside it."
    )


class Load(Part):
    """One arm at one load, medians over requests and over rounds."""

    requests: int
    failed: int
    requests_per_s: Number
    request_latency_s: Number
    ttft_ms: Number
    tpot_ms: Number
    itl_ms: Number = Field(description="GuideLLM's mean.")
    output_tokens_per_s: Number
    acceleration: Number
    acceleration_at_client: Number
    nodes_per_step: Number = Field(description="Mean nodes of the trees verified, the root counted.")
    p50: Percentile
    p95: Percentile
    p99: Percentile
    ci95: dict[str, Interval] = Field(description="Intervals of the medians and rates, by their keys.")
    goodput: Goodput | None


class Arm(Part):
    """One target of the benchmark; acceptance over all its loads."""

    acceleration: Number = Field(description="Tokens per step, as the server counts them.")
    acceleration_at_client: Number = Field(description="Tokens per stream event after the first.")
    accepted_per_position: list[float] = Field(description="Share of steps that accepted guess k, from 0.")
    accepted_per_position_conditional: list[Number] = Field(
        description="The same of steps that accepted guess k - 1."
    )
    acceptance_histogram: list[int] = Field(description="[j]: steps that accepted exactly j guesses.")
    draft_acceptance_rate: Number = Field(description="Accepted guesses over verified nodes; low for a tree.")
    nodes_per_step: Number
    load: dict[str, Load]


class Speedup(Part):
    """Medusa over baseline at one load; all null where `not_comparable` says why."""

    output_tokens_per_s: Number
    output_tokens_per_s_ci95: Interval
    tpot: Number
    ci95: Interval = Field(description="Of tpot.")
    not_comparable: str | None


class AtEqualLatency(Part):
    """Output tokens per second of both arms at a latency that the baseline had at a load; medusa's interpolated."""

    load: str
    at: float
    baseline: float
    medusa: Number = Field(description="Null where medusa's measured loads do not come by that latency.")
    ratio: Number
    ci95: Interval


class EqualLatency(Part):
    """By the latency that is held equal."""

    tpot_ms: list[AtEqualLatency]
    request_latency_s: list[AtEqualLatency]


class BreakEven(Part):
    """Where the speedup falls below 1."""

    concurrency: Number = Field(
        description="Null where it lies beyond what was measured; `text` says on which side."
    )
    ci95: tuple[Number, Number] | None
    text: str


class Prediction(Part):
    """Speedup that acceleration and step times allow, beside the measured one."""

    acceleration: Number
    step_cost_ratio: Number
    predicted: Number
    measured: Number
    gap: Number = Field(description="measured / predicted - 1")


class Predicted(Part):
    """In process by batch size, and served by load."""

    engine: dict[str, Prediction]
    served: dict[str, Prediction]


class CategorySpeedup(Part):
    """Of the time per output token."""

    tpot: float
    ci95: Interval


class Category(Part):
    """Prompts of one kind, over all loads."""

    requests: int
    acceleration: Number
    speedup: dict[str, CategorySpeedup]


class Served(Part):
    """Greedy texts of both arms, as served."""

    prompts: int
    equal: int
    unstable: int = Field(description="Differ, and the baseline itself does not always say the same.")


class Parity(Part):
    """Offline, token for token, and served."""

    prompts: int | None
    token_exact: int | None
    served: Served


class Quality(Part):
    """Of the base's answers."""

    exact_match: Number
    execution_accuracy: Number


class Heads(Part):
    """Held-out accuracy of each head."""

    top1: list[float]
    top5: list[float]


class Tree(Part):
    """The calibrated tree, best nodes first."""

    nodes: int | None
    paths: list[list[int]]


class Rate(Part):
    """In process."""

    tokens_per_s: Number


class Engine(Part):
    """In process, without a server, one prompt at a time."""

    baseline: Rate
    medusa: Rate
    transformers: Rate
    speedup: Number


class Verdict(Part):
    """The answer; its reason opens with it."""

    ship: bool
    up_to_concurrency: int
    reason: str


class Report(Part):
    """report/report.json of medusa-ray."""

    schema_version: int
    hardware: dict[str, Any]
    versions: dict[str, Any]
    model: dict[str, Any]
    quality: Quality
    heads: Heads
    tree: Tree
    acceptance: dict[str, Number] = Field(
        description="Tokens per step: chain, calibrated_N, out_of_domain_chain, served."
    )
    parity: Parity
    engine: Engine
    slo: dict[str, Any] | None
    arms: dict[str, Arm]
    speedup: dict[str, Speedup]
    equal_latency: EqualLatency
    break_even: dict[str, BreakEven] = Field(description="By tpot and output_tokens_per_s.")
    categories: dict[str, Category]
    checks: dict[str, Any] | None = Field(description="What the benchmark found of its prompts.")
    predicted: Predicted
    verdict: Verdict


class Difference(Part):
    """One figure in two runs."""

    arm: str
    load: str
    figure: str
    a: Number
    b: Number
    change: Number = Field(description="b / a - 1")
    a_ci95: Interval
    b_ci95: Interval
    beyond: bool | None = Field(description="Do the intervals not meet? Null where one is lacking.")


class Comparison(Part):
    """compare.json of medusa-ray: run B beside run A."""

    schema_version: int
    a: str
    b: str
    verdicts: dict[str, Verdict]
    notes: list[str] = Field(description="What else differs between the runs.")
    figures: list[Difference]


def json_schema(kind: type[Part]) -> dict[str, Any]:
    """As JSON Schema, draft 2020-12."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema()}
