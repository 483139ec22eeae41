"""Replies of a server that stumbles are the replies of one that does not."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_distill import config_of, make_prompts, rows_of

from medusa_ray import distill, parts, provenance
from medusa_ray.chat import Chat
from medusa_ray.config import EngineConfig, RunConfig, UserError
from medusa_ray.distill import http as asking
from medusa_ray.distill.rows import read_facts, seed_of
from medusa_ray.medusa.engine import Engine
from medusa_ray.serve import Server, build_api


class Fake(ThreadingHTTPServer):
    """Answers with the end of the prompt, but the first requests of a prompt as `faults` says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: dict[tuple[int, ...], list[str]] = {}
        self.asked: list[dict[str, Any]] = []
        self.times: dict[tuple[int, ...], list[float]] = {}
        self.keys: set[str | None] = set()
        self.sends_ids = True
        self.num_open = self.most_open = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.num_open += 1
            self.server.most_open = max(self.server.most_open, self.server.num_open)
            self.server.asked.append(body)
            self.server.times.setdefault(tuple(body["prompt"]), []).append(time.monotonic())
            self.server.keys.add(self.headers["Authorization"])
            faults = self.server.faults.get(tuple(body["prompt"]), [])
            fault = faults.pop(0) if faults else "none"
        time.sleep(0.01)
        try:
            self._answer(body, fault)
        finally:
            with self.server.lock:
                self.server.num_open -= 1

    def _answer(self, body: dict[str, Any], fault: str) -> None:
        if fault == "timeout":
            time.sleep(0.6)
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
        elif fault != "none":
            status, _, more = fault.partition(" ")
            self.send_response(int(status))
            if more:
                self.send_header("Retry-After", more)
            self.end_headers()
            self.wfile.write(b"what was it?")
        else:
            choice: dict[str, Any] = {"text": "hello", "finish_reason": "stop"}
            if self.server.sends_ids and body.get("return_token_ids"):
                choice["token_ids"] = [*body["prompt"][-3:], 2]
            reply = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FIRST_WAIT_S", 0.01)


def http_config(folder: Path, base: Path, url: str, **server: Any) -> RunConfig:
    server = {"url": url, "model": "m", "concurrency": 4, "timeout_s": 0.3, "retries": 3, **server}
    return config_of(folder, base, mode="compute", engine="http", server=server)


def asked_for(config: RunConfig) -> list[dict[str, Any]]:
    asker = asking.Asker(config, config.model.base, config.artifact("prompts"), config.artifact("distilled"))
    for shard in distill.plan(f"{config.output}/prompts/train", 4):
        asker(shard)
    return rows_of(config, "distilled")


def test_a_server_that_stumbles_gives_every_row_its_reply(
    fake: Fake, tmp_path: Path, tiny_base: Path
) -> None:
    """A fault that is not tried again loses a row; one that is tried for ever loses the run."""
    prompts = make_prompts(tmp_path, tiny_base)
    config = http_config(tmp_path, tiny_base, fake.url, concurrency=4)
    plan = {0: ["503"], 1: ["429 0.3"], 2: ["timeout"], 4: ["cut", "500"], 5: ["400"], 6: ["503"] * 9}
    fake.faults = {tuple(prompts[i]["prompt_ids"]): list(faults) for i, faults in plan.items()}
    rows = asked_for(config)
    errors = {i: row["error"] for i, row in enumerate(rows) if row["error"]}
    assert errors == {
        5: "refused by the server: 400 what was it?",
        6: "no answer from the server: 503 what was it?, 4 times",
        7: "too long: very",
    }
    for prompt, row in zip(prompts, rows, strict=True):
        if not row["error"]:
            assert (row["reply_ids"], row["finish_reason"]) == ([*prompt["prompt_ids"][-3:], 2], "stop")
    first_s, second_s = fake.times[tuple(prompts[1]["prompt_ids"])]
    assert second_s - first_s > 0.3  # what Retry-After says
    assert 1 < fake.most_open <= 4 + 1  # one has timed out here, and not there
    facts = read_facts(config.artifact("distilled"), parts.part_name(0))
    later = read_facts(config.artifact("distilled"), parts.part_name(1))
    assert facts["retries"] + later["retries"] == 1 + 1 + 1 + 2 + 3
    body = next(body for body in fake.asked if body["prompt"] == prompts[0]["prompt_ids"])
    assert body == {
        "model": "m", "prompt": prompts[0]["prompt_ids"], "max_tokens": 12, "temperature": 0.0, "top_p": 1.0,
        "seed": seed_of(0, "chat00/0"), "return_token_ids": True,
    }  # fmt: skip


def test_a_server_that_sends_no_token_ids_has_its_text_tokenised(
    fake: Fake, tmp_path: Path, tiny_base: Path
) -> None:
    make_prompts(tmp_path, tiny_base)
    config = http_config(tmp_path, tiny_base, fake.url)
    fake.sends_ids = False
    rows = asked_for(config)
    hello = Chat.load(str(tiny_base)).text_ids("hello")
    assert [row["reply_ids"] for row in rows if not row["error"]] == [[*hello[-5:], 2]] * 19
    names = parts.names(config.artifact("distilled"))
    assert sum(read_facts(config.artifact("distilled"), name)["retokenised"] for name in names) == 19


def test_a_server_that_is_gone_stops_the_run_and_keeps_the_rows(tmp_path: Path, tiny_base: Path) -> None:
    """Each row in turn would become an error, and the error would be kept."""
    make_prompts(tmp_path, tiny_base)
    config = http_config(tmp_path, tiny_base, "http://127.0.0.1:9", retries=1)
    with pytest.raises(UserError, match=r"has answered nobody for .* Once it runs, the same command goes on"):
        asked_for(config)
    assert parts.names(config.artifact("distilled")) == []


def test_a_wrong_key_or_model_is_the_users_mistake(
    fake: Fake, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts(tmp_path, tiny_base)
    fake.faults = {tuple(prompts[0]["prompt_ids"]): ["401"]}
    config = http_config(tmp_path, tiny_base, fake.url, api_key_env="A_KEY")
    with pytest.raises(UserError, match=r"'A_KEY', but no such variable is set"):
        asked_for(config)
    monkeypatch.setenv("A_KEY", "secret")
    with pytest.raises(UserError, match=r"says 401 .* Set distill.server's url, model and api_key_env"):
        asked_for(config)
    assert fake.keys == {"Bearer secret"}


def test_samples_are_asked_for_with_seeds_of_their_own(fake: Fake, tmp_path: Path, tiny_base: Path) -> None:
    make_prompts(tmp_path, tiny_base)
    server = {"url": fake.url, "model": "m"}
    config = config_of(
        tmp_path, tiny_base, mode="compute", engine="http", server=server, samples=3, temperature=0.5
    )
    rows = asked_for(config)
    assert [row["id"] for row in rows[:4]] == ["chat00/0/0", "chat00/0/1", "chat00/0/2", "chat01/0/0"]
    assert len({body["seed"] for body in fake.asked}) == len(fake.asked) == 57


@pytest.fixture
def own_server(tiny_base: Path) -> Iterator[str]:
    """Our own server of the base, in a thread."""
    uvicorn = pytest.importorskip("uvicorn")
    engine = Engine.load(str(tiny_base), max_batch_size=4, max_total_tokens=512)
    app = build_api(
        Server(engine, Chat.load(str(tiny_base)), EngineConfig(model_id="m", base=str(tiny_base)))
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.mark.ray
def test_our_own_server_says_what_the_engine_says(
    ray_cluster: None, own_server: str, tmp_path: Path, tiny_base: Path
) -> None:
    """Token for token, sampled: ids that had gone through text would differ."""
    prompts = make_prompts(tmp_path, tiny_base)
    config = http_config(tmp_path, tiny_base, own_server, timeout_s=60)
    config = config.model_copy(update={"distill": config.distill.model_copy(update={"temperature": 1.0})})
    distill.run(config)
    rows = rows_of(config, "distilled")
    assert {i for i, row in enumerate(rows) if row["error"]} == {7, 11}
    good = [prompt for i, prompt in enumerate(prompts) if i not in (7, 11)]
    alone = Engine.load(str(tiny_base), max_batch_size=3, max_total_tokens=512).generate(
        [prompt["prompt_ids"] for prompt in good],
        max_new_tokens=12,
        temperature=1.0,
        seed=[seed_of(0, prompt["id"]) for prompt in good],
    )
    assert [row["reply_ids"] for row in rows if not row["error"]] == [one.token_ids for one in alone]
    record = provenance.read(config.artifact("distilled"))
    assert (record["retokenised"], record["rows"]["good"]) == (0, 18)
