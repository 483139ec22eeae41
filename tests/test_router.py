"""The resilient shape: the parts of a router without Ray, then two models behind one URL, with replicas that die."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray.serve
from fakes import ScriptedEngine
from fastapi.testclient import TestClient
from pydantic_core import from_json
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError
from serve_load import PROMPTS, ask, body_of, load_on, replicas_of, texts_of, until

from medusa_ray import config, serve
from medusa_ray.chat import Chat
from medusa_ray.config import EngineConfig, ResilientConfig, ServeConfig, UserError
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.openai_api import ApiError, CompletionRequest, parse
from medusa_ray.serve import router as module
from medusa_ray.serve.cluster import application
from medusa_ray.serve.http import ROUTES, build_api
from medusa_ray.serve.router import MAX_TRIES, Forwarded, Head, Router, answer, seeded
from medusa_ray.serve.server import Server

COMPLETION_URL = "/v1/completions"
ASKED = {"model": "medusa", "prompt": "hi"}


@pytest.fixture(scope="module")
def chat(tiny_base: Path) -> Chat:
    return Chat.load(str(tiny_base))


def api_of(engine: ScriptedEngine, chat: Chat) -> Any:
    return build_api(Server(engine, chat, EngineConfig(model_id="medusa", base="base")))


def call_of(**fields: Any) -> Forwarded:
    headers = [(b"content-type", b"application/json")]
    return Forwarded("POST", COMPLETION_URL, b"", headers, json.dumps({**ASKED, **fields}).encode())


async def all_of(parts: AsyncGenerator[Head | bytes]) -> tuple[Head, list[bytes]]:
    head, *rest = [part async for part in parts]
    return head, rest


# ------------------------------------------------------------------------------------------- without Ray


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"temperature": -1}, {"model": "other"}])
def test_an_answer_without_a_socket_is_the_one_over_it(chat: Chat, fields: dict[str, Any]) -> None:
    api = api_of(ScriptedEngine([chat.text_ids(text) for text in ("a", "bcd", "e")]), chat)
    over = TestClient(api).post(COMPLETION_URL, json={**ASKED, **fields})
    head, rest = asyncio.run(all_of(answer(api, call_of(**fields))))
    assert head.status == over.status_code
    assert head.is_whole == (not fields.get("stream"))
    assert dict(head.headers)[b"content-type"].decode() == over.headers["content-type"]
    assert rest if fields.get("stream") else not rest
    assert named((head.body + b"".join(rest)).decode()) == named(over.text)


def named(text: str) -> list[Any]:
    """Bodies or events without what no two answers share."""
    found = []
    for event in text.split("\n\n"):
        data = event.removeprefix("data: ")
        value = json.loads(data) if data.startswith("{") else data
        if isinstance(value, dict):
            value = {key: inner for key, inner in value.items() if key not in ("id", "created", "request_id")}
        found.append(value)
    return found


@pytest.mark.parametrize("steps_before_gate", [0, 2])
def test_closing_an_answer_hangs_up(chat: Chat, steps_before_gate: int) -> None:
    """Before its head and in the middle of its stream: a router that is told to stop must stop the engine."""

    async def scenario() -> None:
        engine = ScriptedEngine([chat.text_ids(text) for text in "abcd"])
        engine.steps_before_gate = steps_before_gate
        parts = answer(api_of(engine, chat), call_of(stream=True))
        reading = asyncio.ensure_future(all_of(parts))
        await asyncio.sleep(0.2)
        assert (engine.num_open, engine.num_cancelled) == (1, 0)
        reading.cancel()
        await asyncio.wait([reading])
        await parts.aclose()
        assert (engine.num_open, engine.num_cancelled) == (0, 1)

    asyncio.run(scenario())


def test_an_application_that_breaks_off_is_no_whole_answer() -> None:
    """Its end must not look like the end of the text."""

    async def api(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        raise ValueError("bang")

    with pytest.raises(RuntimeError, match="POST /v1/completions broke off"):
        asyncio.run(all_of(answer(api, call_of())))


@pytest.mark.parametrize(
    "body",
    ['{"model":"m","prompt":"x"}', ' {"model": "m", "prompt": "x", "seed": null} \n', '{"prompt":"}"}'],
)
def test_a_reply_that_may_be_drawn_twice_gets_a_seed(body: str) -> None:
    """So that a second try is the same draw."""
    raw = body.encode()
    sent = seeded(ROUTES[COMPLETION_URL], from_json(raw), raw)
    asked = from_json(sent)
    assert 0 <= asked.pop("seed") < 2**63
    expected = from_json(raw)
    expected.pop("seed", None)
    assert asked == expected
    if "model" in expected:
        assert parse(CompletionRequest, sent).seed is not None


def test_a_seed_that_is_given_stays_and_other_routes_get_none() -> None:
    given = b'{"model":"m","prompt":"x","seed":0}'
    assert seeded(ROUTES[COMPLETION_URL], from_json(given), given) == given
    assert seeded(None, {"prompt": "x"}, b'{"prompt":"x"}') == b'{"prompt":"x"}'
    tgi = b'{"inputs":"x","parameters":{"do_sample":true}}'
    assert from_json(seeded(ROUTES["/generate"], from_json(tgi), tgi))["parameters"].keys() == {
        "do_sample",
        "seed",
    }
    tgi = b'{"inputs":"x","parameters":{"seed":3}}'
    assert from_json(seeded(ROUTES["/"], from_json(tgi), tgi)) == from_json(tgi)


class Tries:
    """A handle of an engine whose tries go as told: an exception is raised in its turn, anything else comes."""

    def __init__(self, *tries: list[Any]) -> None:
        self.tries, self.num_cancelled = list(tries), 0

    def options(self, **_: Any) -> "Tries":
        return self

    def remote(self, call: Forwarded) -> "Tries":
        self.parts = iter(self.tries.pop(0))
        return self

    def __aiter__(self) -> "Tries":
        return self

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)
        for part in self.parts:
            if isinstance(part, Exception):
                raise part
            if part is None:
                await asyncio.sleep(60)
            return part
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.num_cancelled += 1


WHOLE, BEGUN = Head(200, [], b"{}", True), Head(200, [], b"data: 1\n\n", False)
FAILED = Head(503, [], b"{}", True)
DIED, FULL = ActorDiedError(), BackPressureError(5, 4)


def router_of(tries: Tries, monkeypatch: pytest.MonkeyPatch) -> Router:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.001)
    models = ResilientConfig(models=[EngineConfig(model_id="medusa", base="base")])
    return Router(models, {"medusa": tries})


@pytest.mark.parametrize(
    "failure", [DIED, ActorUnavailableError("gone", None), FAILED, RayTaskError("f", "", None)]
)
def test_what_has_not_begun_is_tried_again(monkeypatch: pytest.MonkeyPatch, failure: Any) -> None:
    """A replica that died, one out of reach, and one whose engine has failed but that nobody has replaced yet."""
    router = router_of(Tries([failure], [failure], [WHOLE]), monkeypatch)
    head, _ = asyncio.run(router._begin("medusa", call_of()))
    assert (head, router.num_retries) == (WHOLE, {"medusa": 2})


def test_tries_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    router = router_of(Tries(*[[DIED]] * MAX_TRIES), monkeypatch)
    with pytest.raises(ApiError, match=f"No replica of medusa answered in {MAX_TRIES} tries"):
        asyncio.run(router._begin("medusa", call_of()))
    router = router_of(Tries(*[[FAILED]] * MAX_TRIES), monkeypatch)
    assert asyncio.run(router._begin("medusa", call_of()))[0] == FAILED
    monkeypatch.setattr(module, "MAX_RETRYING_S", -1)
    with pytest.raises(ApiError, match="in 1 tries"):
        asyncio.run(router_of(Tries([DIED]), monkeypatch)._begin("medusa", call_of()))


def test_full_replicas_are_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ApiError, match="All replicas of medusa are full") as told:
        asyncio.run(router_of(Tries([FULL]), monkeypatch)._begin("medusa", call_of()))
    assert told.value.status == 429
    refused = Head(429, [(b"retry-after", b"1")], b"{}", True)
    assert asyncio.run(router_of(Tries([refused]), monkeypatch)._begin("medusa", call_of()))[0] == refused


@pytest.mark.parametrize("path", [COMPLETION_URL, "/generate_stream"])
def test_a_stream_that_breaks_ends_with_an_error_and_looks_whole_to_nobody(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    router = router_of(Tries([BEGUN, b"data: 2\n\n", DIED]), monkeypatch)
    response = TestClient(router.__serve_build_asgi_app__()).post(
        path, json={"model": "medusa", "inputs": "x"}
    )
    *events, rest = response.text.split("\n\n")
    assert events[:2] == ["data: 1", "data: 2"]
    error = json.loads(events[2].removeprefix("data: "))["error"]
    assert "was lost; ask again" in (error if path == "/generate_stream" else error["message"])
    assert (len(events), rest, "[DONE]" in response.text) == (3, "", False)
    assert router.num_broken == {"medusa": 1}


def test_a_client_that_does_not_wait_takes_its_call_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> int:
        tries = Tries([None])
        waiting = asyncio.ensure_future(router_of(tries, monkeypatch)._begin("medusa", call_of()))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.wait([waiting])
        return tries.num_cancelled

    assert asyncio.run(scenario()) == 1


def test_the_router_asks_for_a_key_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own routes are in front of those that the engines guard."""
    monkeypatch.setenv("KEYS_OF_ROUTER", "one, two")
    args = ResilientConfig(
        models=[EngineConfig(model_id="medusa", base="base", api_key_env="KEYS_OF_ROUTER")]
    )
    client = TestClient(Router(args, {"medusa": Tries()}).__serve_build_asgi_app__())
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer two"}).status_code == 200


# ------------------------------------------------------------------------------------------- serve files


def file_of(models: list[dict[str, Any]], deployments: list[dict[str, Any]] = [], **app: Any) -> ServeConfig:  # noqa: B006
    path = {"import_path": "medusa_ray.serve:build_resilient_app"}
    app = {"name": "both", **path, "args": {"models": models}, "deployments": deployments, **app}
    return config.parse(ServeConfig, {"applications": [app]}, "x.yaml")


def test_a_file_that_mixes_the_shapes_or_the_names_is_refused() -> None:
    one, other = {"model_id": "a", "base": "b"}, {"model_id": "c", "base": "b", "aliases": ["a"]}
    with pytest.raises(UserError, match="the name 'a' stands for two things"):
        file_of([one, other])
    with pytest.raises(UserError, match="the name 'Router'"):
        file_of([{"model_id": "Router", "base": "b"}])
    with pytest.raises(UserError, match=r"build_app and args with `models`"):
        file_of([one], import_path="medusa_ray.serve:build_app")
    with pytest.raises(
        UserError, match=r"applications\.0\.args\.models\.0\.modl_id is not a key; .*model_id"
    ):
        file_of([{**one, "modl_id": "x"}])
    with pytest.raises(UserError, match=r"applications\.0\.args\.bse is not a key; did you mean .*base"):
        file_of([], import_path="medusa_ray.serve:build_app", args={**one, "bse": 1})
    with pytest.raises(UserError, match=r"'Engine'; it has Router and a"):
        file_of([one], [{"name": "Engine"}])
    application(file_of([one], [{"name": "Router", "num_replicas": 2}, {"name": "a"}]).applications[0])


# ------------------------------------------------------------------------------------------------ with Ray


@pytest.fixture(scope="module")
def url(ray_cluster: None, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One URL with two replicas of medusa and one of the baseline, which sleeps when nobody asks for it."""
    heads = tmp_path_factory.mktemp("heads")
    MedusaHeads(num_heads=3, num_layers=1, hidden_size=32, vocab_size=262).save(heads, str(tiny_base))
    engine = {
        "base": str(tiny_base),
        "compile": "no",
        "dtype": "float32",
        "device": "cpu",
        "max_batch_size": 4,
        "max_total_tokens": 512,
        "threads": 1,
    }
    scaling = {
        "min_replicas": 0,
        "initial_replicas": 1,
        "max_replicas": 1,
        "upscale_delay_s": 0,
        "downscale_delay_s": 2,
        "look_back_period_s": 1,
        "metrics_interval_s": 0.5,
        "policy": {"policy_function": "medusa_ray.serve.scaling:ByWaitingTokens"},
    }
    file = file_of(
        [
            {**engine, "model_id": "medusa", "heads": str(heads), "aliases": ["tgi"]},
            {**engine, "model_id": "baseline"},
        ],
        [
            {"name": "Router", "ray_actor_options": {"num_cpus": 0.5}},
            {"name": "medusa", "num_replicas": 2},
            {"name": "baseline", "autoscaling_config": scaling},
        ],
    )
    file = file.model_copy(update={"http_options": config.HttpOptions(port=serve.free_port())})
    yield serve.deploy(file)["both"]
    serve.shutdown()
    ray.serve.shutdown()


def num_running(deployment: str) -> int:
    states = ray.serve.status().applications["both"].deployments[deployment].replica_states
    return sum(n for state, n in states.items() if state == "RUNNING")


@pytest.mark.ray
def test_two_models_behind_one_url_say_the_same(url: str) -> None:
    """And a model that sleeps is woken by the first request, which waits for it rather than fail; facts wake nobody."""

    async def scenario() -> None:
        await until(lambda: num_running("baseline") == 0, 60)
        facts = {
            path: httpx.get(f"{url}{path}", timeout=60)
            for path in ("/health", "/v1/models", "/info", "/metrics")
        }
        assert {path: response.status_code for path, response in facts.items()} == dict.fromkeys(facts, 200)
        assert [m["id"] for m in facts["/v1/models"].json()["data"]] == ["medusa", "tgi", "baseline"]
        info = facts["/info"].json()
        assert (info["model_id"], info["num_heads"]) == ("medusa", 3)
        assert {m: told["num_replicas"] for m, told in info["models"].items()} == {"medusa": 2, "baseline": 0}
        running = [
            line
            for line in facts["/metrics"].text.splitlines()
            if line.startswith("medusa_ray_num_requests_run")
        ]
        assert len(running) == len(set(running)) == 2  # one of each replica, told apart
        assert num_running("baseline") == 0

        texts = {model: await texts_of(url, model, 20) for model in ("medusa", "baseline", "tgi")}
        assert texts["medusa"] == texts["baseline"] == texts["tgi"]
        async with httpx.AsyncClient(timeout=60) as client:
            for model, text in texts["medusa"].items():
                streamed = await ask(client, url, body_of("baseline", model, 20, stream=True))
                assert (streamed.text, streamed.finish_reason, streamed.is_done) == (text, "length", True)

    asyncio.run(scenario())


@pytest.mark.ray
def test_what_is_wrong_with_a_request_is_said_as_in_the_fast_shape(url: str) -> None:
    for body, status, told in (
        ({**ASKED, "model": "nobody"}, 404, "served: medusa, tgi, baseline"),
        ({**ASKED, "temperature": -1}, 400, "temperature is -1"),
        ({"prompt": "x"}, 400, "model is missing"),
        ({**ASKED, "model": 3}, 400, "model is 3"),
        ([], 400, "The body is []"),
    ):
        response = httpx.post(f"{url}{COMPLETION_URL}", json=body)
        assert (response.status_code, told in response.json()["error"]["message"]) == (status, True), (
            response.text
        )
    assert (
        "The body is not JSON"
        in httpx.post(f"{url}{COMPLETION_URL}", content=b"{").json()["error"]["message"]
    )
    assert httpx.get(f"{url}{COMPLETION_URL}").status_code == 405
    assert httpx.post(f"{url}/v1/models").status_code == 405
    assert httpx.get(f"{url}/v1/nothing").status_code == 404


@pytest.mark.ray
def test_a_client_of_the_router_that_hangs_up_leaves_nothing_running(url: str) -> None:
    def num_open() -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("medusa_ray_num_requests_"))

    endless = body_of("medusa", "x", 480, stream=True)
    for _ in range(4):
        with httpx.stream("POST", f"{url}{COMPLETION_URL}", json=endless, timeout=60) as response:
            next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}{COMPLETION_URL}", json={**endless, "stream": False}, timeout=0.05)
    began_s = time.monotonic()
    while num_open():
        assert time.monotonic() - began_s < 30
        time.sleep(0.05)


@pytest.mark.ray
def test_what_had_not_begun_outlives_its_replica(url: str) -> None:
    """And what had begun ends with an error, and does not look whole."""

    async def scenario() -> dict[str, int]:
        texts = await texts_of(url, "medusa", 200)
        async with load_on(url, "medusa", 8, 200) as load:
            await asyncio.sleep(2)
            replicas_of("medusa")[0].kill()
            await asyncio.sleep(4)
        assert all(outcome.text == texts[outcome.prompt] for outcome in load.outcomes if outcome.looks_whole)
        assert all(texts[outcome.prompt].startswith(outcome.text) for outcome in load.outcomes)
        return load.counts()

    counts = asyncio.run(scenario())
    assert counts.keys() <= {"stream answered", "whole answered", "stream broken with an error event"}, counts
    assert counts["whole answered"] > len(PROMPTS) / 8
