"""What stands before every route: ids, keys, the access log, limits, health, metrics and the OpenAPI document."""

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedEngine
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import Route

from medusa_ray import config
from medusa_ray.chat import Chat
from medusa_ray.config import EngineConfig, UserError
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.serve import Server, build_api, server
from medusa_ray.serve.calls import Histogram
from medusa_ray.serve.http import ROUTES

CHAT: dict[str, Any] = {"model": "medusa", "messages": [{"role": "user", "content": "a secret"}]}
CHAT_URL = "/v1/chat/completions"


@pytest.fixture(scope="module")
def chat(tiny_base: Path) -> Chat:
    return Chat.load(str(tiny_base))


def engine_of(chat: Chat, *texts: str) -> ScriptedEngine:
    return ScriptedEngine([chat.text_ids(text) for text in texts or ("a", "bcd")])


def client_of(engine: ScriptedEngine, chat: Chat, **args: Any) -> TestClient:
    server = Server(engine, chat, EngineConfig(model_id="medusa", base="base", **args))
    return TestClient(build_api(server), raise_server_exceptions=False)


class Broken(ScriptedEngine):
    """Fails as no engine should, at the first step or after it."""

    num_steps = 0

    async def stream(self, request: Any) -> AsyncIterator[Any]:
        async for delta in super().stream(request):
            if self.num_steps == 0:
                raise KeyError("/etc/secret/path")
            self.num_steps -= 1
            yield delta


def lines_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(record.message) for record in caplog.records if record.name == "medusa_ray.access"]


# ------------------------------------------------------------------------------------------------------ ids


def test_every_response_has_an_id_the_clients_own_where_it_is_fit(chat: Chat) -> None:
    client = client_of(engine_of(chat), chat)
    for own, is_kept in (
        ("abc-123", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a\tb", False),
        ("", False),
    ):
        for response in (
            client.get("/health", headers={"x-request-id": own}),
            client.get("/nothing", headers={"x-request-id": own}),
            client.post(CHAT_URL, json=CHAT, headers={"x-request-id": own}),
            client.post(CHAT_URL, json={**CHAT, "stream": True}, headers={"x-request-id": own}),
        ):
            ids = response.headers.get_list("x-request-id")
            assert (ids == [own]) is is_kept
            assert len(ids) == 1
    error = client.post(CHAT_URL, content=b"{", headers={"x-request-id": "mine"}).json()
    assert error["request_id"] == "mine"
    assert (
        client.post("/generate", content=b"{", headers={"x-request-id": "mine"}).json()["request_id"]
        == "mine"
    )


def test_a_mistake_of_ours_is_a_500_that_tells_an_id_and_nothing_else(
    chat: Chat, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Broken([chat.text_ids("a"), chat.text_ids("b")])
    client = client_of(engine, chat)
    for stream in (False, True):
        response = client.post(CHAT_URL, json={**CHAT, "stream": stream}, headers={"x-request-id": "mine"})
        assert response.status_code == 500
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert "mine" in response.json()["error"]["message"]
        assert "secret" not in response.text
    assert caplog.text.count("KeyError: '/etc/secret/path'") == 2
    assert "request mine to /v1/chat/completions failed" in caplog.text
    for url, body in ((CHAT_URL, {**CHAT, "stream": True}), ("/generate_stream", {"inputs": "x"})):
        engine.num_steps = 1
        text = client.post(url, json=body).text
        assert "its log has the reason" in text  # rather than a cut that looks like an end
        assert "secret" not in text
    assert (
        'medusa_ray_request_failure_total{err="internal",model_name="medusa"} 4.0'
        in client.get("/metrics").text
    )


# ----------------------------------------------------------------------------------------------------- keys


def test_all_routes_but_health_ask_for_the_key(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """A route added later must not be left open."""
    monkeypatch.setenv("OUR_KEYS", "first-key, second-key")
    client = client_of(engine_of(chat), chat, api_key_env="OUR_KEYS")
    paths = {route.path for route in client.app.routes if isinstance(route, Route)}
    assert {*ROUTES, "/v1/models", "/info", "/metrics", "/openapi.json", "/health", "/ping"} <= paths
    for path in paths:
        is_open = path in ("/health", "/ping")
        for key in (
            None,
            "Bearer wrong",
            "Bearer",
            "Bearer first-key, second-key",
            "first-key",
            "Basic first-key",
        ):
            for method in ("GET", "POST"):
                response = client.request(method, path, headers={"authorization": key} if key else {})
                assert (response.status_code == 401) is not is_open, (path, key)
                if not is_open:
                    assert response.json()["error"]["message"].startswith("The API key is missing or wrong")
        for key in ("Bearer first-key", "bearer second-key"):
            assert client.get(path, headers={"authorization": key}).status_code in (200, 405)


def test_a_variable_without_a_key_stops_the_start(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUR_KEYS", raising=False)
    for value in (None, "", " , "):
        if value is not None:
            monkeypatch.setenv("OUR_KEYS", value)
        with pytest.raises(ValueError, match="OUR_KEYS, which is not set or holds no key"):
            Server.load(EngineConfig(model_id="m", base=str(tiny_base), api_key_env="OUR_KEYS"))


def test_web_pages_may_call_only_where_the_file_says_so(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = {"origin": "https://page.example"}
    asks = {
        **origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    closed = client_of(engine_of(chat), chat)
    assert "access-control-allow-origin" not in closed.post(CHAT_URL, json=CHAT, headers=origin).headers
    assert closed.options(CHAT_URL, headers=asks).status_code == 405
    monkeypatch.setenv("OUR_KEYS", "key")
    opened = client_of(engine_of(chat), chat, cors_origins=["https://page.example"], api_key_env="OUR_KEYS")
    assert (
        opened.options(CHAT_URL, headers=asks).headers["access-control-allow-origin"]
        == "https://page.example"
    )
    assert opened.post(CHAT_URL, json=CHAT, headers=origin).status_code == 401
    other = {**asks, "origin": "https://other.example"}
    assert "access-control-allow-origin" not in opened.options(CHAT_URL, headers=other).headers


# ------------------------------------------------------------------------------------------------- the log


def test_a_request_is_a_line_of_json_without_what_was_said(
    chat: Chat, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "medusa_ray.access")
    client = client_of(engine_of(chat), chat)
    client.post(CHAT_URL, json=CHAT, headers={"x-request-id": "one"})
    client.post("/generate_stream", json={"inputs": "a secret"}, headers={"x-request-id": "two"})
    client.post(CHAT_URL, json={**CHAT, "temperature": "a secret"}, headers={"x-request-id": "three"})
    client.get("/health")
    client.get("/metrics")
    client.get("/info2")
    lines = lines_of(caplog)
    assert [(line["id"], line["route"], line["status"]) for line in lines[:3]] == [
        ("one", CHAT_URL, 200),
        ("two", "/generate_stream", 200),
        ("three", CHAT_URL, 400),
    ]
    assert [line["route"] for line in lines[3:]] == ["/info2"]
    for line in lines[:2]:
        assert (line["model"], line["completion_tokens"], line["steps"]) == ("medusa", 4, 1)
        assert line["finish_reason"] == "stop"
        assert 0 < line["ttft_s"] <= line["total_s"]
    assert "secret" not in caplog.text
    caplog.clear()
    client_of(engine_of(chat), chat, log_prompts=True).post(CHAT_URL, json=CHAT)
    assert [(line["prompt"], line["reply"]) for line in lines_of(caplog)] == [
        ([{"role": "user", "content": "a secret"}], "abcd")
    ]


# -------------------------------------------------------------------------------------------------- limits


def test_limits_are_the_files_own_and_are_told_by_name(chat: Chat) -> None:
    limits = {"max_input_tokens": 20, "max_stop_sequences": 1, "payload_limit": 300}
    limits |= {"max_batch_size": 4, "max_concurrent_requests": 6}
    client = client_of(engine_of(chat), chat, **limits)
    for url, body, says in (
        ("/v1/completions", {"model": "medusa", "prompt": "x" * 21}, "prompt has 21 tokens, but at most 20"),
        ("/generate", {"inputs": "x" * 21}, "inputs has 21 tokens, but at most 20 (max_input_tokens)"),
        ("/v1/completions", {"model": "medusa", "prompt": "x", "stop": ["a", "b"]}, "stop has 2 strings"),
        ("/generate", {"inputs": "x", "parameters": {"stop": ["a", "b"]}}, "parameters.stop has 2 strings"),
        ("/v1/completions", {"model": "medusa", "prompt": ["x"] * 5}, "at most 4 (max_client_batch_size)"),
        ("/v1/completions", {"model": "medusa", "prompt": ["x"] * 4, "n": 2}, "no more than 6 (max_concurrent"),
        ("/v1/completions", {"model": "medusa", "prompt": "x" * 300}, "more than 300 bytes (payload_limit)"),
        ("/generate", {"inputs": "x" * 300}, "more than 300 bytes (payload_limit)"),
    ):
        response = client.post(url, json=body)
        assert response.status_code in (400, 413, 422)
        assert says in response.text
    asked = {"inputs": "x" * 60, "parameters": {"truncate": 20}}
    assert client.post("/generate", json=asked).status_code == 200


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"max_batch_size": 9, "max_concurrent_requests": 8}, "max_concurrent_requests is 8, fewer than"),
        ({"max_total_tokens": 9, "max_input_tokens": 9}, "max_input_tokens is 9, but max_total_tokens"),
        ({"max_queued_requests": 9}, "max_queued_requests is not a key"),
    ],
)
def test_limits_that_do_not_fit_together_are_refused(args: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        config.parse(EngineConfig, {"model_id": "m", "base": "b", **args}, "x.yaml")


# -------------------------------------------------------------------------------------------------- health


def test_health_is_a_step_of_its_own_unless_others_have_come_to_an_end(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that hangs raises nothing: it only never answers."""
    monkeypatch.setattr(server, "HEALTH_TIMEOUT_S", 0.3)

    class Hanging(ScriptedEngine):
        last_step_s = -math.inf

        async def stream(self, request: Any) -> AsyncIterator[Any]:
            self.requests.append(request)
            await self.gate.wait()
            self.last_step_s = time.monotonic()
            return
            yield

    async def scenario() -> None:
        engine = Hanging([])
        served = Server(engine, chat, EngineConfig(model_id="m", base="b"))
        with pytest.raises(RuntimeError, match=r"not come to the end of a step for"):
            await served.check_health()
        with pytest.raises(RuntimeError, match=r"not come to the end of a step for"):
            await asyncio.gather(*(served.check_health() for _ in range(5)))
        assert len(engine.requests) == 1  # whoever asks, and however often
        engine.last_step_s = time.monotonic() - 0.9  # of another request
        await served.check_health()
        engine.last_step_s = -math.inf
        engine.gate.set()
        await served.check_health()
        assert (engine.requests[0].prompt_ids, engine.requests[0].max_new_tokens) == ([0], 1)

    asyncio.run(scenario())


def test_a_server_is_warm_before_it_serves_and_health_steps_for_real(tiny_base: Path, tmp_path: Path) -> None:
    MedusaHeads(num_heads=3, num_layers=1, hidden_size=32, vocab_size=262).save(tmp_path, str(tiny_base))
    args = EngineConfig(
        model_id="m", base=str(tiny_base), heads=str(tmp_path), dtype="float32", compile="no", device="cpu",
        max_total_tokens=64,
    )  # fmt: skip
    served = Server.load(args)
    assert served.engine.counters.num_generated_tokens == 0  # nothing of the warm-up is counted
    assert served.engine.is_adaptive
    assert served.engine.scheduler.num_open == 0
    client = TestClient(build_api(served))
    assert client.get("/health").json() == {"status": "ok"}
    assert served.engine.counters.num_generated_tokens == 1
    assert client.get("/ping").status_code == 200
    assert served.engine.counters.num_generated_tokens == 1  # the step before is proof enough
    info = client.get("/info").json()
    assert (info["model_id"], info["model_dtype"], info["model_device_type"]) == ("m", "torch.float32", "cpu")
    assert info["step_times"]["1"]["4"] > 0  # of one row with all three guesses: what a report predicts speedups from
    assert (info["max_input_tokens"], info["max_total_tokens"], info["max_concurrent_requests"]) == (
        63,
        64,
        128,
    )
    assert len(info["heads_version"]) == 12
    assert f'version="{info["heads_version"]}"' in client.get("/metrics").text
    served.engine.failure = RuntimeError("bang")
    assert client.get("/health").status_code == 503


# ------------------------------------------------------------------------------------------------- metrics


def test_metrics_have_both_servers_names_and_add_up(chat: Chat) -> None:
    client = client_of(engine_of(chat, "a", "bcd", "e"), chat)
    for _ in range(3):
        client.post(CHAT_URL, json=CHAT)
    client.post("/generate", json={"inputs": "x"})
    client.post(CHAT_URL, json={})
    values = {
        (
            sample.name.removeprefix("medusa_ray_"),
            *(v for k, v in sample.labels.items() if k != "model_name"),
        ): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }
    assert (values["request_count_total",], values["request_failure_total", "validation"]) == (5, 1)
    assert values["request_success_total", "stop"] == 4
    for theirs, tgis in (
        ("e2e_request_latency_seconds", "request_duration"),
        ("request_queue_time_seconds", "request_queue_duration"),
        ("request_inference_time_seconds", "request_inference_duration"),
        ("request_time_per_output_token_seconds", "request_mean_time_per_token_duration"),
        ("request_prompt_tokens", "request_input_length"),
        ("request_generation_tokens", "request_generated_tokens"),
        ("request_params_max_tokens", "request_max_new_tokens"),
    ):
        for name in (theirs, tgis):
            assert values[f"{name}_count",] == values[f"{name}_bucket", "+Inf"] == 4
            assert values[f"{name}_sum",] == values[f"{theirs}_sum",]
    assert values["request_generated_tokens_sum",] == 4 * 5
    assert values["request_generated_tokens_bucket", "4.0"] == 0
    assert values["request_generated_tokens_bucket", "8.0"] == 4
    assert values["inter_token_latency_seconds_count",] == 4 * 4
    assert values["time_to_first_token_seconds_count",] == 4
    assert (values["request_skipped_tokens_sum",], values["request_skipped_tokens_count",]) == (8, 12)
    assert values["tree_nodes",] == values["tree_nodes_max",] == 8
    for name in ("num_requests_running", "batch_current_size", "num_requests_waiting", "queue_size"):
        assert values[name,] == 0


def test_a_value_that_counts_for_several_tokens_counts_so_in_sum_and_bucket() -> None:
    histogram = Histogram((0.1, 0.5, 1.0))
    histogram.add(0.5, 3)  # a bound is in its own bucket
    histogram.add(2.0)
    assert (histogram.counts, histogram.sum) == ([0, 3, 0, 1], 3.5)


def test_the_openapi_document_has_the_requests_of_all_routes(chat: Chat) -> None:
    document = client_of(engine_of(chat), chat).get("/openapi.json").json()
    assert set(ROUTES) <= set(document["paths"])
    for path in ROUTES:
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        name = body["$ref"].removeprefix("#/components/schemas/")
        assert document["components"]["schemas"][name]["properties"]
    refs = [part.split('"')[0] for part in json.dumps(document).split('"$ref": "#/components/schemas/')[1:]]
    assert set(refs) <= set(document["components"]["schemas"])
