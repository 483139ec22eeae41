"""Medusa, the baseline and transformers in one process, in turns -> tokens per second, and what a step costs.

Predicted speedup, tokens per step over what a step costs beside one of the baseline, and the measured one should agree:
where they do not, time goes by outside the steps.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.reference import own_attention
from medusa_ray.medusa.scheduler import Request


def compare_speed(
    baseline: Engine, medusa: Engine, prompts: list[list[int]], max_new_tokens: int
) -> dict[str, Any]:
    """Seconds of each reply, one prompt at a time, all arms on each prompt before the next one.

    Medians over prompts; `speedup` is the median of baseline over Medusa on the same prompt.
    """
    model: Any = baseline.model

    def plain(prompt: list[int]) -> int:
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
        )
        return out.shape[1] - len(prompt)

    def engine(engine: Engine) -> Callable[[list[int]], int]:
        return lambda prompt: len(engine.generate([prompt], max_new_tokens)[0].token_ids)

    arms: dict[str, Callable[[list[int]], int]] = {"baseline": engine(baseline), "medusa": engine(medusa)}
    seconds: dict[str, list[float]] = {name: [] for name in (*arms, "transformers")}
    rates: dict[str, list[float]] = {name: [] for name in seconds}

    def measure(name: str, reply: Callable[[list[int]], int], prompt: list[int], is_warm: bool) -> None:
        start = time.perf_counter()
        num_tokens = reply(prompt)
        taken = time.perf_counter() - start
        if is_warm:
            seconds[name].append(taken)
            rates[name].append(num_tokens / taken)

    for i, prompt in enumerate([*prompts[:2], *prompts]):  # the first two warm up
        order = list(arms) if i % 2 else list(reversed(arms))
        for name in order:
            measure(name, arms[name], prompt, i >= 2)
        with own_attention(model):
            measure("transformers", plain, prompt, i >= 2)
    ratios = [b / m for b, m in zip(seconds["baseline"], seconds["medusa"], strict=True)]
    return {
        **{name: {"tokens_per_s": statistics.median(values)} for name, values in rates.items()},
        "speedup": statistics.median(ratios),
        "prompts": len(prompts),
        "mode": baseline.mode,
        "threads": torch.get_num_threads(),
    }


@dataclass
class Tally:
    """What one arm did at one batch size."""

    num_tokens: int = 0  # the prefill's left out
    num_steps: int = 0  # of each sequence
    seconds: float = 0.0  # of whole replies, less those of their prefills
    step_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))  # by rows


def by_batch(
    baseline: Engine, medusa: Engine, prompts: list[list[int]], sizes: list[int], max_new_tokens: int
) -> dict[str, dict[str, float]]:
    """Figures by batch size, as records.py has them under engine.by_batch: of decoding, prefills taken out.

    Each group of prompts is answered by both arms before the next one; one further group warms up. A size of more
    prompts than there are is left out.
    """
    found = {}
    for size in sizes:
        groups = [prompts[i : i + size] for i in range(0, len(prompts) - size + 1, size)]
        tallies = {"baseline": (baseline, Tally()), "medusa": (medusa, Tally())}
        for i, group in enumerate(groups):
            if i == 0:
                for engine, _ in tallies.values():
                    _reply(engine, group, max_new_tokens, Tally())
            for engine, tally in list(tallies.values())[:: 1 if i % 2 else -1]:
                _reply(engine, group, max_new_tokens, tally)
        if groups:
            found[str(size)] = _figures(tallies["baseline"][1], tallies["medusa"][1])
    return found


def _reply(engine: Engine, prompts: list[list[int]], max_new_tokens: int, tally: Tally) -> None:
    """Answers all prompts at once, and adds to the tally what that took."""
    started = time.perf_counter()
    engine.generate(prompts, 1)
    prefill_s = time.perf_counter() - started
    started = time.perf_counter()
    sequences = [engine.add(Request(prompt, max_new_tokens)) for prompt in prompts]
    while not all(sequence.finish_reason for sequence in sequences):
        rows, has_prefill, step_started = engine.num_running, engine.num_waiting > 0, time.perf_counter()
        engine.step()
        if rows and not has_prefill:
            tally.step_s[rows].append(time.perf_counter() - step_started)
    tally.seconds += time.perf_counter() - started - prefill_s
    tally.num_tokens += sum(len(sequence.token_ids) - 1 for sequence in sequences)
    tally.num_steps += sum(sequence.num_steps for sequence in sequences)


def _figures(baseline: Tally, medusa: Tally) -> dict[str, float]:
    # At each number of rows that both had, as often as Medusa had it: a batch shrinks otherwise where steps are fewer.
    shared = [(len(medusa.step_s[rows]), rows) for rows in medusa.step_s if rows in baseline.step_s]
    cost = sum(n * statistics.fmean(medusa.step_s[rows]) for n, rows in shared) / sum(
        n * statistics.fmean(baseline.step_s[rows]) for n, rows in shared
    )
    acceleration = medusa.num_tokens / medusa.num_steps
    rates = {name: tally.num_tokens / tally.seconds for name, tally in (("baseline", baseline), ("medusa", medusa))}
    return {
        **rates,
        "acceleration": acceleration,
        "step_cost_ratio": cost,
        "predicted": acceleration / cost,
        "measured": rates["medusa"] / rates["baseline"],
    }
