"""Figures of both arms -> ship or not, up to which concurrency, and why.

The text must be the same. Then loads are tried in rising order of concurrency, and medusa is worth shipping up to the
last one before the first at which it fails, or at which the arms are not comparable.
"""

from typing import Any

from medusa_ray.report.comparable import in_words, served_parity, text_fault
from medusa_ray.report.numbers import concurrency, tpot_ms, ttft_ms
from medusa_ray.report.ratios import ARMS, compared_loads
from medusa_ray.report.samples import MIN_PROMPTS, Drawn, Samples

MIN_SPEEDUP = 1.10  # for the lower bound of the TPOT speedup
MAX_TTFT_RATIO = 1.05  # unless the difference is within noise


def judge(report: dict[str, Any], samples: Samples, greedy: bool, near_ties: int) -> dict[str, Any]:
    """The report's `verdict`; its reason is one sentence that opens with the answer and a colon.

    `greedy` says whether the traffic was; `near_ties` counts the prompts whose texts differ offline where the base's
    two best scores all but coincide, which is no fault.
    """
    refusal = _unmeasured(report) or _parity_fault(report, samples, greedy, near_ties)
    if refusal:
        return {"ship": False, "up_to_concurrency": 0, "reason": refusal}
    passed, fault = _climb(report, samples)
    tokens_per_step = report["acceptance"]["served"]
    beside = f"at {tokens_per_step:.2f} tokens per step" if tokens_per_step else "at an unknown acceleration"
    if not passed:
        reason = _refuse(report, fault, beside, tokens_per_step)
        return {"ship": False, "up_to_concurrency": 0, "reason": reason}
    limit, requests = concurrency(passed), report["arms"]["medusa"]["load"][passed]["requests"]
    after = f"beyond that it does not pay: {fault}" if fault else "higher loads were not measured"
    if fault and fault in _not_comparable(report):
        after = f"beyond that nothing can be said: {fault}"
    measured = f"{_speed(report, passed)} {beside}, n = {requests} requests per arm, and {_same_text(report)}"
    return {
        "ship": True,
        "up_to_concurrency": limit,
        "reason": f"Ship up to concurrency {limit}: {measured}; {after}.",
    }


def _refuse(report: dict[str, Any], fault: str | None, beside: str, tokens_per_step: float | None) -> str:
    refused = _not_comparable(report)
    if fault in refused or (not fault and refused):
        return f"Not comparable: {fault or refused[0]}."
    why = fault or "no load with a fixed concurrency was measured"
    return f"Do not ship: {why}, {beside}; next, {_next_step(tokens_per_step)}."


def _not_comparable(report: dict[str, Any]) -> list[str]:
    """Why there is no speedup, load by load."""
    faults = {load: speedup["not_comparable"] for load, speedup in report["speedup"].items()}
    return [f"{in_words(load)} {fault}" for load, fault in faults.items() if fault]


def _climb(report: dict[str, Any], samples: Samples) -> tuple[str | None, str | None]:
    """The last load before the first that fails, and that one's fault."""
    passed: list[str] = []
    for load in report["speedup"]:
        if concurrency(load) is None:
            continue
        if fault := _load_fault(report, samples, load):
            # synchronous and concurrency=1 are one concurrency: neither passes without the other.
            lower = [earlier for earlier in passed if concurrency(earlier) != concurrency(load)]
            return (lower[-1] if lower else None), fault
        passed.append(load)
    return (passed[-1] if passed else None), None


def _unmeasured(report: dict[str, Any]) -> str | None:
    if set(ARMS) <= report["arms"].keys():
        return None
    found = ", ".join(report["arms"]) or "none"
    return f"Not measured: of the arms baseline and medusa this run has {found}; run medusa-ray bench."


def _parity_fault(report: dict[str, Any], samples: Samples, greedy: bool, near_ties: int) -> str | None:
    """What differs in what both arms say, offline or served at any load."""
    prompts, exact = report["parity"]["prompts"], report["parity"]["token_exact"]
    if prompts and (differ := max(0, prompts - exact - near_ties)):
        return f"Do not ship: medusa's text is not the baseline's on {differ} of {prompts} prompts, a bug."
    if greedy:
        served = served_parity(samples, compared_loads(samples))
        if fault := text_fault(served, near_ties / prompts if prompts else 0.0):
            return f"Not comparable: {fault}."
        prompts = prompts or served["prompts"]
    if not prompts:
        return (
            "Do not ship: whether medusa writes the baseline's text was not checked; run medusa-ray evaluate."
        )
    return None


def _same_text(report: dict[str, Any]) -> str:
    offline, served = report["parity"], report["parity"]["served"]
    same, prompts = (
        (offline["token_exact"], offline["prompts"])
        if offline["prompts"]
        else (served["equal"], served["prompts"])
    )
    return f"the text is the same on {same} of {prompts} prompts"


def _load_fault(report: dict[str, Any], samples: Samples, load: str) -> str | None:
    """The first demand that medusa does not meet at this load, with its numbers; None when it meets all."""
    speedup = report["speedup"][load]
    if speedup["not_comparable"]:
        return f"{in_words(load)} {speedup['not_comparable']}"
    if speedup["ci95"] is None:
        return f"{in_words(load)} fewer than {MIN_PROMPTS} prompts have a time per output token in both arms"
    if speedup["ci95"][0] <= MIN_SPEEDUP:
        return f"{_speed(report, load)}, but the lower bound must exceed {MIN_SPEEDUP:.2f}"
    first = samples.quotient(load, ttft_ms)
    if first and _is_slower(first) and 1 / first.point > MAX_TTFT_RATIO:
        longer, allowed = 1 / first.point - 1, MAX_TTFT_RATIO - 1
        return f"{in_words(load)} the first token takes {longer:.0%} longer, and {allowed:.0%} is allowed"
    slowest = samples.quotient(load, tpot_ms, percent=99)
    if slowest and _is_slower(slowest):
        return f"{in_words(load)} the p99 per output token is {1 / slowest.point:.2f} times the baseline's"
    return None


def _is_slower(ratio: Drawn) -> bool:
    """Whether medusa takes longer, and beyond noise."""
    return ratio.interval is not None and ratio.interval[1] < 1


def _speed(report: dict[str, Any], load: str) -> str:
    speedup = report["speedup"][load]
    interval = "95% interval {:.2f} to {:.2f}".format(*speedup["ci95"])
    return f"{in_words(load)} the speedup per output token is {speedup['tpot']:.2f}x ({interval})"


def _next_step(tokens_per_step: float | None) -> str:
    if tokens_per_step is not None and tokens_per_step < 1.5:
        return "train the heads on more replies to prompts like the ones served"
    return "try a smaller tree and look at what one step costs"
