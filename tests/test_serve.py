"""A server over HTTP: first with a scripted engine and without Ray, then two applications on Ray Serve."""

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray.serve
import yaml
from fakes import ScriptedEngine
from fastapi.testclient import TestClient

from medusa_ray import config, openai_api, serve
from medusa_ray.chat import Chat
from medusa_ray.config import EngineConfig, ServeConfig, UserError
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.openai_api import ChatRequest
from medusa_ray.serve import Server, build_api
from medusa_ray.serve.calls import Call
from medusa_ray.serve.cluster import application

CONFIGS = Path(__file__).parent.parent / "serve_configs"
SERVE_FILES = [
    path for path in sorted(CONFIGS.glob("*.yaml")) if not path.stem.startswith(("traffic_", "kuberay_"))
]
CHAT: dict[str, Any] = {"model": "medusa", "messages": [{"role": "user", "content": "hi"}]}
CHAT_URL, COMPLETION_URL = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def chat(tiny_base: Path) -> Chat:
    return Chat.load(str(tiny_base))


def server_of(engine: ScriptedEngine, chat: Chat, **args: Any) -> Server:
    return Server(engine, chat, EngineConfig(model_id="medusa", aliases=["tgi"], base="base", **args))


def client_of(engine: ScriptedEngine, chat: Chat, **args: Any) -> TestClient:
    return TestClient(build_api(server_of(engine, chat, **args)))


def steps_of(chat: Chat, *texts: str) -> list[list[int]]:
    return [chat.text_ids(text) for text in texts]


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n")]
    assert lines[-2:] == ["[DONE]", ""]
    return [json.loads(line) for line in lines[:-2]]


def streamed_text(response: httpx.Response) -> str:
    choices = [event["choices"][0] for event in events_of(response) if event["choices"]]
    return "".join(choice["delta"]["content"] if "delta" in choice else choice["text"] for choice in choices)


# ------------------------------------------------------------------------------------------- without Ray


@pytest.mark.parametrize(
    ("stop", "text"),
    [(None, "héllo wörld ünd END of it"), ("END", "héllo wörld ünd "), (["ünd", "zz"], "héllo wörld ")],
)
def test_a_stream_carries_the_text_and_usage_of_the_whole_reply(chat: Chat, stop: Any, text: str) -> None:
    engine = ScriptedEngine(steps_of(chat, "h", "éllo ", "wörld ü", "nd E", "ND of it"))
    client = client_of(engine, chat)
    for url, body in ((CHAT_URL, CHAT), (COMPLETION_URL, {"model": "tgi", "prompt": "hi", "max_tokens": 50})):
        asked = {**body, "stop": stop, "stream_options": {"include_usage": True}}
        whole = client.post(url, json=asked).json()
        stream = client.post(url, json={**asked, "stream": True})
        choice = whole["choices"][0]
        assert (choice["message"]["content"] if "message" in choice else choice["text"]) == text
        assert streamed_text(stream) == text
        last = events_of(stream)[-1]
        assert (last["usage"], last["metrics"]) == (whole["usage"], whole["metrics"])


def test_the_engine_gets_what_was_asked_for(chat: Chat) -> None:
    """A parameter that is lost on the way still gives a fluent answer."""
    engine = ScriptedEngine(steps_of(chat, "a", "b"))
    client = client_of(engine, chat)
    client.post(
        CHAT_URL, json={**CHAT, "temperature": 0, "top_p": 0.5, "top_k": 7, "seed": 3, "max_tokens": 9}
    )
    client.post(
        CHAT_URL, json={**CHAT, "ignore_eos": True, "top_k": -1, "max_tokens": 9, "max_completion_tokens": 4}
    )
    client.post(COMPLETION_URL, json={"model": "medusa", "prompt": [5, 6, 7]})
    first, second, third = engine.requests
    assert first.prompt_ids == chat.prompt_ids(CHAT["messages"])
    assert (first.temperature, first.top_p, first.top_k, first.seed, first.max_new_tokens) == (
        0,
        0.5,
        7,
        3,
        9,
    )
    assert first.ignore_eos is False
    assert (second.temperature, second.top_p, second.top_k, second.seed) == (1.0, 1.0, 0, None)
    assert (second.ignore_eos, second.max_new_tokens) == (True, 4)
    assert (third.prompt_ids, third.max_new_tokens) == ([5, 6, 7], 16)


def test_the_engine_gets_every_setting_and_the_client_the_logprobs(chat: Chat) -> None:
    """A penalty that is lost on the way still gives a fluent answer."""
    engine = ScriptedEngine(steps_of(chat, "a", "bcd"))
    client = client_of(engine, chat)
    fields = {
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.1,
        "logit_bias": {"7": -5, "9": 2.5},
        "acceptance": "typical",
        "speculates": False,
        "deadline_s": 30.5,
    }
    asked = {**CHAT, **fields, "logprobs": True, "top_logprobs": 2}
    whole = client.post(CHAT_URL, json=asked).json()["choices"][0]
    events = events_of(client.post(CHAT_URL, json={**asked, "stream": True}))
    client.post(CHAT_URL, json=CHAT)
    completion = client.post(COMPLETION_URL, json={"model": "medusa", "prompt": "x", "logprobs": 0}).json()
    first, _, third, _ = engine.requests
    got = {name: getattr(first, name) for name in fields}
    assert got == {**fields, "logit_bias": {7: -5, 9: 2.5}}
    assert [r.logprobs for r in engine.requests] == [2, 2, None, 0]
    assert (third.min_p, third.repetition_penalty, third.logit_bias, third.acceptance) == (0, 1, {}, "exact")
    assert (third.speculates, third.deadline_s) == (True, None)
    assert [entry["token"] for entry in whole["logprobs"]["content"]] == list("abcd")
    streamed = [e for event in events for c in event["choices"] for e in c["logprobs"]["content"]]
    assert streamed == whole["logprobs"]["content"]
    assert [alternative["token"] for alternative in streamed[1]["top_logprobs"]] == ["b", chat.text([6])]
    assert completion["choices"][0]["logprobs"]["tokens"] == list("abcd")


@pytest.mark.parametrize(
    ("status", "fields", "says"),
    [
        (404, {"model": "gpt-4"}, "served: medusa, tgi"),
        (404, {"model": "../../etc/passwd"}, "does not exist"),
        (404, {"model": "m" * 10_000}, "does not exist"),
        (404, {"model": "a\x00b"}, "does not exist"),
        (400, {"messages": []}, "messages"),
        (400, {"messages": [{"role": "user", "content": "x" * 600}]}, "at most 511 (max_input_tokens)"),
        (400, {"stop": list("abcde")}, "stop has 5 strings, but at most 4 (max_stop_sequences)"),
        (400, {"max_tokens": 511}, "ask for at most"),
        (400, {"tools": [{"type": "function"}]}, "tools.0.function is missing"),
        (400, {"temperature": 3}, "temperature is 3"),
        (400, {"logit_bias": {"262": 1}}, "logit_bias has the token id 262, outside 0 ... 261"),
    ],
)
def test_a_wrong_request_gets_a_clear_error_and_the_next_one_an_answer(
    chat: Chat, status: int, fields: dict[str, Any], says: str
) -> None:
    client = client_of(ScriptedEngine(steps_of(chat, "a", "b")), chat)
    for stream in (False, True):
        response = client.post(CHAT_URL, json={**CHAT, **fields, "stream": stream})
        assert response.status_code == status
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert says in error["message"]
        assert client.post(CHAT_URL, json=CHAT).status_code == 200


def test_odd_bodies_and_routes_are_4xx_in_openais_shape(chat: Chat) -> None:
    client = client_of(ScriptedEngine(steps_of(chat, "a")), chat)
    for response, status in (
        (client.post(CHAT_URL, content=b"{"), 400),
        (client.post(CHAT_URL, content=b"\xff" * 100), 400),
        (client.post(CHAT_URL, content=b"[" * 100_000), 400),
        (client.post(CHAT_URL, content=b" " * 2_000_001), 413),
        (client.post(COMPLETION_URL, json={"model": "medusa", "prompt": [262]}), 400),
        (client.post(COMPLETION_URL, json={"model": "medusa", "prompt": [2**70]}), 400),
        (client.get(CHAT_URL), 405),
        (client.get("/v1/nothing"), 404),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_a_base_without_a_chat_template_refuses_chat_but_completes_text(chat: Chat) -> None:
    bare = Chat(chat.tokenizer.__class__(tokenizer_object=chat.tokenizer.backend_tokenizer))
    client = client_of(ScriptedEngine(steps_of(chat, "a")), bare)
    assert client.post(CHAT_URL, json=CHAT).status_code == 400
    assert client.post(COMPLETION_URL, json={"model": "medusa", "prompt": "x"}).status_code == 200


def test_special_tokens_in_user_text_are_text_for_the_template_only(chat: Chat) -> None:
    """Jinja in a message must come out as it went in."""
    engine = ScriptedEngine(steps_of(chat, "a"))
    client_of(engine, chat).post(
        CHAT_URL, json={**CHAT, "messages": [{"role": "user", "content": "{{ 7 * 7 }}"}]}
    )
    assert "{{ 7 * 7 }}" in chat.text(engine.requests[0].prompt_ids)


def test_a_failed_engine_answers_503_and_is_unhealthy(chat: Chat) -> None:
    engine = ScriptedEngine(steps_of(chat, "a"))
    client = client_of(engine, chat)
    assert client.get("/health").status_code == 200
    engine.failure = RuntimeError("out of memory")
    for response in (
        client.get("/health"),
        client.post(CHAT_URL, json=CHAT),
        client.post(CHAT_URL, json={**CHAT, "stream": True}),
    ):
        assert response.status_code == 503
        assert "out of memory" in response.json()["error"]["message"]


def test_an_engine_that_fails_in_the_middle_ends_the_stream_with_an_error(chat: Chat) -> None:
    """A stream that is merely cut looks like a short answer."""

    class Dying(ScriptedEngine):
        async def stream(self, request: Any) -> Any:
            async for delta in super().stream(request):
                yield delta
                raise RuntimeError("the engine has failed: bang")

    client = client_of(Dying(steps_of(chat, "a", "b")), chat)
    shown, error, end = client.post(CHAT_URL, json={**CHAT, "stream": True}).text.split("\n\n")
    assert json.loads(shown.removeprefix("data: "))["choices"][0]["delta"]["content"] == "a"
    assert "bang" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert end == ""  # no [DONE], as if that were all


def test_models_info_and_metrics_tell_what_is_served(chat: Chat) -> None:
    client = client_of(ScriptedEngine(steps_of(chat, "a", "bcd", "e")), chat)
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["medusa", "tgi"]
    client.post(CHAT_URL, json=CHAT)
    text = client.get("/metrics").text
    label = '{model_name="medusa"}'
    assert f"medusa_ray_request_skipped_tokens_sum{label} 2.0" in text
    assert f"medusa_ray_request_skipped_tokens_count{label} 3.0" in text
    assert 'medusa_ray_request_success_total{finished_reason="stop",model_name="medusa"} 1.0' in text


def test_a_slow_reader_of_several_choices_gets_every_step_as_it_was(chat: Chat) -> None:
    """A reply that went on while its last step waited to be sent would end twice, and others never."""
    engine = ScriptedEngine(steps_of(chat, "a", "b", "c"))
    server = server_of(engine, chat)
    request = openai_api.parse(ChatRequest, json.dumps({**CHAT, "n": 3}).encode())

    async def read() -> dict[int, list[tuple[str, str | None]]]:
        seen: dict[int, list[tuple[str, str | None]]] = {}
        async for text, reply in server.answer(request, Call("x")):
            for _ in range(50):  # as long as sending takes
                await asyncio.sleep(0)
            seen.setdefault(reply.index, []).append((text, reply.finish_reason))
        return seen

    steps = [("a", None), ("b", None), ("c", "stop")]
    assert asyncio.run(read()) == {0: steps, 1: steps, 2: steps}


# ------------------------------------------------------------------------------------- clients that hang up


class Caller:
    """An HTTP client at the level of ASGI, which can hang up whenever it likes."""

    def __init__(self, server: Server, **fields: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        body = json.dumps({**CHAT, **fields}).encode()
        self._incoming = [{"type": "http.request", "body": body, "more_body": False}]
        scope = {
            "type": "http",
            "method": "POST",
            "path": CHAT_URL,
            "headers": [],
            "query_string": b"",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }
        self.done = asyncio.create_task(build_api(server)(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._incoming:
            return self._incoming.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    async def hang_up(self) -> None:
        self.gone.set()
        await asyncio.wait_for(self.done, timeout=5)


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps_before_gate", [0, 2])
def test_a_client_that_hangs_up_cancels_its_request(chat: Chat, stream: bool, steps_before_gate: int) -> None:
    """Before the first token (as when queued) and in the middle, streaming or not."""

    async def scenario() -> None:
        engine = ScriptedEngine(steps_of(chat, "a", "b", "c", "d"))
        engine.steps_before_gate = steps_before_gate
        server = server_of(engine, chat)
        caller = Caller(server, stream=stream)
        await settle()
        assert (engine.num_open, engine.num_cancelled) == (1, 0)
        await caller.hang_up()
        await settle()
        assert (engine.num_open, engine.num_cancelled) == (0, 1)
        num_texts = sum(b'"content"' in message.get("body", b"") for message in caller.sent)
        assert num_texts == (steps_before_gate if stream else 0)

    asyncio.run(scenario())


def test_one_request_too_many_is_told_when_to_come_back(chat: Chat) -> None:
    """Without a limit, overload becomes a queue in which every client times out."""

    async def scenario() -> None:
        engine = ScriptedEngine(steps_of(chat, "a", "b"))
        engine.steps_before_gate, engine.max_open = 1, 3
        server = server_of(engine, chat)
        callers = [Caller(server, stream=i % 2 == 0) for i in range(5)]
        await settle()
        engine.gate.set()
        await asyncio.gather(*(caller.done for caller in callers))
        starts = [caller.sent[0] for caller in callers]
        assert [start["status"] for start in starts] == [200, 200, 200, 429, 429]
        assert (b"retry-after", b"1") in starts[3]["headers"]
        assert "queue_full" in callers[3].sent[1]["body"].decode()
        assert engine.num_open == 0

    asyncio.run(scenario())


def test_the_queue_that_the_file_allows_is_the_engines(chat: Chat, tiny_base: Path) -> None:
    """Between two counts of the same requests one could slip through, or be refused with room to spare."""
    args = {
        "max_batch_size": 2,
        "max_concurrent_requests": 3,
        "dtype": "float32",
        "compile": "no",
        "device": "cpu",
    }
    server = Server.load(EngineConfig(model_id="medusa", base=str(tiny_base), **args))

    async def scenario() -> None:
        callers = [Caller(server, stream=i % 2 == 0, max_tokens=300, ignore_eos=True) for i in range(5)]
        await asyncio.gather(*(caller.done for caller in callers[3:]))
        assert [caller.sent[0]["status"] for caller in callers[3:]] == [429, 429]
        body = callers[3].sent[1]["body"].decode()
        assert "3 requests run or wait here, and no more than 3 may" in body
        assert "queue_full" in body
        for caller in callers[:3]:
            await caller.hang_up()

    asyncio.run(scenario())


def test_a_deadline_ends_a_reply_with_what_it_has(chat: Chat, tiny_base: Path) -> None:
    args = {"dtype": "float32", "compile": "no", "device": "cpu"}
    client = TestClient(build_api(Server.load(EngineConfig(model_id="medusa", base=str(tiny_base), **args))))
    asked = {**CHAT, "temperature": 0, "ignore_eos": True, "max_tokens": 400}
    whole = client.post(CHAT_URL, json=asked).json()["choices"][0]
    for stream in (False, True):
        response = client.post(CHAT_URL, json={**asked, "deadline_s": 0.1, "stream": stream})
        if stream:
            text, reason = streamed_text(response), events_of(response)[-1]["choices"][0]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        assert reason == "deadline"
        assert len(text) < len(whole["message"]["content"])


# ------------------------------------------------------------------------------------------- serve files


@pytest.mark.parametrize("path", SERVE_FILES, ids=lambda path: path.stem)
def test_every_serve_file_is_valid_for_ray_and_for_us(path: Path) -> None:
    """Ray ignores keys that it does not know, so what it parsed must hold all that the file says."""
    from ray.serve.schema import ServeDeploySchema

    raw = yaml.safe_load(path.read_text())
    ours = config.load(ServeConfig, path)
    theirs = ServeDeploySchema.model_validate(raw).model_dump(exclude_unset=True, mode="json")
    assert theirs == raw
    assert ours.http_options.host == "127.0.0.1"
    for app in ours.applications:
        application(app)  # the overrides are ones that the deployment knows


# ------------------------------------------------------------------------------------------------ with Ray


@pytest.mark.ray
def test_a_port_in_use_is_named_before_anything_starts(ray_cluster: None) -> None:
    app = {"name": "a", "args": {"model_id": "m", "base": "b"}}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        file = config.parse(ServeConfig, {"http_options": {"port": port}, "applications": [app]}, "x.yaml")
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is not free"):
            serve.deploy(file)
    assert not ray.serve.status().proxies


@pytest.fixture(scope="module")
def urls(
    ray_cluster: None, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """URLs of a Medusa and a baseline application, deployed from the demo's serve file."""
    heads = tmp_path_factory.mktemp("heads")
    MedusaHeads(num_heads=3, num_layers=1, hidden_size=32, vocab_size=262).save(heads, str(tiny_base))
    raw = yaml.safe_load((CONFIGS / "compare_demo.yaml").read_text())
    raw["http_options"]["port"] = serve.free_port()
    for app in raw["applications"]:
        app["args"].update(
            base=str(tiny_base), compile="no", **({"heads": str(heads)} if app["args"].get("heads") else {})
        )
    yield serve.deploy(config.parse(ServeConfig, raw, "compare_demo.yaml"))
    serve.shutdown()
    assert not ray.serve.status().applications
    ray.serve.shutdown()


@pytest.mark.ray
def test_both_applications_answer_with_the_same_text(urls: dict[str, str]) -> None:
    """The same greedy text with heads and without, streamed or not: the promise, seen from outside."""
    body = {**CHAT, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    texts = {}
    for name, url in urls.items():
        whole = httpx.post(f"{url}{CHAT_URL}", json={**body, "model": name}, timeout=60).json()
        texts[name] = whole["choices"][0]["message"]["content"]
        assert whole["usage"]["completion_tokens"] == 40
        stream = httpx.post(f"{url}{CHAT_URL}", json={**body, "model": name, "stream": True}, timeout=60)
        assert streamed_text(stream) == texts[name]
    assert texts["medusa"] == texts["baseline"]
    assert texts["medusa"]

    seeded = {"prompt": "SELECT", "temperature": 1.0, "seed": 5, "max_tokens": 30}
    sampled = {
        name: httpx.post(f"{url}{COMPLETION_URL}", json={**seeded, "model": name}, timeout=60).json()[
            "choices"
        ]
        for name, url in urls.items()
    }
    assert sampled["medusa"] == sampled["baseline"]


@pytest.mark.ray
def test_each_application_has_its_own_name_facts_and_metrics(urls: dict[str, str]) -> None:
    wrong = httpx.post(f"{urls['medusa']}{CHAT_URL}", json={**CHAT, "model": "baseline"})
    assert wrong.status_code == 404
    assert wrong.json()["error"]["code"] == "model_not_found"
    info = {name: httpx.get(f"{url}/info").json() for name, url in urls.items()}
    assert (info["medusa"]["num_heads"], info["baseline"]["num_heads"]) == (3, 0)
    assert (info["medusa"]["head_layout"], info["medusa"]["draft_vocab_size"]) == ("own", 262)
    assert (info["baseline"]["head_layout"], info["baseline"]["draft_vocab_size"]) == (None, None)
    assert info["medusa"]["mode"] == "eager"
    for name in (
        "medusa_ray_spec_decode_num_drafts_total",
        "medusa_ray_spec_decode_num_draft_tokens_total",
        "medusa_ray_spec_decode_num_accepted_tokens_total",
        'medusa_ray_spec_decode_num_accepted_tokens_per_pos_total{model_name="medusa",position="2",replica="',
        "medusa_ray_request_skipped_tokens_sum",
        "medusa_ray_request_skipped_tokens_count",
    ):
        assert name in httpx.get(f"{urls['medusa']}/metrics").text


@pytest.mark.ray
def test_ray_tells_the_metrics_of_every_replica(urls: dict[str, str]) -> None:
    """Behind the proxy /metrics is that of one replica, whichever answers."""
    response = httpx.post(f"{urls['medusa']}{CHAT_URL}", json=CHAT, headers={"x-request-id": "mine"}, timeout=60)
    assert response.headers.get_list("x-request-id") == ["mine"]
    here = httpx.get(f"{urls['medusa']}/metrics").text
    assert 'replica="' in here
    node = ray.nodes()[0]
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = [
        re.compile(f'{name}{{.*application="{app}".*replica="', re.MULTILINE)
        for app in urls
        for name in ("^ray_medusa_ray_request_count_total", "^ray_medusa_ray_e2e_request_latency_seconds_bucket")
    ]
    text = ""
    deadline_s = time.monotonic() + 60
    while not all(pattern.search(text) for pattern in wanted):
        assert time.monotonic() < deadline_s, text
        time.sleep(1)
        text = httpx.get(page, timeout=30).text


@pytest.mark.ray
def test_a_client_of_ray_serve_that_hangs_up_leaves_nothing_running(urls: dict[str, str]) -> None:
    """Unseen, such requests run to their end and take the place of those that somebody waits for."""
    url = urls["baseline"]
    endless = {**CHAT, "model": "baseline", "max_tokens": 480, "ignore_eos": True}
    before = metric(url, "generation_tokens_total")
    for _ in range(5):
        with httpx.stream(
            "POST", f"{url}{CHAT_URL}", json={**endless, "stream": True}, timeout=60
        ) as response:
            next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}{CHAT_URL}", json=endless, timeout=0.05)
    deadline_s = time.monotonic() + 30
    while metric(url, "num_requests_running") + metric(url, "num_requests_waiting"):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert metric(url, "generation_tokens_total") - before < 6 * 480


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"medusa_ray_{name}{{"))


@pytest.mark.ray
def test_an_application_that_cannot_be_served_says_why(urls: dict[str, str], tiny_base: Path) -> None:
    """A replica's traceback is pages long; the user needs its last line."""
    args = {
        "model_id": "m",
        "base": str(tiny_base),
        "tree": [[0]],
        "dtype": "float32",
    }  # a tree without heads
    app = {"name": "bad", "route_prefix": "/bad", "args": args}
    with pytest.raises(UserError, match=r"application bad cannot be served: ValueError: .*needs heads"):
        serve.deploy(config.parse(ServeConfig, {"applications": [app]}, "x.yaml"))


@pytest.mark.ray
def test_a_url_stays_as_it_is_where_replicas_have_no_ports_of_their_own(urls: dict[str, str]) -> None:
    """The cluster of the tests was started without `serve.environment()`."""
    assert serve.direct_url(urls["medusa"]) == urls["medusa"]
