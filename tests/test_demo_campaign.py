"""The demo's promises in numbers, and a SIGKILL in each of its steps.

    pytest -m nightly tests/test_demo_campaign.py -s

takes a quarter of an hour on two quiet cores, and prints what it measured.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from medusa_ray import provenance
from medusa_ray.demo import chats, quality
from medusa_ray.demo.pipeline import ARTIFACTS

COMMAND = [sys.executable, "-m", "medusa_ray.cli", "demo", "--out"]
SAMPLE_EVERY_S = 2

pytestmark = [pytest.mark.nightly, pytest.mark.ray, pytest.mark.timeout(3600)]


def memory_of(demo: subprocess.Popen[Any]) -> int:
    """Bytes of a demo and all that it started, shared pages counted once (proportional set size)."""
    total = 0
    for process in [psutil.Process(demo.pid), *psutil.Process(demo.pid).children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has ended meanwhile
            continue
    return total


def run_to_its_end(out: Path, *options: str) -> tuple[float, float]:
    """Seconds that a demo took, and its peak memory in GiB."""
    started, peak = time.monotonic(), 0
    with subprocess.Popen([*COMMAND, str(out), *options], stderr=subprocess.DEVNULL) as demo:
        while demo.poll() is None:
            peak = max(peak, memory_of(demo))
            time.sleep(SAMPLE_EVERY_S)
    assert demo.returncode == 0
    return time.monotonic() - started, peak / 2**30


def done_stages(demo: subprocess.Popen[bytes]) -> Iterator[str]:
    """Names of its steps as they end, from the JSON lines on its stderr."""
    assert demo.stderr is not None
    for line in demo.stderr:
        if line.startswith(b"{") and (fields := json.loads(line))["state"] == "done":
            yield fields["stage"]


def kill_after(stage: str, out: Path, seconds: float) -> list[psutil.Process]:
    """Kills a demo so long after the end of a step. Returns what it had started."""
    with subprocess.Popen(
        [*COMMAND, str(out), "--fast"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as demo:
        assert stage in done_stages(demo), f"the demo ended before {stage} did"
        time.sleep(seconds)
        assert demo.poll() is None, f"{seconds} s after {stage} the demo is over"
        children = psutil.Process(demo.pid).children(recursive=True)
        demo.kill()
    return children


def accuracy(out: Path) -> dict[str, Any]:
    return provenance.read_json(f"{out}/heads/accuracy.json")


def distilled(out: Path) -> list[tuple[str, list[int]]]:
    rows = pq.read_table(sorted((out / "distilled").glob("*.parquet"))).to_pylist()
    return sorted((row["id"], row["reply_ids"]) for row in rows)


def test_the_whole_demo_keeps_its_promises(tmp_path: Path) -> None:
    seconds, peak_gib = run_to_its_end(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    acceptance, parity = report["acceptance"], report["parity"]
    speedup = report["speedup"]["concurrency=1"]["tpot"]
    print(
        f"\nseconds={seconds:.0f} peak_gib={peak_gib:.2f} top1={report['heads']['top1']} {acceptance=} "
        f"{parity=} engine_speedup={report['engine']['speedup']:.3f} tpot_speedup_c1={speedup:.3f}"
    )
    assert seconds <= 420
    assert peak_gib <= 6
    assert all(top1 >= bar for top1, bar in zip(report["heads"]["top1"], (0.48, 0.38, 0.28), strict=True))
    assert acceptance["chain"] >= 1.8
    assert acceptance["calibrated_8"] >= 2.0
    assert acceptance["chain"] - acceptance["out_of_domain_chain"] >= 0.15
    assert parity["token_exact"] == parity["prompts"] >= 200
    assert report["engine"]["speedup"] >= 1.3
    assert speedup >= 1.2


def test_the_shipped_base_is_right_on_500_chats() -> None:
    rows = chats.chats("test", 500)
    result = quality.score(rows, quality.greedy_replies(str(quality.BASE), rows))
    print(result)
    assert result["exact_match"] >= 0.85
    assert result["execution_accuracy"] >= 0.88


def test_a_demo_killed_in_every_step_ends_as_one_that_never_was(tmp_path: Path) -> None:
    """One folder, killed again and again: a step that trusts half an artifact would carry it to the end."""
    seconds, _ = run_to_its_end(tmp_path / "whole", "--fast")
    print(f"\nfast_seconds={seconds:.0f}")
    assert seconds <= 150

    out = tmp_path / "killed"
    with subprocess.Popen(
        [*COMMAND, str(out), "--fast"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as demo:
        while not (out / "chats").exists():
            assert demo.poll() is None
            time.sleep(0.01)
        demo.kill()
    orphans: list[psutil.Process] = []
    # The step killed is the one after; each is killed early and late, where it lasts long enough for both.
    for stage, pauses in {
        "chats": (1, 4),  # data
        "data": (5, 9, 14),  # distill
        "hidden": (1, 6, 12),  # train
        "train": (3, 12),  # evaluate
        "evaluate": (0.02,),  # quality
        "quality": (2, 8),  # serve
        "serve": (4, 16),  # bench
        "bench": (0.3,),  # report
    }.items():
        for pause in pauses:
            orphans += kill_after(stage, out, pause)
    run_to_its_end(out, "--fast")
    _, alive = psutil.wait_procs(orphans, timeout=120)  # Ray's agents take a minute to notice
    assert not alive

    assert distilled(out) == distilled(tmp_path / "whole")
    for artifact in ARTIFACTS:
        assert provenance.read(str(out / artifact)), artifact
    ours, theirs = accuracy(out), accuracy(tmp_path / "whole")
    assert ours["heads"]["top1"] == pytest.approx(theirs["heads"]["top1"], abs=0.01)
    assert ours["acceptance"] == pytest.approx(theirs["acceptance"], abs=0.01)
    requests = pq.read_table(out / "bench" / "requests.parquet").to_pylist()
    assert len(requests) == 2 * 5 * 8
    assert all(row["error"] is None for row in requests)
