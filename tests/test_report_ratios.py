"""Rows worked by hand -> percentiles, goodput, speedup at equal latency, break-even and predicted speedup."""

import random
from typing import Any

import numpy as np
import pytest
from test_report import measure_arm, measure_load, open_rows, request_row, traffic_rows

from medusa_ray.report.numbers import in_order, measure_goodput, tpot_ms, wilson
from medusa_ray.report.predicted import predict, step_cost_ratio
from medusa_ray.report.ratios import crossing, measure_break_even, measure_categories, measure_equal_latency
from medusa_ray.report.samples import Samples
from medusa_ray.report.summary import Inputs, summarise
from medusa_ray.report.text import caveats


def closed_rows(arm: str, loads: dict[int, float], num_prompts: int = 8) -> list[dict[str, Any]]:
    """So many requests in flight, each of 11 tokens in so many seconds, the first token at once."""
    rows = []
    for number, latency_s in loads.items():
        for prompt in range(num_prompts):
            turn = prompt // number
            row = request_row(arm=arm, load=f"concurrency={number}", prompt=prompt, start_s=turn * latency_s)
            rows.append(row | {"latency_s": latency_s, "ttft_s": 1e-9, "output_tokens": 11})
    return rows


# ------------------------------------------------------------------------------------------------ one arm


def test_time_per_token_ends_with_the_last_content_and_not_with_the_last_byte():
    """A server that sends usage late is not slow at decoding."""
    row = request_row(latency_s=3.0, last_s=1.0, ttft_s=0.1, output_tokens=10)
    assert tpot_ms(row) == pytest.approx(100)
    assert tpot_ms(row | {"last_s": None}) == pytest.approx(2900 / 9)


def test_a_gap_is_between_events_and_the_time_per_token_between_tokens():
    """Nine tokens after the first in three events: 0.9 s are 0.3 s a gap and 0.1 s a token."""
    measured = measure_load([request_row(events=4)])
    assert measured["p50"]["gap_ms"] == pytest.approx(300)
    assert measured["tpot_ms"] == pytest.approx(100)
    assert measured["acceleration_at_client"] == pytest.approx(9 / 3)
    assert measure_load([request_row(events=1)])["p50"]["gap_ms"] is None


def test_percentiles_are_over_the_good_requests_of_all_rounds():
    rows = [request_row(prompt=n, latency_s=float(n), round=n % 2) for n in range(1, 102)]
    measured = measure_load([*rows, request_row(prompt=0, latency_s=999.0, error="500")])
    assert measured["request_latency_s"] == measured["p50"]["request_latency_s"] == 51
    assert measured["p95"]["request_latency_s"] == 96
    assert measured["p99"]["request_latency_s"] == 100


def test_what_an_open_load_lets_wait_counts_as_latency_and_as_time_to_first_token():
    """Without it a sender that cannot keep up hides the queue (coordinated omission)."""
    measured = measure_load([request_row(load="poisson=2", wait_s=0.5)])
    assert measured["request_latency_s"] == pytest.approx(1.5)
    assert measured["ttft_ms"] == pytest.approx(600)
    assert measured["tpot_ms"] == pytest.approx(100)
    assert measured["p99"]["wait_s"] == pytest.approx(0.5)


def test_the_interval_of_a_rate_is_of_requests_and_tokens_over_latency():
    """All alike: no noise, an interval of no width. An open load's rate is what it was told to send, and has none."""
    rows = closed_rows("baseline", {2: 0.5})
    measured = measure_load(rows)
    assert measured["output_tokens_per_s"] == pytest.approx(2 * 11 / 0.5)
    assert measured["ci95"]["output_tokens_per_s"] == pytest.approx([44, 44])
    assert measured["ci95"]["requests_per_s"] == pytest.approx([4, 4])
    opened = measure_load([row | {"load": "constant=4"} for row in rows])
    assert opened["ci95"]["output_tokens_per_s"] is None
    assert opened["ci95"]["tpot_ms"] is not None


def test_the_interval_of_a_rate_holds_what_other_prompts_would_have_given():
    """Of 40 requests half take 1 s and half 3 s; a draw of 40 has 20 +- 3.2 of each, so 11 tokens over 2 +- 0.16 s."""
    rows = [
        request_row(prompt=n, start_s=2.0 * n, latency_s=1.0 if n % 2 else 3.0, output_tokens=11)
        for n in range(40)
    ]
    low, high = measure_load(rows)["ci95"]["output_tokens_per_s"]
    rate = 40 * 11 / 79  # the last ends at 79 s
    assert low / rate == pytest.approx(2 / 2.31, rel=0.03)
    assert high / rate == pytest.approx(2 / 1.69, rel=0.03)


def test_rounds_that_differ_widen_the_interval():
    """A machine that was busy during one round: drawing prompts alone would not see it."""
    rows = [
        request_row(arm=arm, prompt=prompt, round=round_, latency_s=0.1 + 0.9 * factor)
        for arm, factors in (("baseline", (1.0, 1.0)), ("medusa", (1.0, 1.3)))
        for round_, factor in enumerate(factors)
        for prompt in range(10)
    ]
    ratio = Samples(rows).quotient("synchronous", tpot_ms)
    assert ratio is not None
    assert ratio.interval == pytest.approx([1 / 1.3, 1.0])


def test_acceptance_by_position_is_of_all_steps_and_of_those_that_came_so_far():
    rows = [
        request_row(num_steps=8, accepted_histogram=[3, 2, 2, 1], draft_tokens=40),
        request_row(prompt=1, num_steps=2, accepted_histogram=[2], draft_tokens=10),
    ]
    arm = measure_arm(rows)
    assert arm["accepted_per_position"] == pytest.approx([0.5, 0.3, 0.1])
    assert arm["accepted_per_position_conditional"] == pytest.approx([0.5, 3 / 5, 1 / 3])
    assert arm["draft_acceptance_rate"] == pytest.approx(9 / 50)
    assert arm["nodes_per_step"] == pytest.approx(1 + 50 / 10)


def test_goodput_counts_what_met_every_limit():
    rows = [request_row(prompt=n, start_s=float(n)) for n in range(10)]
    rows[0] |= {"ttft_s": 0.3}
    rows[1] |= {"latency_s": 2.0, "last_s": 2.0}
    rows[2] |= {"error": "500"}
    good = measure_goodput(rows, {"ttft_ms": 200, "tpot_ms": 150, "share": 0.8})
    assert good == {
        "requests_per_s": pytest.approx(0.7),
        "share": 0.7,
        "ci95": wilson(7, 10),
        "attained": None,
    }
    assert measure_goodput(rows, {"ttft_ms": None, "tpot_ms": None, "share": 0.95}) is None


def test_wilsons_interval_is_that_of_the_textbook():
    """Newcombe (1998), table I: 81 of 263 and 15 of 148."""
    assert wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert wilson(15, 148) == pytest.approx([0.0624, 0.1605], abs=5e-5)
    assert wilson(0, 20) == pytest.approx([0, 0.1611], abs=5e-5)


def test_an_slo_is_attained_when_the_whole_interval_is():
    rows = [request_row(prompt=n) for n in range(200)]
    assert measure_goodput(rows, {"latency_s": 1.0, "share": 0.95})["attained"] is True
    assert measure_goodput(rows, {"latency_s": 0.9, "share": 0.95})["attained"] is False
    assert measure_goodput(rows[:10], {"latency_s": 1.0, "share": 0.95})["attained"] is None


def test_loads_stand_in_order_of_what_they_ask():
    loads = [
        "poisson=10",
        "throughput",
        "concurrency=16",
        "poisson=2.5",
        "synchronous",
        "constant=4",
        "concurrency=4",
    ]
    assert in_order(loads) == [
        "synchronous", "concurrency=4", "concurrency=16", "throughput", "constant=4", "poisson=2.5", "poisson=10",
    ]  # fmt: skip


def test_a_sender_that_falls_behind_its_schedule_is_a_caveat():
    """What it cost is in the latency, and nobody knows whether the server or the sender was slow."""
    rows = open_rows((4,))
    late = [row | {"wait_s": 1.5} for row in rows if row["arm"] == "medusa"]
    assert caveats(summarise(Inputs(requests=rows))) == []
    assert caveats(summarise(Inputs(requests=late))) == [
        "Requests to medusa at 4 requests/s (poisson) were sent 1.50 s after they were due (median), which is in their "
        "latency: the server or the client could not keep up with the schedule."
    ]


# ------------------------------------------------------------------------------------------------ two arms


def test_speedup_at_equal_latency_is_read_off_the_line_between_measured_loads():
    """Per token: baseline 100 ms at 1 and 200 ms at 4; medusa 50 ms at 1 and 150 ms at 4, so 100 ms half-way."""
    rows = closed_rows("baseline", {1: 1.0, 4: 2.0}) + closed_rows("medusa", {1: 0.5, 4: 1.5})
    first, second = measure_equal_latency(Samples(rows), {})["tpot_ms"]
    assert (first["load"], first["at"]) == ("concurrency=1", pytest.approx(100))
    assert first["baseline"] == pytest.approx(11)
    assert first["medusa"] == pytest.approx((22 + 4 * 11 / 1.5) / 2)
    assert first["ratio"] == pytest.approx(first["medusa"] / 11)
    assert first["ci95"] == pytest.approx([first["ratio"]] * 2)
    # No load of medusa's is as slow as the baseline's at 4.
    assert (second["at"], second["medusa"], second["ratio"], second["ci95"]) == (
        pytest.approx(200),
        None,
        None,
        None,
    )


def test_a_load_that_is_not_comparable_is_in_no_curve():
    rows = closed_rows("baseline", {1: 1.0, 4: 2.0}) + closed_rows("medusa", {1: 0.5, 4: 1.5})
    assert [
        found["medusa"] for found in measure_equal_latency(Samples(rows), {"concurrency=4": "why"})["tpot_ms"]
    ] == [None]


def test_break_even_is_where_the_line_over_the_logarithm_crosses_one():
    """Twice as fast at 1, two thirds as fast at 4: 1.0 is three quarters of the way, at 4 ** 0.75."""
    rows = closed_rows("baseline", {1: 1.0, 4: 2.0}) + closed_rows("medusa", {1: 0.5, 4: 3.0})
    found = measure_break_even(Samples(rows), {})["tpot"]
    assert found["concurrency"] == pytest.approx(4**0.75)
    assert found["ci95"] == pytest.approx([4**0.75] * 2)
    assert found["text"] == "2.8"


@pytest.mark.parametrize(("medusa", "text"), [({1: 0.5, 4: 1.0}, "> 4"), ({1: 1.5, 4: 1.0}, "< 1")])
def test_a_break_even_beyond_what_was_measured_says_on_which_side(medusa, text):
    rows = closed_rows("baseline", {1: 1.0, 4: 2.0}) + closed_rows("medusa", medusa)
    found = measure_break_even(Samples(rows), {})["tpot"]
    assert (found["concurrency"], found["ci95"], found["text"]) == (None, [None, None], text)


def test_a_speedup_that_comes_back_is_broken_even_at_its_first_fall():
    ratios_CS = np.array([[1.2], [0.8], [1.2], [0.8]])
    assert crossing([1, 4, 16, 64], ratios_CS) == pytest.approx([2.0])


def test_categories_have_their_own_acceleration_and_speedup():
    rows = closed_rows("baseline", {1: 1.0}) + closed_rows("medusa", {1: 0.5})
    for row in rows:
        row["category"] = "easy" if row["prompt"] < 4 else "hard"
        if row["arm"] == "medusa":
            row["accepted_histogram"] = [2, 2] if row["category"] == "easy" else [4, 0]
            row["latency_s"] *= 1 if row["category"] == "easy" else 4
    found = measure_categories(Samples(rows), {})
    assert found["easy"]["requests"] == 4
    assert (found["easy"]["acceleration"], found["hard"]["acceleration"]) == (1.5, 1.0)
    assert found["easy"]["speedup"]["concurrency=1"]["tpot"] == pytest.approx(2)
    assert found["hard"]["speedup"]["concurrency=1"]["tpot"] == pytest.approx(0.5)
    assert found["hard"]["speedup"]["concurrency=1"]["ci95"] is None  # four prompts


def test_of_twenty_runs_of_equal_arms_seventeen_see_no_speedup():
    """Prompts of their own pace, rounds of their own pace, and noise: an interval of rows alone would be too narrow."""
    num_equal = 0
    for seed in range(20):
        draw = random.Random(seed)
        paces = [draw.uniform(0.9, 1.1) for _ in range(64)]
        rows = [
            request_row(
                arm=arm, prompt=prompt, round=round_, ttft_s=0.1, latency_s=0.1 + pace * moment * noise
            )
            for round_ in range(3)
            for arm in ("baseline", "medusa")
            for moment in (draw.gauss(1, 0.01),)
            for prompt, pace in enumerate(paces)
            for noise in (draw.gauss(1, 0.02),)
        ]
        ratio = Samples(rows).quotient("synchronous", tpot_ms)
        assert ratio is not None
        low, high = ratio.interval
        num_equal += low <= 1 <= high
        assert high - low < 0.1
    assert num_equal >= 17


# ------------------------------------------------------------------------------------------------ predicted


def test_the_step_cost_ratio_lies_between_what_was_measured():
    times = {1.0: {1.0: 10.0, 5.0: 12.0}, 4.0: {1.0: 20.0, 5.0: 36.0}}
    assert step_cost_ratio(times, rows=1, nodes=3) == pytest.approx(1.1)
    assert step_cost_ratio(times, rows=2.5, nodes=5) == pytest.approx(24 / 15)
    assert step_cost_ratio(times, rows=8, nodes=3) is None
    assert step_cost_ratio(times, rows=1, nodes=9) is None


def test_the_predicted_speedup_stands_beside_the_measured_one():
    """Acceleration 2, and a step with 5 nodes costs 1.25 steps: 1.6 were to be expected."""
    rows = closed_rows("baseline", {2: 1.0}) + closed_rows("medusa", {2: 0.8})
    for row in rows:
        if row["arm"] == "medusa":
            row |= {"num_steps": 4, "accepted_histogram": [0, 4], "draft_tokens": 16}
    info = {"step_times": {"1": {"1": 1.0, "5": 1.1}, "2": {"1": 2.0, "5": 2.5}}}
    bench = {"arms": {"medusa": {"info": info}}}
    engine = {
        "by_batch": {"8": {"acceleration": 2.0, "step_cost_ratio": 1.6, "predicted": 1.25, "measured": 1.2}}
    }
    found = summarise(Inputs(requests=rows, bench=bench, evaluation={"engine": engine}))["predicted"]
    served = found["served"]["concurrency=2"]
    assert served["acceleration"] == 2
    assert served["step_cost_ratio"] == pytest.approx(1.25)
    assert served["predicted"] == pytest.approx(1.6)
    assert served["measured"] == pytest.approx(1.25)
    assert served["gap"] == pytest.approx(1.25 / 1.6 - 1)
    assert found["engine"]["8"]["gap"] == pytest.approx(-0.04)


def test_without_step_times_nothing_is_predicted():
    written = summarise(Inputs(requests=traffic_rows({"synchronous": 1.5}, 6) + open_rows((4,))))
    assert predict({}, None, written) == {"engine": {}, "served": {}}
