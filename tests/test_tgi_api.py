"""TGI's protocol: its own clients against a server that listens, and its requests against a scripted engine."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fakes import ScriptedEngine
from fastapi.testclient import TestClient
from huggingface_hub import InferenceClient, constants
from huggingface_hub.errors import OverloadedError, TextGenerationError, ValidationError

from medusa_ray.chat import Chat
from medusa_ray.config import EngineConfig
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.serve import Server, build_api, free_port

PROMPT = "SELECT name FROM"


@pytest.fixture(scope="module")
def chat(tiny_base: Path) -> Chat:
    return Chat.load(str(tiny_base))


@pytest.fixture(autouse=True)
def _loopback_is_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)


@pytest.fixture(scope="module")
def url(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a Medusa server on loopback, its tree three guesses deep."""
    heads = tmp_path_factory.mktemp("heads")
    MedusaHeads(num_heads=3, num_layers=1, hidden_size=32, vocab_size=262).save(heads, str(tiny_base))
    args = EngineConfig(
        model_id="sql", aliases=["tgi"], base=str(tiny_base), heads=str(heads), tree="chain", dtype="float32",
        compile="no", device="cpu", max_total_tokens=512,
    )  # fmt: skip
    port = free_port()
    running = uvicorn.Server(uvicorn.Config(build_api(Server.load(args)), port=port, log_level="warning"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join()


def completion(url: str, **fields: Any) -> str:
    asked = {"model": "sql", "prompt": PROMPT, "max_tokens": 40, "temperature": 0, **fields}
    return str(httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()["choices"][0]["text"])


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]


def client_of(engine: ScriptedEngine, chat: Chat, **args: Any) -> TestClient:
    return TestClient(build_api(Server(engine, chat, EngineConfig(model_id="sql", base="base", **args))))


# ------------------------------------------------------------------------------------------- their clients


def test_hugging_faces_client_gets_the_text_of_v1_completions(url: str) -> None:
    client = InferenceClient(model=url, timeout=60)
    text = completion(url)
    assert client.text_generation(PROMPT, max_new_tokens=40) == text
    assert client.text_generation(PROMPT, max_new_tokens=40, return_full_text=True) == PROMPT + text
    whole = client.text_generation(PROMPT, max_new_tokens=40, details=True, top_n_tokens=2)
    assert whole.generated_text == text
    details = whole.details
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 40, None)
    assert (details.prefill, len(details.tokens), len(details.top_tokens)) == ([], 40, 40)
    assert "".join(token.text for token in details.tokens if not token.special) == text
    for token, top in zip(details.tokens, details.top_tokens, strict=True):
        assert token.id == top[0]["id"]  # a greedy reply
        assert token.logprob == pytest.approx(top[0]["logprob"], abs=1e-6)
        assert top[0]["logprob"] >= top[1]["logprob"]


def test_a_stream_has_an_event_for_each_token_and_the_text_in_the_last(url: str) -> None:
    """An event of several tokens would have TGI's clients count steps for tokens."""
    client = InferenceClient(model=url, timeout=60)
    text = completion(url)
    events = list(client.text_generation(PROMPT, max_new_tokens=40, stream=True, details=True))
    assert [event.index for event in events] == list(range(1, 41))
    assert "".join(event.token.text for event in events if not event.token.special) == text
    texts = list(client.text_generation(PROMPT, max_new_tokens=40, stream=True))
    assert texts == [event.token.text for event in events]
    assert [event.generated_text for event in events[:-1]] == [None] * 39
    last = events[-1]
    assert last.generated_text == text
    assert (last.details.finish_reason, last.details.generated_tokens) == ("length", 40)
    assert last.details.input_length == len(PROMPT)  # a byte a token
    whole = client.text_generation(PROMPT, max_new_tokens=40, details=True)
    assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]


def test_a_sampled_reply_tells_the_seed_that_brings_it_back(url: str) -> None:
    client = InferenceClient(model=url, timeout=60)
    first = client.text_generation(PROMPT, max_new_tokens=20, do_sample=True, details=True)
    again = client.text_generation(PROMPT, max_new_tokens=20, temperature=1.0, seed=first.details.seed)
    assert again == first.generated_text
    others = {client.text_generation(PROMPT, max_new_tokens=20, top_k=50) for _ in range(4)}
    assert len(others) > 1
    asked = {"inputs": PROMPT, "parameters": {"seed": 2**64 - 1, "do_sample": True, "details": True}}
    assert httpx.post(f"{url}/generate", json=asked, timeout=60).json()["details"]["seed"] == 2**64 - 1


def test_hugging_faces_client_chats(url: str) -> None:
    client = InferenceClient(base_url=f"{url}/v1", timeout=60)
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 20,
        "temperature": 0.0,
    }
    text = client.chat_completion(**asked, model="tgi").choices[0].message.content
    chunks = list(client.chat_completion(**asked, model="tgi", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_the_request_of_the_blog_post_is_answered(url: str) -> None:
    body = """{
  "model": "tgi",
  "messages": [{"role": "user", "content": "Write a poem for my three year old"}],
  "stream": false,
  "max_tokens": 250
}"""
    answer = httpx.post(
        f"{url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}, timeout=60
    ).json()
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] <= 250


def test_the_oldest_route_lists_a_whole_reply_and_streams_one_when_asked(url: str) -> None:
    asked = {"inputs": PROMPT, "parameters": {"max_new_tokens": 40}}
    text = completion(url)
    assert httpx.post(f"{url}/", json=asked, timeout=60).json() == [{"generated_text": text}]
    assert httpx.post(f"{url}/generate", json={**asked, "stream": True}, timeout=60).json() == {
        "generated_text": text
    }
    for path in ("/", "/generate_stream"):
        response = httpx.post(f"{url}{path}", json={**asked, "stream": True}, timeout=60)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert events_of(response.text)[-1]["generated_text"] == text


def test_a_client_is_told_in_its_own_words(url: str) -> None:
    client = InferenceClient(model=url)
    with pytest.raises(ValidationError, match=r"parameters\.top_p"):
        client.text_generation("x", top_p=1.5)
    with pytest.raises(ValidationError, match=r"at most 4 \(max_stop_sequences\)"):
        client.text_generation("x", stop=list("abcde"), stream=True)


# ------------------------------------------------------------------------------------------- their requests


def test_without_a_length_a_reply_may_have_a_hundred_tokens_or_what_fits(chat: Chat) -> None:
    engine = ScriptedEngine([chat.text_ids("a")])
    client = client_of(engine, chat)
    for prompt in ("x", "x" * 500):
        assert client.post("/generate", json={"inputs": prompt}).status_code == 200
    assert [request.max_new_tokens for request in engine.requests] == [100, 12]


def test_the_engine_gets_what_was_asked_for_and_is_greedy_unless_asked(chat: Chat) -> None:
    engine = ScriptedEngine([chat.text_ids("a")])
    client = client_of(engine, chat)
    fields = {
        "top_k": 7,
        "top_p": 0.5,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "temperature": 0.7,
    }
    for parameters in (
        None,
        {**fields, "seed": 3, "truncate": 2, "max_new_tokens": 9},
        {"top_p": 0.9},
        {"seed": 1},
    ):
        client.post("/generate", json={"inputs": "abc", "parameters": parameters})
    plain, full, sampled, seeded = engine.requests
    assert (plain.temperature, plain.top_k, plain.top_p, plain.logprobs) == (0, 0, 1, None)
    assert {name: getattr(full, name) for name in fields} == fields
    assert (full.seed, full.max_new_tokens, full.prompt_ids) == (3, 9, chat.text_ids("bc"))
    assert (sampled.temperature, sampled.top_p) == (1.0, 0.9)
    assert (seeded.temperature, seeded.seed) == (0, None)


def test_a_grammar_holds_a_reply_to_it(url: str) -> None:
    client = InferenceClient(model=url, timeout=60)
    asked: dict[str, Any] = {"max_new_tokens": 60}
    assert client.text_generation(PROMPT, grammar={"type": "regex", "value": "(yes|no)"}, **asked) in (
        "yes",
        "no",
    )
    schema = {
        "type": "object",
        "properties": {"n": {"type": "boolean"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    for value in (schema, json.dumps(schema)):
        whole = client.text_generation(
            PROMPT, grammar={"type": "json", "value": value}, details=True, **asked
        )
        assert isinstance(json.loads(whole.generated_text)["n"], bool)
        assert whole.details.finish_reason == "eos_token"
    stream = client.text_generation(
        PROMPT, grammar={"type": "json", "value": schema}, stream=True, details=True, **asked
    )
    assert list(stream)[-1].generated_text == whole.generated_text
    for grammar in (
        {"type": "json", "value": "{"},
        {"type": "regex", "value": "("},
        {"type": "regex", "value": 7},
    ):
        with pytest.raises(ValidationError, match=r"parameters\.grammar cannot be followed"):
            client.text_generation(PROMPT, grammar=grammar, **asked)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_ends_the_text_and_is_its_end(chat: Chat, stream: bool) -> None:
    """TGI's clients cut it off themselves; one that does not find it takes the reply for cut short."""
    engine = ScriptedEngine([chat.text_ids("h"), chat.text_ids("ello EN"), chat.text_ids("D of it")])
    asked = {"inputs": "x", "parameters": {"stop": ["zz", "END"], "details": True}}
    response = client_of(engine, chat).post("/generate_stream" if stream else "/generate", json=asked)
    if stream:
        events = events_of(response.text)
        tokens, last = [event["token"] for event in events], events[-1]
    else:
        last = response.json()
        tokens = last["details"]["tokens"]
    assert last["generated_text"] == "hello END"
    assert "".join(token["text"] for token in tokens) == "hello END"
    assert (last["details"]["finish_reason"], last["details"]["generated_tokens"]) == ("stop_sequence", 9)


def test_a_token_that_ends_the_sequence_is_special_and_in_no_text(chat: Chat) -> None:
    end = min(chat.eos_ids)
    engine = ScriptedEngine([chat.text_ids("h"), [*chat.text_ids("é"), end]])
    events = events_of(client_of(engine, chat).post("/generate_stream", json={"inputs": "x"}).text)
    assert [(event["token"]["text"], event["token"]["special"]) for event in events] == [
        ("h", False),
        ("", False),  # the first of two bytes
        ("é", False),
        ("<|end|>", True),
    ]
    assert events[-1]["generated_text"] == "hé"
    asked = {"inputs": "x", "parameters": {"details": True, "stop": ["zz"]}}
    details = client_of(engine, chat).post("/generate", json=asked).json()["details"]
    assert details["finish_reason"] == "eos_token"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not JSON"),
        (b"{}", "inputs is missing"),
        (b'{"inputs": ""}', "inputs is empty"),
        (b'{"inputs": 5}', "inputs is 5"),
        (b'{"inputs": "x", "parameter": {}}', "parameter is {}"),
        *(
            (
                json.dumps({"inputs": "x", "parameters": {name: value}}).encode(),
                f"parameters.{name} is {value!r}",
            )
            for name, value in {
                "temperature": -1,
                "top_k": 0,
                "top_p": 0,
                "typical_p": 0.5,
                "watermark": True,
                "best_of": 2,
                "decoder_input_details": True,
                "max_new_tokens": 0,
                "repetition_penalty": 0,
                "frequency_penalty": 3,
                "truncate": 0,
                "seed": 2**64,
                "stop": "x",
                "adapter_id": "mine",
                "top_n_tokens": 21,
                "unheard_of": 1,
            }.items()
        ),
        (json.dumps({"inputs": "x" * 600}).encode(), "600 tokens, but at most 511 (max_input_tokens)"),
        (
            b'{"inputs": "xx", "parameters": {"max_new_tokens": 511}}',
            "parameters.max_new_tokens is 511, together 513",
        ),
    ],
)
def test_a_wrong_request_is_422_and_names_field_value_and_limit(chat: Chat, body: bytes, says: str) -> None:
    client = client_of(ScriptedEngine([chat.text_ids("a")]), chat)
    for path in ("/", "/generate", "/generate_stream"):
        response = client.post(path, content=body)
        assert response.status_code == 422
        assert response.json()["error_type"] == "validation"
        assert says in response.json()["error"]
        assert client.post("/generate", json={"inputs": "x"}).json() == {"generated_text": "a"}


def test_overload_and_a_failed_engine_have_tgis_statuses(chat: Chat) -> None:
    engine = ScriptedEngine([chat.text_ids("a")])
    client = client_of(engine, chat)
    engine.max_open = 0
    full = client.post("/generate", json={"inputs": "x"})
    assert (full.status_code, full.json()["error_type"], full.headers["retry-after"]) == (
        429,
        "overloaded",
        "1",
    )
    engine.max_open, engine.failure = 1, RuntimeError("bang")
    failed = client.post("/generate_stream", json={"inputs": "x"})
    assert (failed.status_code, failed.json()["error_type"]) == (424, "generation")
    assert "bang" in failed.json()["error"]
    assert issubclass(OverloadedError, TextGenerationError)
