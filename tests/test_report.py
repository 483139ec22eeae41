"""Rows worked by hand -> figures and verdicts; a whole synthetic run -> a page that stands alone."""

import doctest
import json
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medusa_ray import config, provenance, records, report
from medusa_ray.report import numbers, predicted, ratios, schema
from medusa_ray.report.definitions import DEFINITIONS
from medusa_ray.report.numbers import tpot_ms
from medusa_ray.report.samples import Samples
from medusa_ray.report.summary import Inputs, summarise

WINNING = {
    "synchronous": 1.46,
    "concurrency=1": 1.44,
    "concurrency=4": 1.27,
    "concurrency=16": 1.05,
    "throughput": 0.97,
}
PARITY = {"parity": {"prompts": 200, "token_exact": 200}}


def request_row(**changes: Any) -> dict[str, Any]:
    """A good request of the baseline: 0.9 s for the nine tokens after the first."""
    return {
        "arm": "baseline",
        "load": "synchronous",
        "round": 0,
        "prompt": 0,
        "start_s": 0.0,
        "latency_s": 1.0,
        "ttft_s": 0.1,
        "prompt_tokens": 50,
        "output_tokens": 10,
        "num_steps": None,
        "accepted_histogram": None,
        "events": None,
        "last_s": None,
        "wait_s": None,
        "draft_tokens": None,
        "category": None,
        "text": "",
        "error": None,
    } | changes


def streams(load: str) -> int:
    return numbers.concurrency(load) or 32


def traffic_rows(
    speedups: dict[str, float], num_prompts: int = 40, num_rounds: int = 2
) -> list[dict[str, Any]]:
    """Rows of both arms: medusa's time per token is the baseline's over the load's speedup, with noise."""
    draw, rows = random.Random(0), []
    lengths = [draw.randint(20, 44) for _ in range(num_prompts)]
    for load in speedups:
        for round_ in range(num_rounds):
            for arm in ("baseline", "medusa"):
                token_s = 0.0062 * (1 + 0.09 * streams(load)) / (speedups[load] if arm == "medusa" else 1)
                free_s = [60.0 * round_ + (30 if arm == "medusa" else 0)] * streams(
                    load
                )  # when each slot is free
                for prompt, length in enumerate(lengths):
                    slot = free_s.index(min(free_s))
                    ttft_s = 0.012 * (1 + 0.15 * streams(load)) * draw.uniform(0.9, 1.3)
                    latency_s = ttft_s + (length - 1) * token_s * draw.lognormvariate(0, 0.08)
                    threes, twos = length // 8, length // 8
                    histogram = [length // 4, length // 6, twos, threes] if arm == "medusa" else [length - 1]
                    row = request_row(
                        arm=arm, load=load, round=round_, prompt=prompt, start_s=free_s[slot], ttft_s=ttft_s
                    )
                    row |= {"latency_s": latency_s, "output_tokens": length, "accepted_histogram": histogram}
                    row |= {
                        "num_steps": sum(histogram),
                        "events": 1 + sum(histogram),
                        "text": f"reply {prompt}",
                    }
                    row |= {"draft_tokens": 5 * sum(histogram) if arm == "medusa" else 0}
                    rows.append(row | {"category": ("joins", "counts", "others")[prompt % 3]})
                    free_s[slot] += latency_s
    return rows


def open_rows(rates: tuple[int, ...] = (4, 8), num_prompts: int = 12) -> list[dict[str, Any]]:
    """Rows of a Poisson load: what is due waits for the sender the longer, the higher the rate."""
    draw, rows = random.Random(1), []
    for rate in rates:
        for arm, token_s in (("baseline", 0.008), ("medusa", 0.006)):
            due_s = 0.0
            for prompt in range(num_prompts):
                due_s += draw.expovariate(rate)
                wait_s = draw.uniform(0, 0.002 * rate)
                row = request_row(
                    arm=arm, load=f"poisson={rate}", prompt=prompt, start_s=due_s + wait_s, wait_s=wait_s
                )
                ttft_s = 0.02 * draw.uniform(0.9, 1.5)
                rows.append(row | {"ttft_s": ttft_s, "latency_s": ttft_s + 19 * token_s, "output_tokens": 20})
    return rows


STEP_TIMES = {
    str(rows): {
        str(nodes): 0.004 * (1 + 0.1 * rows) * (1 + 0.02 * nodes * (1 + rows / 16)) for nodes in (1, 4, 9)
    }
    for rows in (1, 2, 4, 8, 16)
}
RAMP = {
    "arm": "medusa",
    "steps": [[0, 2], [30, 16], [60, 2]],
    "replicas": [[0, 1, 1], [30, 1, 3], [40, 2, 3], [50, 3, 3], [80, 1, 1]],
    "latency": [[5, 0.2, 0.3], [35, 0.9, 1.6], [55, 0.4, 0.6], [80, 0.2, 0.3]],
}


def write_run(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """A finished run, as the stages would have left it; a part set to None is left out."""
    losses = [max(0.2, 5.5 * 0.985**step) for step in range(0, 400, 10)]
    parts = {
        "heads/config.json": {
            "base_model_name_or_path": "demo/<base> $8M$",
            "medusa_num_heads": 3,
            "medusa_num_layers": 1,
        },
        "heads/tree.json": {
            "paths": [[0], [0, 0], [1], [0, 0, 0], [0, 1], [2], [1, 0], [0, 0, 1]],
            "nodes": 8,
            "calibrated_on": 100,
        },
        "heads/accuracy.json": {
            "heads": {"top1": [0.531, 0.432, 0.334], "top5": [0.81, 0.68, 0.55]},
            "acceptance": {"chain": 1.97, "calibrated_8": 2.21, "out_of_domain_chain": 1.62},
        },
        "heads/training.jsonl": [
            {
                "step": 10 * i,
                "head_loss": [loss * (1 + 0.3 * head) for head in range(3)],
                "top1": [(0.55 - 0.1 * head) * (1 - 0.9 * loss / 5.5) for head in range(3)],
                "held_out": {"tokens_per_step": {"chain": 2.0 - loss / 6, "tree_8": 2.3 - loss / 6}}
                if i % 10 == 0
                else None,
            }
            for i, loss in enumerate(losses)
        ],
        "evaluation/evaluation.json": {
            "quality": {"exact_match": 0.874},
            "parity": {"prompts": 200, "token_exact": 200, "near_ties": 0},
            "model": {"dtype": "float32", "num_parameters": 8_210_000},
            "engine": {
                "baseline": {"tokens_per_s": 161.0},
                "medusa": {"tokens_per_s": 232.4},
                "transformers": {"tokens_per_s": 118.2},
                "speedup": 1.443,
                "mode": "eager",
                "threads": 1,
                "by_batch": {
                    "1": {
                        "baseline": 161.0,
                        "medusa": 232.4,
                        "acceleration": 2.21,
                        "step_cost_ratio": 1.4,
                        "predicted": 2.21 / 1.4,
                        "measured": 1.443,
                    }
                },
            },
        },
        "evaluation/quality.json": {"execution_accuracy": 0.902},
        "bench/bench.json": {
            "hardware": {"cpu": "AMD EPYC 9R14", "cores": 2, "memory_gib": 15.6},
            "versions": {"medusa_ray": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "guidellm": "0.8.1"},
            "traffic": {
                "targets": {"medusa": {"url": "http://127.0.0.1:8000/medusa"}},
                "rounds": 2,
                "num_warmup": 8,
                "max_tokens": 64,
                "max_concurrency": 32,
                "temperature": 0.0,
                "slo": {"ttft_ms": 40.0, "tpot_ms": 12.0, "latency_s": None, "share": 0.95},
            },
            "arms": {"medusa": {"info": {"step_times": STEP_TIMES}, "replicas": [1, 1]}},
            "client": {"medusa": {"throughput": [0.3, 0.4]}},
            "checks": {"double_bos": 0, "overlap": {"checked": True, "exact": 0, "near": 1, "of": 12}},
            "ramp": RAMP,
            "serve_paths": {
                "default proxy": {"ttft_ms": 15.0, "tpot_ms": 4.81},
                "HAProxy, throughput settings": {"ttft_ms": 2.7, "tpot_ms": 4.43},
            },
        },
    } | changes
    for file, part in parts.items():
        if part is not None:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            lines = part if isinstance(part, list) else [part]
            (folder / file).write_text("\n".join(json.dumps(line) for line in lines))
    if rows:
        (folder / "bench").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=records.REQUESTS), folder / "bench/requests.parquet")
    return folder


def verdict_of(
    rows: list[dict[str, Any]], evaluation: dict[str, Any] = PARITY, **bench: Any
) -> dict[str, Any]:
    return summarise(Inputs(requests=rows, evaluation=evaluation, bench=bench))["verdict"]


def measure_load(rows: list[dict[str, Any]], slo: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of rows that are all of one arm at one load."""
    return numbers.measure_load(Samples(rows), rows[0]["arm"], rows[0]["load"], slo or {})


def measure_arm(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return numbers.measure_arm(Samples(rows), rows[0]["arm"], {})


# ------------------------------------------------------------------------------------------------ one arm


def test_the_blog_posts_own_numbers_come_out_of_its_formula():
    """Acceleration 1.65, and 1.19x and 1.06x on the wall clock: the doctest of `acceleration`."""
    for module in (numbers, ratios, predicted):
        result = doctest.testmod(module)
        assert result.attempted >= 1
        assert result.failed == 0


def test_figures_of_a_load_are_those_worked_by_hand():
    rows = [
        request_row(prompt=0, start_s=0.0),  # TPOT 900 ms / 9
        request_row(prompt=1, start_s=1.0, latency_s=2.2, ttft_s=0.2, output_tokens=11),  # TPOT 2000 ms / 10
        request_row(prompt=2, start_s=3.2, latency_s=0.4, ttft_s=0.4, output_tokens=1),  # no TPOT
        request_row(prompt=3, start_s=3.6, latency_s=0.4, ttft_s=None, output_tokens=0, error="500"),
    ]
    measured = measure_load(rows)
    assert measured["requests"] == 4
    assert measured["failed"] == 1
    assert measured["request_latency_s"] == 1.0
    assert measured["ttft_ms"] == pytest.approx(200)
    assert measured["tpot_ms"] == pytest.approx((100 + 200) / 2)
    assert measured["itl_ms"] == pytest.approx((900 + 2000) / (9 + 10))  # long replies weigh more
    assert measured["requests_per_s"] == pytest.approx(3 / 4.0)  # the failure's time is part of the window
    assert measured["output_tokens_per_s"] == pytest.approx(22 / 4.0)
    assert measured["p99"]["tpot_ms"] == pytest.approx(199)


def test_rates_are_medians_over_rounds():
    """A window over all rounds would count the pauses in which the other arm was measured."""
    rows = [
        request_row(round=n, start_s=100.0 * n, latency_s=latency_s) for n, latency_s in enumerate([1, 2, 4])
    ]
    assert measure_load(rows)["requests_per_s"] == pytest.approx(1 / 2)


def test_a_load_that_only_failed_has_counts_and_no_times():
    measured = measure_load([request_row(error="timeout", latency_s=None, ttft_s=None)])
    assert (measured["requests"], measured["failed"]) == (1, 1)
    assert measured["tpot_ms"] is None
    assert measured["requests_per_s"] is None


def test_acceptance_pools_the_histograms_of_all_good_requests():
    rows = [
        request_row(accepted_histogram=[2, 1, 1]),
        request_row(load="throughput", accepted_histogram=[1, 1, 1, 1]),
        request_row(accepted_histogram=[50], error="cut"),
    ]
    arm = measure_arm(rows)
    assert arm["acceptance_histogram"] == [3, 2, 2, 1]
    assert arm["acceleration"] == pytest.approx((8 + 2 * 1 + 2 * 2 + 1 * 3) / 8)
    assert arm["accepted_per_position"] == pytest.approx([5 / 8, 3 / 8, 1 / 8])


def test_a_server_that_tells_only_steps_or_nothing_is_measured_as_far_as_it_tells():
    told = measure_arm([request_row(output_tokens=10, num_steps=6)])
    assert told["acceleration"] == pytest.approx(9 / 6)
    assert measure_arm([request_row()])["acceleration"] is None


# ------------------------------------------------------------------------------------------------ two arms


def both_arms(baseline_s: list[float], medusa_s: list[float], num_rounds: int = 1) -> list[dict[str, Any]]:
    """One request per prompt, arm and round, with these latencies."""
    return [
        request_row(arm=arm, prompt=prompt, round=round_, latency_s=0.1 + latency_s, start_s=10.0 * prompt)
        for arm, latencies in (("baseline", baseline_s), ("medusa", medusa_s))
        for round_ in range(num_rounds)
        for prompt, latency_s in enumerate(latencies)
    ]


def drawn(rows: list[dict[str, Any]]) -> tuple[float, ...]:
    """Speedup per output token, and its interval."""
    ratio = Samples(rows).quotient("synchronous", tpot_ms)
    assert ratio is not None
    assert ratio.interval is not None
    return (ratio.point, *ratio.interval)


def test_speedup_is_the_ratio_of_medians_over_pairs():
    ratio = Samples(both_arms([3.0, 4.0, 9.0], [1.0, 2.0, 8.0])).quotient("synchronous", tpot_ms)
    assert ratio is not None
    assert ratio.point == pytest.approx(4.0 / 2.0)
    assert ratio.interval is None  # three prompts say nothing of the noise


def test_only_prompts_that_both_arms_answered_count():
    """Medusa fails at once on the slow prompts; without pairing that would pass for a speedup."""
    rows = both_arms([2.0] * 5 + [9.0] * 6, [2.0] * 5 + [0.1] * 6)
    for row in rows:
        if row["arm"] == "medusa" and row["prompt"] >= 5:
            row["error"] = "500"
    assert drawn(rows) == pytest.approx((1.0, 1.0, 1.0))


def test_a_failure_takes_its_round_out_and_leaves_the_prompts_other_rounds():
    rows = both_arms([2.0] * 6, [1.0] * 6, num_rounds=2)
    for row in rows:
        if (row["arm"], row["prompt"], row["round"]) == ("medusa", 0, 1):
            row |= {"error": "500", "latency_s": 100.0}
    assert drawn(rows) == pytest.approx((2.0, 2.0, 2.0))


def test_the_interval_holds_the_point_and_is_the_same_every_time():
    draw = random.Random(1)
    rows = both_arms([draw.uniform(2, 3) for _ in range(30)], [draw.uniform(1.4, 2.2) for _ in range(30)])
    first, second = drawn(rows), drawn(rows)
    assert first == second
    point, low, high = first
    assert low < point < high


def test_repeating_a_round_does_not_narrow_the_interval():
    """Rounds of one prompt are no new prompts: drawing them apart would halve the interval for nothing."""
    draw = random.Random(2)
    baseline_s, medusa_s = ([draw.uniform(low, low + 1) for _ in range(21)] for low in (2, 1))
    once = drawn(both_arms(baseline_s, medusa_s))
    thrice = drawn(both_arms(baseline_s, medusa_s, num_rounds=3))
    assert thrice == pytest.approx(once)


# ------------------------------------------------------------------------------------------------ the verdict


def test_medusa_ships_up_to_the_last_concurrency_that_pays():
    verdict = verdict_of(traffic_rows(WINNING))
    assert verdict["ship"] is True
    assert verdict["up_to_concurrency"] == 4
    assert verdict["reason"].startswith("Ship up to concurrency 4: with 4 at a time the speedup per")
    assert "n = 80 requests per arm" in verdict["reason"]
    assert "tokens per step" in verdict["reason"]
    assert "with 16 at a time the speedup per output token is 1.0" in verdict["reason"]


def test_medusa_that_is_slower_is_not_shipped():
    verdict = verdict_of(traffic_rows(dict.fromkeys(WINNING, 0.8)))
    assert (verdict["ship"], verdict["up_to_concurrency"]) == (False, 0)
    assert verdict["reason"].startswith("Do not ship: one at a time the speedup per output token is 0.8")


def test_a_gap_in_the_loads_is_not_jumped_over():
    """Passing at 16 says nothing for 4, where it failed; synchronous and concurrency=1 are one load."""
    verdict = verdict_of(traffic_rows({"synchronous": 1.5, "concurrency=4": 1.0, "concurrency=16": 1.5}))
    assert verdict["up_to_concurrency"] == 1
    assert verdict_of(traffic_rows({"synchronous": 1.5, "concurrency=1": 1.0}))["ship"] is False


@pytest.mark.parametrize(
    ("evaluation", "ships"),
    [
        ({}, False),
        ({"parity": {"prompts": 200, "token_exact": 199, "near_ties": 0}}, False),
        ({"parity": {"prompts": 200, "token_exact": 199, "near_ties": 1}}, True),
    ],
)
def test_text_that_differs_or_was_not_compared_never_ships(evaluation, ships):
    rows = [row | {"text": None} for row in traffic_rows({"synchronous": 1.5}, 12)]
    assert verdict_of(rows, evaluation)["ship"] is ships


def test_the_same_text_as_served_is_parity_enough():
    """An engine of another make has no offline evaluation."""
    verdict = verdict_of(traffic_rows({"synchronous": 1.5}, 12), {})
    assert verdict["ship"] is True
    assert "the text is the same on 12 of 12 prompts" in verdict["reason"]


def test_a_later_first_token_is_a_reason_not_to_ship():
    rows = traffic_rows({"synchronous": 1.5})
    for row in rows:
        if row["arm"] == "medusa":
            row["ttft_s"], row["latency_s"] = 1.3 * row["ttft_s"], row["latency_s"] + 0.3 * row["ttft_s"]
    assert "first token takes" in verdict_of(rows)["reason"]


def test_a_long_tail_is_a_reason_not_to_ship():
    rows = traffic_rows({"synchronous": 1.5}, num_prompts=60)
    for row in rows:
        if row["arm"] == "medusa" and row["prompt"] % 6 == 0:
            row["latency_s"] *= 4
    assert "p99 per output token" in verdict_of(rows)["reason"]


def failing(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"error": "500"} if row["arm"] == "medusa" and row["prompt"] == 3 else row


def cut_short(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"output_tokens": 20} if row["arm"] == "medusa" else row


def with_other_prompts(row: dict[str, Any]) -> dict[str, Any]:
    other = row["prompt"] + 1
    return row | {"prompt": other, "text": f"reply {other}"} if row["arm"] == "medusa" else row


@pytest.mark.parametrize(
    ("change", "why"),
    [(failing, "failed"), (cut_short, "greedy replies add up to"), (with_other_prompts, "the same prompts")],
)
def test_arms_that_cannot_be_compared_never_ship(change, why):
    """Each of these makes a slow arm look fast."""
    rows = [change(row) for row in traffic_rows({"synchronous": 1.5})]
    verdict = verdict_of(rows)
    assert verdict["ship"] is False
    assert verdict["reason"].startswith("Not comparable: one at a time")
    assert why in verdict["reason"]


def test_sampled_replies_may_differ_in_length():
    rows = [cut_short(row) for row in traffic_rows({"synchronous": 3.0})]
    assert verdict_of(rows, traffic={"temperature": 0.7})["ship"] is True


# ------------------------------------------------------------------------------------------------ the files


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """Folder of a run that has everything, with its report."""
    folder = write_run(tmp_path_factory.mktemp("run"), traffic_rows(WINNING, 12) + open_rows())
    report.run(str(folder))
    return folder


@pytest.fixture(scope="module")
def whole_page(whole_run) -> str:
    return (whole_run / "report/report.html").read_text(encoding="utf-8")


def test_report_json_has_the_keys_of_the_design_and_fits_its_schema(whole_run):
    written = json.loads((whole_run / "report/report.json").read_text())
    jsonschema.validate(written, json.loads((whole_run / "report/report.schema.json").read_text()))
    assert written["quality"] == {"exact_match": 0.874, "execution_accuracy": 0.902}
    assert set(written["acceptance"]) == {"chain", "calibrated_8", "served", "out_of_domain_chain"}
    assert written["engine"] == {
        "baseline": {"tokens_per_s": 161.0},
        "medusa": {"tokens_per_s": 232.4},
        "transformers": {"tokens_per_s": 118.2},
        "speedup": 1.443,
    }
    stable = {
        "requests", "failed", "requests_per_s", "request_latency_s", "ttft_ms", "tpot_ms", "itl_ms",
        "output_tokens_per_s", "p99",
    }  # fmt: skip
    assert list(written["arms"]["medusa"]["load"]) == [*WINNING, "poisson=4", "poisson=8"]
    assert stable <= set(written["arms"]["medusa"]["load"]["throughput"])
    assert {"output_tokens_per_s", "tpot", "ci95"} <= set(written["speedup"]["synchronous"])
    assert set(written["verdict"]) == {"ship", "up_to_concurrency", "reason"}
    assert written["model"]["engine_mode"] == "eager"
    assert provenance.read(str(whole_run / "report")) is not None


def test_the_schema_knows_every_key_that_is_written(whole_run):
    """A key that is written and not in the schema would be one that nobody may rely on."""
    written = json.loads((whole_run / "report/report.json").read_text())
    assert schema.Report.model_validate(written).model_dump(mode="json") == written
    schema.Report.model_validate(summarise(Inputs()))  # a run that has nothing yet


def test_a_finished_report_is_kept_until_an_input_changes(tmp_path):
    quality = tmp_path / "evaluation/quality.json"
    quality.parent.mkdir()
    quality.write_text('{"execution_accuracy": 0.9}')
    report.run(str(tmp_path))
    page = tmp_path / "report/report.html"
    page.write_text("kept")
    report.run(str(tmp_path))
    assert page.read_text() == "kept"
    quality.write_text('{"execution_accuracy": 0.5}')
    assert report.run(str(tmp_path))["quality"]["execution_accuracy"] == 0.5
    assert page.read_text() != "kept"


def test_a_folder_without_results_is_the_users_mistake(tmp_path):
    with pytest.raises(config.UserError, match="nothing to report"):
        report.run(str(tmp_path))
    assert not (tmp_path / "report").exists()


def test_the_table_has_a_row_per_load_and_arm_with_units():
    written = summarise(Inputs(requests=traffic_rows({"throughput": 1.2, "synchronous": 1.5}, 12)))
    headers, rows = report.table(written)
    assert headers[3:8] == [
        "Requests per Second", "Request Latency", "Time to First Token", "Inter Token Latency",
        "Output Token Throughput",
    ]  # fmt: skip
    assert [row[:3] for row in rows] == [
        ["synchronous", "baseline", "24"], ["synchronous", "medusa", "24"],
        ["throughput", "baseline", "24"], ["throughput", "medusa", "24"],
    ]  # fmt: skip
    assert rows[0][7].endswith(" tokens/sec")
    assert [rows[0][8], rows[0][10]] == ["1.00 tokens/step", "-"]
    assert rows[1][10].startswith("1.5") or rows[1][10].startswith("1.4")
    assert all(len(row) == len(headers) for row in rows)


def test_caveats_name_poor_answers_a_weak_baseline_and_failures():
    rows = [failing(row) for row in traffic_rows({"synchronous": 1.5}, 12)]
    engine = {"baseline": {"tokens_per_s": 70.0}, "transformers": {"tokens_per_s": 100.0}}
    poor = Inputs(requests=rows, evaluation={"quality": {"exact_match": 0.01}, "engine": engine})
    refusal, answers, baseline, failures = report.caveats(summarise(poor))
    assert refusal.startswith("No speedup one at a time: 0.0% of the requests to baseline failed")
    assert "says nothing about the answers' quality" in answers
    assert "The baseline is weak" in baseline
    assert failures.startswith("2 of 24 requests to medusa failed")
    assert report.caveats(summarise(Inputs(requests=traffic_rows({"synchronous": 1.5}, 12)))) == []


class Page(HTMLParser):
    """What a browser would make of the page: text, attributes, and tags that were not closed."""

    EMPTY = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_no_network_and_no_script(whole_page):
    page = Page(whole_page)
    assert page.open == []
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "metadata"} == set()
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in ("src", "xmlns", "onload", "onclick"), tag
            if name in ("href", "xlink:href"):
                assert (value or "").startswith("#"), tag
    assert whole_page.count("url(") == whole_page.count("url(#")
    assert whole_page.count("http") == 1  # the target in the config, which is text
    assert len(whole_page.encode()) < 2_000_000


def test_every_picture_says_in_words_what_it_shows(whole_page):
    pictures = [attributes for tag, attributes in Page(whole_page).tags if tag == "svg"]
    assert len(pictures) == 20
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in pictures)
    ids = [attributes["id"] for _, attributes in Page(whole_page).tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_what_comes_from_data_stays_text(whole_page):
    assert "<base>" not in whole_page
    assert "demo/<base> $8M$" in Page(whole_page).text


def test_acceleration_and_speedup_stand_together_with_n_and_hardware(whole_page):
    head = Page(whole_page[: whole_page.index("<h2")]).text
    for part in ("Speedup", "Acceleration", "tokens per step", "synchronous", "AMD EPYC 9R14"):
        assert part in head
    assert "n\u00a0=\u00a024" in head


def test_a_run_without_bench_or_evaluation_names_what_is_missing(tmp_path):
    absent = (
        "bench/bench.json",
        "evaluation/evaluation.json",
        "evaluation/quality.json",
        "heads/training.jsonl",
    )
    accuracy = {"heads": {"top1": [0.5], "top5": [0.8]}, "acceptance": {"chain": 1.5}}
    changes = dict.fromkeys(absent) | {"heads/accuracy.json": accuracy}
    written = report.run(str(write_run(tmp_path, [], **changes)))
    assert written["arms"] == {}
    assert written["verdict"]["reason"].startswith("Not measured")
    page = Page((tmp_path / "report/report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert "Not measured in this run: speed of both arms, parity, exact match" in page.text
    assert "acceptance out of domain" in page.text


def test_a_losing_run_says_so_in_the_page(tmp_path):
    evaluation = {"quality": {"exact_match": 0.01}, **PARITY, "engine": None}
    folder = write_run(
        tmp_path, traffic_rows({"synchronous": 0.8}, 12), **{"evaluation/evaluation.json": evaluation}
    )
    report.run(str(folder))
    text = (folder / "report/report.html").read_text(encoding="utf-8")
    assert '<div class="verdict no"><strong>Do not ship</strong>' in text
    assert "says nothing about the answers&#x27; quality" in text


def test_the_readme_and_the_page_have_the_same_definitions(whole_page):
    """One page of definitions: what README promises is what the report computes."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    words = " ".join(readme.split())
    for term, meaning in DEFINITIONS.items():
        assert f"* **{term}.** {meaning}" in words
        assert meaning in Page(whole_page).text
