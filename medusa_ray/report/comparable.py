"""What makes two arms not comparable: such a load has no speedup, and the reason stands in its place.

Each of these makes a slow arm look fast, or a fast one slow, and no interval tells.
"""

import math
from collections import Counter, defaultdict
from typing import Any

from medusa_ray.report.numbers import concurrency, rate
from medusa_ray.report.ratios import ARMS, compared_loads
from medusa_ray.report.samples import Row, Samples

MAX_ERROR_DIFFERENCE = 0.005  # as a share of the requests
MAX_TOKENS_DIFFERENCE = 0.01  # of greedy replies, as a share of the baseline's
MIN_BASELINE_RATE = 0.8  # of output tokens per second of an engine of another make
MAX_CLIENT_SHARE = 0.9  # of one CPU core: GuideLLM's worker is one thread
# Of prompts that are in the training data. A prompt known by heart may well have twice the acceleration of others, and
# so many of them move a median by less than most intervals are wide.
MAX_OVERLAP = 0.05


def find_faults(
    samples: Samples, arms: dict[str, Any], bench: dict[str, Any], greedy: bool, near_ties: float
) -> dict[str, str]:
    """Why the arms are not comparable, by load; a load that is comparable has no entry.

    arms: as in report.json. near_ties: share of prompts on which greedy texts may differ, as offline checks found.
    """
    whole = _whole_fault(bench)
    faults = {}
    for load in compared_loads(samples):
        baseline, medusa = (samples.rows(arm, load) for arm in ARMS)
        fault = (
            whole
            or _unequal(baseline, medusa, greedy)
            or (text_fault(served_parity(samples, [load]), near_ties) if greedy else None)
            or _busy_client(bench.get("client", {}), load)
            or _weak_baseline(arms, load, bench.get("traffic", {}).get("external"))
        )
        if fault:
            faults[load] = fault
    return faults


def _whole_fault(bench: dict[str, Any]) -> str | None:
    """What holds for all loads."""
    for arm in ARMS:
        told = bench.get("arms", {}).get(arm, {})
        replicas = told.get("replicas")
        if told.get("autoscales"):  # counted at both ends, it may still have changed in between
            return (
                f"the replicas of {arm} follow the load, so that it was not measured on one number of them; set "
                "num_replicas in place of autoscaling_config, and repeat the benchmark"
            )
        if replicas and replicas[0] != replicas[-1]:
            return (
                f"the number of replicas of {arm} went from {replicas[0]} to {replicas[-1]} during the benchmark; "
                "set num_replicas in place of autoscaling_config, and repeat it"
            )
    checks = bench.get("checks") or {}
    # Both arms got the same prompts, but none that a user would send, and the heads were trained on none like them.
    if doubled := checks.get("double_bos"):
        return (
            f"{doubled} prompts begin with two BOS tokens, since the chat template was applied and the tokenizer "
            "added one more; send messages, or text without a BOS"
        )
    overlap = checks.get("overlap") or {}
    if overlap.get("checked") and overlap["exact"] > MAX_OVERLAP * overlap["of"]:
        return (
            f"{overlap['exact']} of {overlap['of']} prompts are in the training data, where {MAX_OVERLAP:.0%} are "
            "allowed; the heads know them by heart, so send held-out prompts"
        )
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


def served_parity(samples: Samples, loads: list[str]) -> dict[str, int]:
    """Prompts that both arms answered, and on how many each pair of texts (load, round) is the same.

    `unstable` are prompts on which texts differ and the baseline itself does not always say the same: rounding that
    changes with the batch, which is not Medusa's doing.
    """
    texts: dict[int, dict[str, dict[tuple[str, int], str]]] = defaultdict(lambda: {arm: {} for arm in ARMS})
    for load in compared_loads(samples):
        for arm in ARMS:
            for row in samples.rows(arm, load):
                if row["error"] is None and row["text"] is not None:
                    texts[row["prompt"]][arm][load, row["round"]] = row["text"]
    counts: Counter[str] = Counter()
    for said in texts.values():
        baseline, medusa = (said[arm] for arm in ARMS)
        both = [place for place in baseline.keys() & medusa.keys() if place[0] in loads]
        if both:
            equal = all(baseline[place] == medusa[place] for place in both)
            counts.update(prompts=1, equal=equal, unstable=not equal and len(set(baseline.values())) > 1)
    return {key: counts[key] for key in ("prompts", "equal", "unstable")}


def text_fault(parity: dict[str, int], near_ties: float) -> str | None:
    differ = parity["prompts"] - parity["equal"] - parity["unstable"]
    if differ <= math.ceil(near_ties * parity["prompts"]):
        return None
    return (
        f"medusa's greedy text is not the baseline's on {differ} of {parity['prompts']} prompts, so they did not do "
        "the same work; compare the column text of requests.parquet"
    )


def _busy_client(shares: dict[str, dict[str, list[float]]], load: str) -> str | None:
    for arm in ARMS:
        if (share := max(shares.get(arm, {}).get(load) or [0])) >= MAX_CLIENT_SHARE:
            return (
                f"the client used {share:.0%} of a CPU core for {arm}, where {MAX_CLIENT_SHARE:.0%} is its limit, "
                "and measured itself; set GUIDELLM__MAX_WORKER_PROCESSES to 2 or more, or send from another machine"
            )
    return None


def _weak_baseline(arms: dict[str, Any], load: str, external: str | None) -> str | None:
    measured = [arms.get(arm, {}).get("load", {}).get(load, {}) for arm in ("baseline", external or "")]
    own, other = (found.get("output_tokens_per_s") for found in measured)
    if not own or not other or own >= MIN_BASELINE_RATE * other:
        return None
    return (
        f"the baseline is weak: it makes {own:.1f} tokens/s where {external} makes {other:.1f}, which is less than "
        f"{MIN_BASELINE_RATE:.0%} of it, so a speedup over it would be overstated"
    )


def in_words(load: str) -> str:
    """The load as it reads in a sentence."""
    if rate(load):
        return f"at {rate(load):g} requests/s ({load.partition('=')[0]})"
    number = concurrency(load)
    if number is None:
        return "under full load"
    return "one at a time" if number == 1 else f"with {number} at a time"
