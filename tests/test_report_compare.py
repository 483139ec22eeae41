"""Two runs side by side: what changed, whether that is beyond noise, and what else differs."""

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from test_report import PARITY, Page, traffic_rows, write_run

from medusa_ray import cli, config, report
from medusa_ray.report import comparison, schema
from medusa_ray.report.summary import Inputs, summarise

LOADS = {"synchronous": 1.5, "concurrency=4": 1.4}


def summary(speedups: dict[str, float], **hardware: Any) -> dict[str, Any]:
    bench = {"hardware": {"cpu": "one", **hardware}}
    return summarise(Inputs(requests=traffic_rows(speedups, 20), evaluation=PARITY, bench=bench))


def lines(found: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(line["arm"], line["load"], line["figure"]): line for line in found["figures"]}


def test_a_change_counts_where_the_intervals_do_not_meet():
    """The second run's medusa is slower by a half; its baseline is the same."""
    found = comparison.compare(
        {"a": summary(LOADS), "b": summary({"synchronous": 1.0, "concurrency=4": 1.4})}
    )
    schema.Comparison.model_validate(found)
    slower = lines(found)["medusa", "synchronous", "tpot_ms"]
    assert slower["change"] == pytest.approx(0.5, abs=0.01)
    assert slower["beyond"] is True
    assert lines(found)["medusa", "synchronous", "speedup, tpot"]["beyond"] is True
    for same in (("baseline", "synchronous", "tpot_ms"), ("medusa", "concurrency=4", "tpot_ms")):
        assert lines(found)[same]["change"] == pytest.approx(0, abs=0.01)
        assert lines(found)[same]["beyond"] is False
    assert lines(found)["medusa", "synchronous", "acceleration"]["beyond"] is None  # it has no interval
    _, rows = comparison.comparison_table(found)
    judged = {tuple(row[:3]): row[-1] for row in rows}
    assert judged["synchronous", "medusa", "tpot_ms"] == "worse"
    assert judged["synchronous", "medusa", "output_tokens_per_s"] == "worse"
    assert judged["concurrency=4", "medusa", "tpot_ms"] == "no"


def test_what_else_differs_is_said():
    found = comparison.compare({"a": summary(LOADS, cores=2), "b": summary({"synchronous": 1.5}, cores=4)})
    assert found["notes"] == [
        "hardware cores is 2 in A and 4 in B.",
        "baseline was measured in A alone at concurrency=4.",
        "medusa was measured in A alone at concurrency=4.",
    ]


def test_report_compare_writes_and_prints_both_runs(tmp_path: Path, monkeypatch, capsys):
    for name, speedup in (("a", 1.5), ("b", 1.2)):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, traffic_rows({"synchronous": speedup}, 8), **{"bench/bench.json": {}})
    words = ["report", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["medusa-ray", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    said = capsys.readouterr().out
    assert "worse" in said
    assert f"{tmp_path}/out/compare.html" in said
    written = json.loads((tmp_path / "out/compare.json").read_text())
    jsonschema.validate(written, json.loads((tmp_path / "out/compare.schema.json").read_text()))
    page = Page((tmp_path / "out/compare.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert "Ship up to concurrency 1" in page.text
    assert ("td", {"class": "loss"}) in page.tags


def test_comparing_a_run_with_itself_is_the_users_mistake(tmp_path):
    with pytest.raises(config.UserError, match="are both"):
        report.compare(str(tmp_path), f"{tmp_path}/", str(tmp_path / "out"))


@pytest.mark.parametrize("words", [["compare", "a"], ["a", "b"], ["a", "--out", "b"]])
def test_report_says_what_it_takes(words: list[str], monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["medusa-ray", "report", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "expected was the folder of a run, or `report compare A B`" in capsys.readouterr().err
