"""The whole path by its one command: what it leaves; a second call does nothing, a killed one goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from medusa_ray import cli, provenance

COMMAND = [sys.executable, "-m", "medusa_ray.cli", "demo", "--fast", "--out"]
ARTIFACTS = ("chats", "prompts", "distilled", "hidden", "heads", "evaluation", "bench", "report")

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a demo that was killed while it distilled, at its first whole artifact after the prompts."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with subprocess.Popen([*COMMAND, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as demo:
        while not (out / "distilled" / "_parts.json").exists():
            assert demo.poll() is None, "the demo ended before it distilled"
            time.sleep(0.1)
        demo.send_signal(signal.SIGKILL)
    return out


@pytest.fixture(scope="module")
def finished(killed: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    done = subprocess.run([*COMMAND, str(killed)], capture_output=True, text=True, timeout=700)
    assert done.returncode == 0, done.stderr
    return killed, done


@pytest.mark.timeout(900)  # the setup is two demos, on a machine that may be busy
def test_a_killed_demo_goes_on_to_its_report(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = finished
    for artifact in ARTIFACTS:
        assert provenance.read(str(out / artifact)), artifact
    # Ray's own processes may write to the same stderr.
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    stages = [line["stage"] for line in lines if line["state"] == "done"]
    assert stages == ["chats", *cli.STAGES, "quality", "serve", "bench", "report"]


def test_nothing_is_lost_on_the_way(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = finished
    chats = [json.loads(line)["id"] for line in (out / "chats" / "train.jsonl").read_text().splitlines()]
    distilled = pq.read_table(sorted((out / "distilled").glob("*.parquet"))).to_pylist()
    assert sorted(row["id"].split("/")[0] for row in distilled) == sorted(chats)
    assert all(row["error"] is None and row["reply_ids"] for row in distilled)


def test_both_arms_answered_the_same_prompts_with_the_same_text(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = finished
    requests = pq.read_table(out / "bench" / "requests.parquet").to_pylist()
    assert [row["error"] for row in requests if row["error"]] == []
    texts = {
        arm: {row["prompt"]: row["text"] for row in requests if row["arm"] == arm}
        for arm in ("baseline", "medusa")
    }
    shared = texts["baseline"].keys() & texts["medusa"].keys()
    assert shared
    assert all(texts["baseline"][prompt] == texts["medusa"][prompt] for prompt in shared)
    report = json.loads((out / "report" / "report.json").read_text())
    assert report["parity"]["token_exact"] == report["parity"]["prompts"] > 0


def test_the_console_ends_with_the_blogs_table_and_the_verdict(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = finished
    for column in (
        "Requests per Second",
        "Request Latency",
        "Time to First Token",
        "Inter Token Latency",
        "Output Token",
    ):
        assert column in done.stdout
    for load in ("synchronous", "concurrency=1", "concurrency=4", "concurrency=16", "throughput"):
        assert done.stdout.count(load) >= 2  # a row per arm
    assert "verdict" in done.stdout
    assert f"{out}/report/report.html" in done.stdout


def test_a_second_run_takes_seconds_and_loads_neither_torch_nor_ray(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, first = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    started = time.monotonic()
    done = subprocess.run(
        [*COMMAND, str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
    )
    seconds = time.monotonic() - started
    assert done.returncode == 0
    assert seconds < 5
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in imported
    assert not imported & {"torch", "ray", "transformers"}
    assert (
        done.stdout.splitlines()[1:-1] == first.stdout.splitlines()[:-1]
    )  # all but the first line and the time
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
