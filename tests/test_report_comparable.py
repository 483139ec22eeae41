"""What makes arms not comparable takes the speedup away, everywhere, and says why."""

import json
from typing import Any

import pytest
from test_report import PARITY, Page, request_row, traffic_rows, verdict_of, write_run

from medusa_ray import report
from medusa_ray.report.comparable import served_parity
from medusa_ray.report.samples import Samples
from medusa_ray.report.summary import Inputs, summarise

LOADS = {"synchronous": 1.5, "concurrency=4": 1.4}


def replicas(start: int, end: int) -> dict[str, Any]:
    return {"arms": {"medusa": {"replicas": [start, end]}}}


def overlap(exact: int, near: int = 0) -> dict[str, Any]:
    return {
        "checks": {"double_bos": 0, "overlap": {"checked": True, "exact": exact, "near": near, "of": 100}}
    }


@pytest.mark.parametrize(
    ("bench", "why"),
    [
        (replicas(1, 2), "the number of replicas of medusa went from 1 to 2"),
        (
            {"arms": {"baseline": {"replicas": [1, 1], "autoscales": True}}},
            "replicas of baseline follow the load",
        ),
        ({"checks": {"double_bos": 3, "overlap": None}}, "3 prompts begin with two BOS tokens"),
        (overlap(exact=6), "6 of 100 prompts are in the training data"),
        (
            {"client": {"medusa": {"synchronous": [0.4, 0.95]}}},
            "the client used 95% of a CPU core for medusa",
        ),
    ],
)
def test_what_the_benchmark_found_takes_the_speedup_away(bench, why):
    written = summarise(Inputs(requests=traffic_rows(LOADS, 8), evaluation=PARITY, bench=bench))
    speedup = written["speedup"]["synchronous"]
    assert (speedup["tpot"], speedup["ci95"], speedup["output_tokens_per_s"]) == (None, None, None)
    assert why in speedup["not_comparable"]
    assert written["verdict"]["ship"] is False
    assert written["verdict"]["reason"].startswith("Not comparable: one at a time")
    assert any(why in line for line in report.caveats(written))
    assert report.table(written)[1][1][-1] == "not comparable"


@pytest.mark.parametrize(
    "bench",
    [
        replicas(2, 2),
        overlap(exact=5, near=40),
        {"client": {"medusa": {"synchronous": [0.89]}}},
        {"checks": {"double_bos": None, "overlap": {"checked": False, "exact": None, "near": None, "of": 8}}},
    ],
)
def test_what_is_within_its_limit_takes_nothing_away(bench):
    assert verdict_of(traffic_rows(LOADS, 8), **bench)["ship"] is True


def test_prompts_much_like_the_training_data_are_a_caveat():
    """They are what the heads are for; only prompts known by heart make the figures worthless."""
    written = summarise(Inputs(requests=traffic_rows(LOADS, 8), evaluation=PARITY, bench=overlap(2, near=40)))
    assert report.caveats(written) == [
        "In the training data: 2 of 100 prompts, and 40 more much like some there; acceptance may be better than on "
        "prompts to come."
    ]


def test_a_load_that_is_not_comparable_ends_the_climb_and_not_the_loads_below():
    verdict = verdict_of(traffic_rows(LOADS, 40), client={"baseline": {"concurrency=4": [0.93]}})
    assert (verdict["ship"], verdict["up_to_concurrency"]) == (True, 1)
    assert "beyond that nothing can be said: with 4 at a time the client used 93%" in verdict["reason"]


@pytest.mark.parametrize(("latency_factor", "ships"), [(0.7, False), (0.9, True)])
def test_a_baseline_below_four_fifths_of_an_engine_of_another_make_is_weak(latency_factor, ships):
    rows = traffic_rows({"synchronous": 1.5}, 12)
    vllm = [
        row
        | {
            "arm": "vllm",
            "start_s": latency_factor * row["start_s"],
            "latency_s": latency_factor * row["latency_s"],
        }
        for row in rows
        if row["arm"] == "baseline" and row["round"] == 0
    ]
    verdict = verdict_of(rows + vllm, traffic={"external": "vllm"})
    assert verdict["ship"] is ships
    assert ("the baseline is weak" in verdict["reason"]) is not ships


# ------------------------------------------------------------------------------------------------ text


def said(text: dict[str, list[str]]) -> list[dict[str, Any]]:
    """What each arm said to prompt 0, 1, ... in one round."""
    return [
        request_row(arm=arm, prompt=prompt, text=reply)
        for arm, replies in text.items()
        for prompt, reply in enumerate(replies)
    ]


def test_the_texts_of_the_same_prompt_load_and_round_are_compared():
    rows = said({"baseline": ["a", "b", "c"], "medusa": ["a", "b", "x"]})
    assert served_parity(Samples(rows), ["synchronous"]) == {"prompts": 3, "equal": 2, "unstable": 0}
    # The baseline says something else to prompt 2 in another round: which of its texts is right nobody knows.
    again = [row | {"round": 1} for row in said({"baseline": ["a", "b", "x"], "medusa": ["a", "b", "x"]})]
    assert served_parity(Samples(rows + again), ["synchronous"]) == {"prompts": 3, "equal": 2, "unstable": 1}


def saying_otherwise(rows: list[dict[str, Any]], prompts: int) -> list[dict[str, Any]]:
    return [
        row | {"text": "other"} if row["arm"] == "medusa" and row["prompt"] < prompts else row for row in rows
    ]


def test_greedy_text_that_differs_is_not_the_same_work():
    rows = saying_otherwise(traffic_rows(LOADS, 40), prompts=2)
    written = summarise(Inputs(requests=rows, evaluation=PARITY))
    assert written["verdict"]["reason"].startswith(
        "Not comparable: medusa's greedy text is not the baseline's on 2 of 40 prompts"
    )
    assert all(found["tpot"] is None for found in written["speedup"].values())
    sampled = summarise(Inputs(requests=rows, evaluation=PARITY, bench={"traffic": {"temperature": 0.7}}))
    assert sampled["verdict"]["ship"] is True


def test_as_many_texts_may_differ_as_near_ties_were_found_offline():
    """2 of 200 prompts: of 40 none or one."""
    evaluation = {"parity": {"prompts": 200, "token_exact": 198, "near_ties": 2}}
    assert verdict_of(saying_otherwise(traffic_rows(LOADS, 40), prompts=1), evaluation)["ship"] is True
    assert verdict_of(saying_otherwise(traffic_rows(LOADS, 40), prompts=2), evaluation)["ship"] is False


# ------------------------------------------------------------------------------------------------ where it is said


def test_the_reason_stands_in_the_json_the_page_and_the_summary(tmp_path):
    folder = write_run(tmp_path, traffic_rows(LOADS, 8), **{"bench/bench.json": replicas(1, 2)})
    written = report.run(str(folder))
    why = "the number of replicas of medusa went from 1 to 2"
    assert (
        why
        in json.loads((folder / "report/report.json").read_text())["speedup"]["synchronous"]["not_comparable"]
    )
    page = (folder / "report/report.html").read_text(encoding="utf-8")
    assert '<div class="verdict open"><strong>Not comparable</strong>' in page
    assert why in Page(page).text
    assert "not comparable" in Page(page).text
    assert why in (folder / "report/summary.md").read_text(encoding="utf-8")
    assert not (folder / "report/figures/speedup.svg").exists()
    assert written["break_even"] == {}
    assert written["equal_latency"] == {"tpot_ms": [], "request_latency_s": []}
