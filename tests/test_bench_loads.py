"""bench: open loads, templated text, keys, replicas, ramps, the search for the break-even, and what prompts hide."""

import itertools
import json
import os
import shlex
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from stand_in import Handler, serving
from typer.testing import CliRunner

from medusa_ray import bench, cli, provenance, records
from medusa_ray.bench import blog, guidellm, ramp, targets
from medusa_ray.bench.prompts import NEAR_WORDS, Prompt, overlap, read_prompts
from medusa_ray.config import TargetConfig, TrafficConfig, UserError, parse

KEY = "sk-a-key-that-no-file-may-hold"
LATENCY_S = 0.03


class StandIn(Handler):
    """An OpenAI server that wants KEY, knows BOS as token 1, and tells of a replica more with each answer to /info."""

    def do_GET(self) -> None:
        if self.path == "/info":
            state: dict[str, int] = self.server.state  # type: ignore[attr-defined]  # the fixture's
            state["asked"] += 1
            return self.reply(200, {"replicas": state["asked"], "wanted_replicas": 9, "autoscales": True})
        return self.reply(200, {"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return self.reply(401, {"error": {"message": "no key, no reply"}})
        if self.path == "/tokenize":
            text = body.get("prompt") or "<s>" + "".join(m["content"] for m in body["messages"])
            adds = body.get("add_special_tokens", "prompt" in body)
            ids = [1] * text.count("<s>") + [ord(c) for c in text.replace("<s>", "")]
            return self.reply(200, {"tokens": [1, *ids] if adds else ids})
        self.server.bodies.append((self.path, time.time(), body))  # type: ignore[attr-defined]
        time.sleep(LATENCY_S)
        if not body.get("stream"):
            return self.reply(200, {"usage": {"prompt_tokens": 2}})
        self.send_response(200)
        self.end_headers()
        for text in ("SELECT", " 1"):
            choice = {"index": 0, "text": text} if "prompt" in body else {"index": 0, "delta": {"content": text}}
            self.event({"choices": [choice]})
        usage = {"prompt_tokens": 7, "completion_tokens": 4}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    with serving(StandIn, bodies=[], state={"asked": 0}) as server:
        yield server


def traffic(folder: Path, port: int, **changes: Any) -> TrafficConfig:
    target = {"url": f"http://127.0.0.1:{port}", "model": "m", "api_key_env": "A_KEY"}
    values = {
        "output": str(folder / "bench"),
        "prompts": str(folder / "prompts.jsonl"),
        "targets": {"baseline": target, "medusa": target},
        "loads": ["poisson=20", "constant=20.0"],
        "num_requests": 8,
        "num_warmup": 1,
        "rounds": 1,
        "max_seconds": 20,
        "max_tokens": 4,
    }
    return TrafficConfig.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def benched(server: ThreadingHTTPServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrafficConfig]:
    """Open loads of templated text to a server that wants a key: the one real run of GuideLLM in this file."""
    folder = tmp_path_factory.mktemp("bench")
    rows = [{"text": f"<s>user question {i}", "source": "odd" if i % 2 else "even"} for i in range(8)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "train.jsonl").write_text(json.dumps(rows[3]) + "\n" + json.dumps({"text": "something else"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A_KEY", KEY)
        config = traffic(folder, server.server_port, overlap_with=str(folder / "train.jsonl"))
        bench.run(config)
        yield config


def test_an_open_load_sends_each_arm_at_the_same_times_whatever_the_server_does(benched: TrafficConfig) -> None:
    rows = pq.read_table(f"{benched.output}/requests.parquet").to_pylist()
    assert {row["error"] for row in rows} == {None}
    due_s = {}
    for load in benched.loads:
        for arm in benched.targets:
            mine = [row for row in rows if (row["load"], row["arm"]) == (load, arm)]
            found = sorted(row["start_s"] - row["wait_s"] for row in mine)
            due_s[load, arm] = [at - found[0] for at in found]
            assert all(0 <= row["wait_s"] < 5 for row in mine)
        assert due_s[load, "medusa"] == pytest.approx(due_s[load, "baseline"], abs=1e-3)
    assert due_s["constant=20.0", "medusa"] == pytest.approx([0.05 * i for i in range(8)], abs=1e-3)
    assert due_s["poisson=20", "medusa"] == pytest.approx(guidellm.due_s("poisson=20", 8, 0), abs=1e-3)
    assert len({round(b - a, 3) for a, b in itertools.pairwise(due_s["poisson=20", "medusa"])}) > 4


def test_templated_text_goes_to_completions_as_it_is(
    benched: TrafficConfig, server: ThreadingHTTPServer
) -> None:
    paths = {path for path, _, _ in server.bodies}  # type: ignore[attr-defined]  # see StandIn
    assert paths == {"/v1/completions"}
    sent = {body["prompt"] for _, _, body in server.bodies if body.get("stream")}  # type: ignore[attr-defined]
    assert sent == {f"<s>user question {i}" for i in range(8)}
    rows = pq.read_table(f"{benched.output}/requests.parquet").to_pylist()
    assert {(row["prompt"] % 2, row["category"]) for row in rows} == {(0, "even"), (1, "odd")}
    assert {(row["text"], row["output_tokens"], row["events"]) for row in rows} == {("SELECT 1", 4, 2)}


def test_no_file_of_a_benchmark_holds_the_key(benched: TrafficConfig) -> None:
    files = [file for file in Path(benched.output).rglob("*") if file.is_file()]
    assert len(files) > 5
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


def test_bench_json_tells_of_the_client_replicas_and_prompts(benched: TrafficConfig) -> None:
    found = provenance.read_json(f"{benched.output}/bench.json")
    assert found["checks"]["double_bos"] == 8  # the text has the token that the tokenizer adds
    assert found["checks"]["overlap"] == {"checked": True, "exact": 1, "near": 0, "of": 8}
    start, end = found["arms"]["medusa"]["replicas"]
    assert start < end
    assert found["arms"]["medusa"]["autoscales"] is True
    shares = [share for loads in found["client"].values() for values in loads.values() for share in values]
    assert len(shares) == 4
    assert all(0 <= share < 1.5 for share in shares)


def test_a_key_that_is_not_there_is_named_before_any_traffic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("A_KEY", raising=False)
    (tmp_path / "prompts.jsonl").write_text('{"text": "a"}')
    config = traffic(tmp_path, 9)
    with pytest.raises(UserError, match=r"targets.baseline.api_key_env is A_KEY.*Export"):
        bench.run(config)


def test_the_client_is_watched_process_by_process() -> None:
    """An average over GuideLLM's three processes would call a worker idle that has a core to itself."""
    watch = guidellm.Watch(os.getpid())
    started_s = time.time()
    with watch:
        busy_until = time.process_time() + 2.0
        while time.process_time() < busy_until:
            pass
        ended_s = time.time()
    share = watch.busiest(started_s, ended_s)
    assert 1.2 / (ended_s - started_s) < share < 1.2  # up to two looks may be lost at the ends
    assert watch.busiest(ended_s, ended_s) == 0.0


# ---------------------------------------------------------------------------------------------------- break-even


def rows_of(speedup: dict[str, float]) -> list[dict[str, Any]]:
    row = {"round": 0, "error": None, "ttft_s": 0.0, "last_s": None, "output_tokens": 2}
    times = {"baseline": lambda ratio: ratio, "medusa": lambda _: 1.0}
    return [
        {**row, "load": load, "arm": arm, "prompt": prompt, "latency_s": time_of(ratio)}
        for load, ratio in speedup.items()
        for arm, time_of in times.items()
        for prompt in range(5)
    ]


@pytest.mark.parametrize(
    ("speedup", "coming"),
    [
        ({"synchronous": 1.5, "concurrency=16": 0.9}, 8),
        ({"concurrency=4": 1.5, "concurrency=8": 0.9, "concurrency=16": 1.1}, 6),  # the first where it is not
        ({"concurrency=6": 1.5, "concurrency=7": 0.9}, None),
        ({"concurrency=32": 1.5, "concurrency=36": 0.9}, None),  # nearer than noise tells
        ({"concurrency=4": 1.5}, 8),
        ({"concurrency=30": 1.5}, 40),
        ({"concurrency=40": 1.5, "throughput": 0.9}, None),
        ({"concurrency=4": 0.9}, 2),
        ({"synchronous": 0.9}, None),
        ({"poisson=3": 0.9}, None),
    ],
)
def test_the_search_halves_the_way_to_the_first_concurrency_that_loses(
    speedup: dict[str, float], coming: int | None
) -> None:
    assert bench.next_concurrency(rows_of(speedup), 40) == coming


# -------------------------------------------------------------------------------------------------------- prompts


def test_chats_are_read_from_every_form_and_taken_in_turns(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "list.json").write_text(json.dumps([chat, {"messages": chat, "source": "s"}]))
    (tmp_path / "lines.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "c"}]}))
    row = {"messages": [{"role": "user", "content": "d"}], "prompt_ids": [1], "source": "in", "error": None}
    (tmp_path / "split").mkdir()
    pq.write_table(pa.Table.from_pylist([row], records.PROMPTS), tmp_path / "split/part-000000.parquet")
    pq.write_table(pa.table({"messages": [[{"role": "user", "content": "e"}]]}), tmp_path / "any.parquet")
    names = ("list.json", "lines.jsonl", "split", "any.parquet")
    found = read_prompts([str(tmp_path / name) for name in names])
    assert [(prompt.user_text, prompt.category) for prompt in found] == [
        ("a", None), ("c", None), ("d", "in"), ("e", None), ("a", "s"),
    ]  # fmt: skip


def test_prompts_are_read_by_uri_a_folder_of_the_hubs_parquet_too() -> None:
    storage = fsspec.filesystem("memory")
    storage.pipe("/chats/lines.jsonl", b'{"text": "a", "category": "c"}')
    with storage.open("/hub/default/test/0000.parquet", "wb") as file:
        pq.write_table(pa.table({"text": ["b", "c"], "messages": [None, None]}), file)
    found = read_prompts(["memory://chats/lines.jsonl", "memory://hub/default/test"])
    assert found == [Prompt("a", "c"), Prompt("b"), Prompt("c")]


def test_overlap_tells_training_chats_and_those_that_only_sound_like_them() -> None:
    words = [f"w{i}" for i in range(20)]
    known = Prompt([{"role": "user", "content": " ".join(words)}])
    exact = Prompt([{"role": "user", "content": "  ".join(words)}])
    near = Prompt([{"role": "user", "content": "now " + " ".join(words[2 : 2 + NEAR_WORDS])}])
    far = Prompt([{"role": "user", "content": "now " + " ".join(words[2 : 1 + NEAR_WORDS])}])
    assert overlap([exact, near, far], [known]) == {"checked": True, "exact": 1, "near": 1, "of": 3}


def test_a_chat_that_was_templated_before_is_told_even_where_nothing_tokenizes() -> None:
    prompts = [Prompt([{"role": "user", "content": text}]) for text in ("<|im_start|>user\nhi", "hi")]
    nowhere = TargetConfig(url="http://127.0.0.1:9", model="m")
    assert targets.count_double_bos(nowhere, prompts) == 1
    assert targets.count_double_bos(nowhere, prompts[1:]) is None


# ------------------------------------------------------------------------------------------------ replicas, ramp


def test_replicas_are_counted_as_ray_serve_tells_them() -> None:
    def deployment(states: list[str], wanted: int, autoscaling: dict[str, Any] | None) -> dict[str, Any]:
        config = {"autoscaling_config": autoscaling} if autoscaling else {}
        replicas = [{"state": state} for state in states]
        return {"deployment_config": config, "replicas": replicas, "target_num_replicas": wanted}

    apps = {
        "other": {"route_prefix": "/", "deployments": {"x": deployment(["RUNNING"] * 9, 9, None)}},
        "mine": {
            "route_prefix": "/medusa",
            "deployments": {
                "Router": deployment(["RUNNING"], 1, None),
                "Engine": deployment(["RUNNING", "STARTING"], 3, {"max_replicas": 4}),
            },
        },
    }
    assert targets._of_serve(apps, "/medusa") == (1, 3, True)
    assert targets._of_serve(apps, "/") == (9, 9, False)


def test_a_ramp_keeps_its_steps_and_tells_replicas_and_latency(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    monkeypatch.setattr(ramp, "SAMPLE_S", 0.2)
    server.bodies.clear()  # type: ignore[attr-defined]  # see StandIn
    steps = {"target": "medusa", "steps": [[1, 1], [1, 4], [1, 1]]}
    began_s = time.time()
    found = ramp.run(traffic(tmp_path, server.server_port, ramp=steps), [Prompt("a")])
    assert found is not None
    assert (found["arm"], found["steps"], found["failed"]) == ("medusa", [[0.0, 1], [1.0, 4], [2.0, 1]], 0)
    sent_s = [at - began_s for _, at, _ in server.bodies]  # type: ignore[attr-defined]
    per_step = [sum(step <= at < step + 1 for at in sent_s) for step in range(3)]
    assert per_step[1] > 1.5 * max(per_step[0], per_step[2])
    assert [second for second, _, _ in found["latency"]][:3] == [0, 1, 2]
    assert all(LATENCY_S <= p50_s <= p99_s for _, p50_s, p99_s in found["latency"])
    running = [replicas for _, replicas, _ in found["replicas"]]
    assert len(running) > 5
    assert running == sorted(running)


# ------------------------------------------------------------------------------------------------------ the blog

OLD = shlex.split("""--target http://localhost:8080/v1 --model philschmid/code-llama-3-1-8b-text-to-sql-medusa
    --data philschmid/text-to-sql-dataset-medusa-test-chatml --data-type transformers --max-seconds 60
    --output-path benchmark_medusa.json""")


@pytest.mark.parametrize("words", [["guidellm", *OLD], OLD, ["guidellm", "benchmark", *OLD]])
def test_the_blogs_line_is_answered_with_a_file_that_does_the_same(words: list[str]) -> None:
    assert blog.is_old_line(words)
    text = blog.answer(words)
    config = parse(TrafficConfig, yaml.safe_load(text.split("\n\n")[1]), "the answer")
    assert config.targets["medusa"].url == "http://localhost:8080"
    assert config.targets["medusa"].model == "philschmid/code-llama-3-1-8b-text-to-sql-medusa"
    assert config.prompts == [
        "hf://datasets/philschmid/text-to-sql-dataset-medusa-test-chatml@refs%2Fconvert%2Fparquet/default/test"
    ]
    assert (config.output, config.max_seconds) == ("benchmark_medusa", 60)
    assert config.loads == ["synchronous", "throughput"]
    assert "medusa-ray bench traffic.yaml" in text


def test_flags_that_nothing_takes_the_place_of_are_named() -> None:
    line = "--rate-type constant --rate 1,2.5 --data x.jsonl --processor somewhere"
    text = blog.answer(line.split())
    assert "- constant=1\n- constant=2.5\n" in text
    assert "prompts: x.jsonl" in text
    assert "Nothing takes the place of --processor." in text


def test_the_command_line_answers_the_blogs_line() -> None:
    for words in (["guidellm", *OLD], OLD):
        done = CliRunner().invoke(cli.app, ["bench", *words])
        assert isinstance(done.exception, UserError), done.output
        assert "this is GuideLLM's old command line" in str(done.exception)
    assert not blog.is_old_line(["traffic.yaml", "rounds=3"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loads": ["poisson=0"]}, "loads has 'poisson=0'"),
        ({"loads": ["constant"]}, "loads has 'constant'"),
        ({"loads": ["concurrency=2.5"]}, "loads has 'concurrency=2.5'"),
        ({"external": "vllm"}, r"external is 'vllm', which is none of the targets \['baseline', 'medusa'\]"),
        ({"ramp": {"target": "x", "steps": [[1, 1]]}}, "ramp.target is 'x'"),
    ],
)
def test_traffic_that_cannot_be_sent_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(TrafficConfig, {**traffic(tmp_path, 9).model_dump(), **changes}, "traffic.yaml")
