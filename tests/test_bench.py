"""bench: prompts -> request rows. GuideLLM sends real traffic, once, to a server whose delays are known."""

import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stand_in import Handler, serving

from medusa_ray import bench, provenance, records
from medusa_ray.bench import guidellm
from medusa_ray.bench.prompts import read_prompts
from medusa_ray.config import TrafficConfig, UserError

TTFT_S, STEP_S, NUM_TOKENS = 0.04, 0.01, 12
TOKENS_PER_STEP = {"baseline": 1, "medusa": 3}
NUM_REQUESTS, NUM_WARMUP = 5, 2
BROKEN = "the prompt that breaks the server"
LOADS = ["synchronous", "concurrency=3", "throughput"]


class StandIn(Handler):
    """An OpenAI server under /baseline and /medusa that answers a prompt with itself, step by step."""

    def do_GET(self) -> None:
        arm, _, path = self.path[1:].partition("/")
        bodies: dict[str, Any] = {"v1/models": {"data": [{"id": "standin"}]}}
        if arm == "medusa":
            bodies["info"] = {"heads": 3}
        known = arm in TOKENS_PER_STEP and path in bodies
        self.reply(200 if known else 404, bodies[path] if known else {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        if not self.path.endswith("/v1/chat/completions"):
            return self.reply(404, {"error": {"message": "no such path"}})
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)  # type: ignore[attr-defined]  # the list that the fixture gave its server
        if body["model"] != "standin":
            return self.reply(404, {"error": {"message": f"no model {body['model']}."}})
        prompt = body["messages"][-1]["content"]
        if prompt == BROKEN and body.get("stream"):
            return self.reply(500, {"error": {"message": "broken on purpose"}})
        time.sleep(TTFT_S)
        if not body.get("stream"):
            return self.reply(200, {})
        per_step = TOKENS_PER_STEP[self.path.split("/")[1]]
        num_steps = NUM_TOKENS // per_step
        self.send_response(200)
        self.end_headers()
        for i in range(num_steps):
            time.sleep(STEP_S if i else 0)
            self.event({"choices": [{"index": 0, "delta": {"content": f"{prompt} {i} "}}]})
        usage = {"prompt_tokens": 7, "completion_tokens": NUM_TOKENS}
        told = {"acceptance_histogram": [0] * (per_step - 1) + [num_steps], "num_spec_steps": num_steps}
        told["num_draft_tokens"] = 4 * num_steps
        self.event({"choices": [], "usage": usage, "metrics": {"speculative_decoding": told}})
        self.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    """The stand-in; `bodies` are all that it was asked."""
    with serving(StandIn, bodies=[]) as server:
        yield server


def traffic(folder: Path, port: int, **changes: Any) -> TrafficConfig:
    prompts = folder / "chats.jsonl"
    if not prompts.exists():
        questions = ["one", "two", BROKEN, "three"]  # fewer than requests: the first comes twice
        chats = [[{"role": "system", "content": "sql"}, {"role": "user", "content": q}] for q in questions]
        chats[0].append({"role": "assistant", "content": "the chat's own answer"})
        prompts.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    url = f"http://127.0.0.1:{port}"
    values = {
        "output": str(folder / "bench"),
        "prompts": str(prompts),
        "targets": {arm: {"url": f"{url}/{arm}", "model": "standin"} for arm in TOKENS_PER_STEP},
        "loads": LOADS,
        "num_requests": NUM_REQUESTS,
        "num_warmup": NUM_WARMUP,
        "rounds": 1,
        "max_seconds": 30,
        "max_tokens": 48,
        "seed": 5,
        "max_concurrency": 4,
    }
    return TrafficConfig.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def benched(server: ThreadingHTTPServer, tmp_path_factory: pytest.TempPathFactory) -> TrafficConfig:
    """The traffic of a finished benchmark: the one real run of GuideLLM in this file."""
    config = traffic(tmp_path_factory.mktemp("bench"), server.server_port)
    assert bench.run(config) == config.output
    return config


def rows_in(config: TrafficConfig) -> list[dict[str, Any]]:
    table = pq.read_table(f"{config.output}/requests.parquet")
    assert table.schema.equals(records.REQUESTS)
    return table.to_pylist()


def report_of(config: TrafficConfig, run: str) -> dict[str, Any]:
    return provenance.read_json(f"{config.output}/guidellm/{run}.json")


# ------------------------------------------------------------------------------------------- a real benchmark


def test_every_arm_gets_the_same_prompts_at_every_load(benched: TrafficConfig) -> None:
    sent = Counter((row["round"], row["arm"], row["load"], row["prompt"]) for row in rows_in(benched))
    expected = {0: 2, 1: 1, 2: 1, 3: 1}
    assert sent == {
        (0, arm, load, prompt): times
        for arm in TOKENS_PER_STEP
        for load in LOADS
        for prompt, times in expected.items()
    }
    assert provenance.read_json(f"{benched.output}/bench.json")["not_comparable"] == []


def test_prompts_are_sent_in_order_one_after_the_other_when_synchronous(benched: TrafficConfig) -> None:
    for arm in TOKENS_PER_STEP:
        rows = [row for row in rows_in(benched) if (row["arm"], row["load"]) == (arm, "synchronous")]
        rows.sort(key=lambda row: row["start_s"])
        assert [row["prompt"] for row in rows] == [0, 1, 2, 3, 0]
        ends_s = [row["start_s"] + (row["latency_s"] or 0) for row in rows]
        assert all(end_s <= row["start_s"] for end_s, row in zip(ends_s, rows[1:], strict=False))


def test_arms_take_turns_at_every_load(benched: TrafficConfig) -> None:
    first_s: dict[tuple[str, str], float] = {}
    for row in rows_in(benched):
        run = (row["load"], row["arm"])
        first_s[run] = min(row["start_s"], first_s.get(run, row["start_s"]))
    assert sorted(first_s, key=lambda run: first_s[run]) == [
        (load, arm) for load in LOADS for arm in TOKENS_PER_STEP
    ]


def test_every_second_round_starts_with_the_other_arm(tmp_path: Path) -> None:
    runs = list(bench.plan(traffic(tmp_path, 9, rounds=3), ["synchronous", "throughput"]))
    there, back = ["baseline", "medusa"] * 2, ["medusa", "baseline"] * 2
    assert [arm for _, _, arm in runs] == there + back + there
    assert [run[:2] for run in runs[2:6]] == [(0, "throughput")] * 2 + [(1, "synchronous")] * 2


@pytest.mark.parametrize(("load", "most"), [("synchronous", 1), ("concurrency=3", 3), ("throughput", 4)])
def test_a_load_keeps_as_many_requests_in_flight_as_it_says(
    benched: TrafficConfig, load: str, most: int
) -> None:
    rows = [row for row in rows_in(benched) if row["load"] == load and row["error"] is None]
    for arm in TOKENS_PER_STEP:
        mine = [row for row in rows if row["arm"] == arm]
        spans = [(row["start_s"], row["start_s"] + row["latency_s"]) for row in mine]
        in_flight = [sum(start <= at < end for start, end in spans) for at, _ in spans]
        # How many meet on a busy machine is up to its scheduler, but some do.
        assert min(most, 2) <= max(in_flight) <= most


def test_a_row_holds_what_the_server_did(benched: TrafficConfig) -> None:
    """Tokens counted by events would be right for the baseline and a third of the truth for medusa."""
    good = [row for row in rows_in(benched) if row["error"] is None]
    for row in good:
        num_steps = NUM_TOKENS // TOKENS_PER_STEP[row["arm"]]
        assert row["ttft_s"] >= TTFT_S
        assert row["latency_s"] >= TTFT_S + (num_steps - 1) * STEP_S
        assert (row["prompt_tokens"], row["output_tokens"], row["num_steps"]) == (7, NUM_TOKENS, num_steps)
        assert row["accepted_histogram"] == [0] * (TOKENS_PER_STEP[row["arm"]] - 1) + [num_steps]
        question = ["one", "two", BROKEN, "three"][row["prompt"]]
        assert row["text"] == "".join(f"{question} {i} " for i in range(num_steps))
        assert (row["events"], row["draft_tokens"]) == (num_steps, num_steps * 4)
        assert row["ttft_s"] <= row["last_s"] <= row["latency_s"]
        assert row["wait_s"] is None  # a closed load has no time at which a request is due
        assert abs(row["start_s"] - time.time()) < 600
    after_first = {
        arm: median(row["latency_s"] - row["ttft_s"] for row in good if row["arm"] == arm)
        for arm in TOKENS_PER_STEP
    }
    assert after_first["medusa"] < after_first["baseline"]


def test_a_failed_request_is_a_row_with_its_error(benched: TrafficConfig) -> None:
    failed = [row for row in rows_in(benched) if row["error"] is not None]
    assert {row["prompt"] for row in failed} == {2}
    assert len(failed) == len(LOADS) * 2
    assert all("500" in row["error"] for row in failed)
    record = provenance.read(benched.output)
    assert record is not None
    assert (record["requests"], record["failed"]) == (2 * len(LOADS) * NUM_REQUESTS, len(failed))


def test_every_request_carries_the_same_settings_and_warm_up_is_in_no_row(
    benched: TrafficConfig, server: ThreadingHTTPServer
) -> None:
    mine = [body for body in server.bodies if body["model"] == "standin"]  # type: ignore[attr-defined]  # see StandIn
    settings = {(body["temperature"], body["seed"], body["max_completion_tokens"]) for body in mine}
    assert settings == {(0.0, 5, 48)}
    assert all([m["role"] for m in body["messages"]] == ["system", "user"] for body in mine)
    num_before = sum(not body.get("stream") for body in mine)
    assert num_before == 2 * (1 + NUM_WARMUP)
    # A run that lost a record was sent again.
    assert (len(mine) - num_before - len(rows_in(benched))) % NUM_REQUESTS == 0


def test_guidellms_own_means_are_those_of_the_rows(benched: TrafficConfig) -> None:
    arms = provenance.read_json(f"{benched.output}/bench.json")["arms"]
    assert (arms["baseline"]["info"], arms["medusa"]["info"]) == (None, {"heads": 3})
    for arm in TOKENS_PER_STEP:
        for load in LOADS:
            rows = [
                row
                for row in rows_in(benched)
                if (row["arm"], row["load"], row["error"]) == (arm, load, None)
            ]
            mean = {name: sum(row[name] for row in rows) / len(rows) for name in ("latency_s", "ttft_s")}
            (theirs,) = arms[arm]["guidellm"][load]  # one round
            assert theirs["request_latency"] == pytest.approx(mean["latency_s"], rel=1e-6)
            assert theirs["time_to_first_token_ms"] == pytest.approx(1e3 * mean["ttft_s"], rel=1e-6)


def test_a_finished_benchmark_is_not_repeated_until_its_traffic_changes(
    benched: TrafficConfig, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bodies = len(server.bodies)  # type: ignore[attr-defined]  # see StandIn
    assert bench.run(benched) == benched.output
    assert len(server.bodies) == num_bodies  # type: ignore[attr-defined]  # see StandIn

    class Repeated(Exception):
        pass

    def repeat(_: Path) -> None:
        raise Repeated

    monkeypatch.setattr(bench, "GuideLLM", repeat)
    with pytest.raises(Repeated):
        bench.run(benched.model_copy(update={"max_tokens": 47}))


# ----------------------------------------------------------------------------------------- reading a report


def read(config: TrafficConfig, report: dict[str, Any]) -> list[dict[str, Any]]:
    return guidellm.rows_of(report, read_prompts(config.prompts), config.max_seconds)


def test_a_request_that_the_time_limit_cut_off_is_a_failure(benched: TrafficConfig) -> None:
    report = report_of(benched, "round0-concurrency=3-medusa")
    whole = read(benched, copy.deepcopy(report))
    groups = report["benchmarks"][0]["requests"]
    groups["incomplete"], groups["successful"] = groups["successful"], []
    cut = read(benched, report)
    assert [row["prompt"] for row in cut] == [row["prompt"] for row in whole]
    assert {row["error"] for row in cut if row["prompt"] != 2} == {"cut off when max_seconds, 30, were over"}


def test_a_reply_without_usage_is_a_failure_rather_than_a_wrong_count(benched: TrafficConfig) -> None:
    report = report_of(benched, "round0-synchronous-medusa")
    request = report["benchmarks"][0]["requests"]["successful"][0]
    request["output_metrics"]["total_tokens"] = None
    bad = [row for row in read(benched, report) if row["error"] and "usage" in row["error"]]
    assert [row["output_tokens"] for row in bad] == [None]


def test_a_server_that_tells_nothing_of_its_steps_leaves_them_null(benched: TrafficConfig) -> None:
    report = report_of(benched, "round0-synchronous-medusa")
    groups = report["benchmarks"][0]["requests"]
    told = (None, {}, {"speculative_decoding": None}, {"queue_time_s": 0.1})
    for request, metrics in zip(groups["successful"], told, strict=True):
        request["response_metrics"] = metrics
    rows = read(benched, report)
    assert {(row["num_steps"], row["accepted_histogram"]) for row in rows} == {(None, None)}


def test_a_lost_record_leaves_every_other_row_with_its_own_prompt(benched: TrafficConfig) -> None:
    """Rows of the wrong prompts would look right, and only widen the interval of the speedup."""
    report = report_of(benched, "round0-synchronous-medusa")
    requests = report["benchmarks"][0]["requests"]["successful"]
    requests.sort(key=lambda request: request["info"]["timings"]["queued"])
    assert [row["prompt"] for row in read(benched, report)] == [0, 1, 3, 0, 2]  # the failed one comes last
    del requests[1]
    good = [row for row in read(benched, report) if row["error"] is None]
    assert [(row["prompt"], row["text"][:3]) for row in good] == [(0, "one"), (3, "thr"), (0, "one")]
    requests[1]["request_args"] = requests[1]["request_args"].replace("three", "four")
    with pytest.raises(AssertionError, match="none of the prompts left"):
        read(benched, report)


@pytest.mark.parametrize(("num_lossy", "num_runs"), [(0, 1), (1, 2), (9, guidellm.RUN_ATTEMPTS)])
def test_a_run_that_lost_a_record_is_repeated_but_not_for_ever(
    benched: TrafficConfig, num_lossy: int, num_runs: int
) -> None:
    whole = report_of(benched, "round0-synchronous-medusa")
    lossy = copy.deepcopy(whole)
    lossy["benchmarks"][0]["scheduler_state"]["processing_requests"] = 1
    reports = iter([lossy] * num_lossy + [whole])
    given = []

    class Recorded(bench.GuideLLM):
        def __init__(self) -> None:
            pass

        def run(self, words: list[str], max_seconds: float) -> guidellm.Report:
            given.append(next(reports))
            return given[-1]

    assert guidellm.run_whole(Recorded(), ["run"], benched) is given[-1]
    assert len(given) == num_runs


def test_loads_with_other_prompts_in_one_arm_are_not_comparable(benched: TrafficConfig) -> None:
    rows = rows_in(benched)
    late = next(row for row in rows if (row["arm"], row["load"]) == ("medusa", "throughput"))
    rows.remove(late)
    assert bench.not_comparable(rows, benched) == ["throughput"]


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"url": "http://127.0.0.1:9"}, r"medusa does not answer at http://127.0.0.1:9: .*Start the server"),
        ({"url": "http://127.0.0.1:{port}/medsua"}, r"answers 404 to .*/medsua/v1/models.* route prefix"),
        ({"url": "127.0.0.1"}, r"target medusa is no OpenAI server: .*targets.medusa.url"),
        ({"model": "llama"}, r"'llama': 404 no model llama\. It serves \['standin'\].*targets.medusa.model"),
    ],
)
def test_a_target_that_cannot_serve_is_named_before_any_traffic(
    server: ThreadingHTTPServer, tmp_path: Path, target: dict[str, str], message: str
) -> None:
    config = traffic(tmp_path, server.server_port).model_dump()
    for key, value in target.items():
        config["targets"]["medusa"][key] = value.format(port=server.server_port)
    started_s = time.monotonic()
    with pytest.raises(UserError, match=message):
        bench.run(TrafficConfig.model_validate(config))
    assert time.monotonic() - started_s < 20
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "nothing is there"),
        ("", "holds no chats"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n{"prompt": "b"}', "both chats and templated text"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n{"reply": "b"}', "line 2, is no chat"),
        ("SELECT 1", "line 1, is no chat"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 1, has nothing to answer"),
    ],
)
def test_prompts_that_cannot_be_sent_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_prompts([str(file)])


def test_a_prompts_split_gives_its_good_chats_in_order(tmp_path: Path) -> None:
    def row(text: str, error: str | None = None, is_chat: bool = True) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}] if is_chat else None
        return {"id": text, "messages": messages, "prompt_ids": [1], "error": error}

    rows = [row("a"), row("b", error="too long"), row("c", is_chat=False), row("d")]
    for i in (1, 0):
        table = pa.Table.from_pylist(rows[2 * i : 2 * i + 2], records.PROMPTS)
        pq.write_table(table, tmp_path / f"part-{i:06}.parquet")
    assert [prompt.user_text for prompt in read_prompts([str(tmp_path)])] == ["a", "d"]


def fake_python(folder: Path, script: str) -> str:
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)


def test_a_guidellm_that_dies_is_reported_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, "echo no room in /dev/shm >&2; exit 3"))
    with (
        bench.GuideLLM(tmp_path) as client,
        pytest.raises(RuntimeError, match=r"\(it died\)[^$]*no room in /dev/shm"),
    ):
        client.run(["run"], 1.0)


def test_a_guidellm_that_hangs_is_given_up_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, "echo stuck >&2; sleep 100"))
    monkeypatch.setattr(guidellm, "START_TIMEOUT_S", 0.3)
    started_s = time.monotonic()
    with (
        pytest.raises(RuntimeError, match=r"no end within 0 s[^$]*stuck"),
        bench.GuideLLM(tmp_path) as client,
    ):
        client.run(["run"], 0.0)
    assert time.monotonic() - started_s < 10
    assert client._process.poll() is not None
