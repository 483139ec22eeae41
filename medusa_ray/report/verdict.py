"""Figures of both arms -> ship or not, up to which concurrency, and why.

The arms must be comparable at every load, and the text must be the same. Then loads are tried in rising order
of concurrency, and medusa is worth shipping up to the last one before it first fails.
"""

from collections import Counter
from typing import Any

from medusa_ray.report.numbers import MIN_PROMPTS, Row, concurrency, in_order, paired_ratio, tpot_ms, ttft_ms

MIN_SPEEDUP = 1.10  # for the lower bound of the TPOT speedup
MAX_TTFT_RATIO = 1.05  # unless the difference is within noise
MAX_ERROR_DIFFERENCE = 0.005  # as a share of the requests
MAX_TOKENS_DIFFERENCE = 0.01  # of greedy replies, as a share of the baseline's


def judge(report: dict[str, Any], rows: list[Row], greedy: bool, near_ties: int) -> dict[str, Any]:
    """The report's `verdict`; its reason is one sentence that opens with the answer and a colon.

    `greedy` says whether the traffic was; `near_ties` counts the prompts whose texts differ where the base's
    two best scores all but coincide, which is no fault.
    """
    refusal = _incomparable(report, rows, greedy) or _parity_fault(report, near_ties)
    if refusal:
        return {"ship": False, "up_to_concurrency": 0, "reason": refusal}
    passed, fault = _climb(report, rows)
    tokens_per_step = report["acceptance"]["served"]
    beside = f"at {tokens_per_step:.2f} tokens per step" if tokens_per_step else "at an unknown acceleration"
    if not passed:
        why = fault or "no load with a fixed concurrency was measured"
        reason = f"Do not ship: {why}, {beside}; next, {_next_step(tokens_per_step)}."
        return {"ship": False, "up_to_concurrency": 0, "reason": reason}
    limit, requests = concurrency(passed), report["arms"]["medusa"]["load"][passed]["requests"]
    many = "one request at a time" if limit == 1 else f"up to {limit} concurrent requests"
    after = f"beyond that it does not pay: {fault}" if fault else "higher loads were not measured"
    parity = "the text is the same on {token_exact} of {prompts} prompts".format(**report["parity"])
    measured = f"{_speed(report, passed)} {beside}, n = {requests} requests per arm, and {parity}"
    reason = f"Ship for {many}: {measured}; {after}."
    return {"ship": True, "up_to_concurrency": limit, "reason": reason}


def _climb(report: dict[str, Any], rows: list[Row]) -> tuple[str | None, str | None]:
    """The last load before the first that fails, and that one's fault."""
    passed: list[str] = []
    for load in report["speedup"]:
        if concurrency(load) is None:
            continue
        if fault := _load_fault(report, rows, load):
            # synchronous and concurrency=1 are one concurrency: neither passes without the other.
            lower = [earlier for earlier in passed if concurrency(earlier) != concurrency(load)]
            return (lower[-1] if lower else None), fault
        passed.append(load)
    return (passed[-1] if passed else None), None


def _incomparable(report: dict[str, Any], rows: list[Row], greedy: bool) -> str | None:
    """Why nothing can be said of the two arms, or None."""
    if not {"baseline", "medusa"} <= report["arms"].keys():
        found = ", ".join(report["arms"]) or "none"
        return f"Not measured: of the arms baseline and medusa this run has {found}; run medusa-ray bench."
    both = [row for row in rows if row["arm"] in ("baseline", "medusa")]
    for load in in_order({row["load"] for row in both}):
        baseline, medusa = (
            [row for row in both if row["load"] == load and row["arm"] == arm]
            for arm in ("baseline", "medusa")
        )
        if fault := _unequal(baseline, medusa, greedy):
            return f"Not comparable: {in_words(load)} {fault}."
    return None


def _unequal(baseline: list[Row], medusa: list[Row], greedy: bool) -> str | None:
    """What differs between the arms at one load, though it must not."""
    if Counter((row["round"], row["prompt"]) for row in baseline) != Counter(
        (row["round"], row["prompt"]) for row in medusa
    ):
        return (
            f"the arms did not get the same prompts ({len(baseline)} requests to baseline, {len(medusa)} to "
            "medusa); raise max_seconds or lower num_requests, and repeat the benchmark"
        )
    failed, failed_medusa = (
        sum(row["error"] is not None for row in rows) / len(rows) for rows in (baseline, medusa)
    )
    if abs(failed - failed_medusa) > MAX_ERROR_DIFFERENCE:
        return (
            f"{failed:.1%} of the requests to baseline failed and {failed_medusa:.1%} of those to medusa, "
            f"where {MAX_ERROR_DIFFERENCE:.1%} apart is allowed; see the column error of requests.parquet"
        )
    tokens, tokens_medusa = (
        sum(row["output_tokens"] for row in rows if row["error"] is None) for rows in (baseline, medusa)
    )
    if greedy and abs(tokens - tokens_medusa) > MAX_TOKENS_DIFFERENCE * tokens:
        return (
            f"greedy replies add up to {tokens:,} tokens on baseline and {tokens_medusa:,} on medusa, where "
            f"{MAX_TOKENS_DIFFERENCE:.0%} apart is allowed; serve both arms with the same model and limits"
        )
    return None


def _parity_fault(report: dict[str, Any], near_ties: int) -> str | None:
    prompts, exact = report["parity"]["prompts"], report["parity"]["token_exact"]
    if not prompts:
        return (
            "Do not ship: whether medusa writes the baseline's text was not checked; run medusa-ray evaluate."
        )
    if differ := max(0, prompts - exact - near_ties):
        return f"Do not ship: medusa's text is not the baseline's on {differ} of {prompts} prompts, a bug."
    return None


def _load_fault(report: dict[str, Any], rows: list[Row], load: str) -> str | None:
    """The first demand that medusa does not meet at this load, with its numbers; None when it meets all."""
    speedup = report["speedup"][load]
    if speedup["ci95"] is None:
        return f"{in_words(load)} fewer than {MIN_PROMPTS} prompts have a time per output token in both arms"
    if speedup["ci95"][0] <= MIN_SPEEDUP:
        return f"{_speed(report, load)}, but the lower bound must exceed {MIN_SPEEDUP:.2f}"
    # Of these two, baseline over medusa as well: below 1 is slower, and an interval below 1 is beyond noise.
    first = paired_ratio(rows, load, ttft_ms)
    if first and first.high is not None and first.high < 1 and 1 / first.point > MAX_TTFT_RATIO:
        longer, allowed = 1 / first.point - 1, MAX_TTFT_RATIO - 1
        return f"{in_words(load)} the first token takes {longer:.0%} longer, and {allowed:.0%} is allowed"
    slowest = paired_ratio(rows, load, tpot_ms, percent=99)
    if slowest and slowest.high is not None and slowest.high < 1:
        return f"{in_words(load)} the p99 per output token is {1 / slowest.point:.2f} times the baseline's"
    return None


def _speed(report: dict[str, Any], load: str) -> str:
    speedup = report["speedup"][load]
    interval = "95% interval {:.2f} to {:.2f}".format(*speedup["ci95"])
    return f"{in_words(load)} the speedup per output token is {speedup['tpot']:.2f}x ({interval})"


def in_words(load: str) -> str:
    """The load as it reads in a sentence."""
    number = concurrency(load)
    if number is None:
        return "under full load"
    return "one at a time" if number == 1 else f"with {number} at a time"


def _next_step(tokens_per_step: float | None) -> str:
    if tokens_per_step is not None and tokens_per_step < 1.5:
        return "train the heads on more replies to prompts like the ones served"
    return "try a smaller tree and look at what one step costs"
