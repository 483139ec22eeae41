"""What clients rely on, of Medusa and baseline alike: the same requests, the same shapes and the same greedy text.

Two servers of the tiny model by default; CONTRACT_URLS, with commas between, names servers that run already.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from live_server import Answer, Connection, Live, ask, live_server, request_bytes

from medusa_ray.medusa.heads import MedusaHeads

CHAT_URL, COMPLETION_URL = "/v1/chat/completions", "/v1/completions"
PROMPTS = ("SELECT name FROM", "héllo wörld", "a", "How many rows has table 7? " * 3)
NUM_TOKENS = 24


@dataclass(frozen=True)
class Target:
    """A server, and what it calls its model."""

    live: Live
    model: str

    def chat(self, prompt: str, **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {
            "model": self.model,
            "messages": messages,
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            **fields,
        }

    def completion(self, prompt: str, **fields: Any) -> dict[str, Any]:
        return {"model": self.model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, **fields}

    def ask(self, method: str, path: str, fields: Any = None) -> Answer:
        return asyncio.run(ask(self.live, method, path, fields))


@pytest.fixture(scope="module")
def targets(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Target]]:
    folder = tmp_path_factory.mktemp("contract")
    with ExitStack() as stack:
        if given := os.environ.get("CONTRACT_URLS"):
            urls = [urlsplit(url) for url in given.split(",")]
            lives = [Live(url.port or 80, folder / "none", url.path.rstrip("/")) for url in urls]
        else:
            heads = MedusaHeads(num_heads=3, num_layers=1, hidden_size=32, vocab_size=262)
            heads.save(folder / "heads", str(tiny_base))
            lives = []
            for name, path in (("medusa", str(folder / "heads")), ("baseline", None)):
                (folder / name).mkdir()
                arm = live_server(
                    folder / name, model_id=name, base=str(tiny_base), heads=path, max_total_tokens=512
                )
                lives.append(stack.enter_context(arm))
        yield [Target(live, model_of(live)) for live in lives]


def model_of(live: Live) -> str:
    return asyncio.run(ask(live, "GET", "/v1/models")).json()["data"][0]["id"]


def all_alike(values: list[Any]) -> Any:
    assert all(value == values[0] for value in values), values
    return values[0]


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The events of an OpenAI stream, each of which is one line of JSON and an empty line."""
    *events, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(choice: dict[str, Any]) -> str:
    return (
        choice["text"]
        if "text" in choice
        else (choice.get("message") or choice["delta"]).get("content") or ""
    )


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_is_framed_as_events_and_says_what_the_whole_reply_says(
    targets: list[Target], prompt: str
) -> None:
    texts: dict[str, list[str]] = {}
    for target in targets:
        for path, fields in ((CHAT_URL, target.chat(prompt)), (COMPLETION_URL, target.completion(prompt))):
            whole = target.ask("POST", path, fields)
            assert whole.headers["content-type"] == "application/json"
            asked = {**fields, "stream": True, "stream_options": {"include_usage": True}}
            streamed = target.ask("POST", path, asked)
            assert streamed.headers["content-type"].startswith("text/event-stream")
            events = events_of(streamed.body)
            choices = [choice for event in events for choice in event["choices"]]
            text = text_of(whole.json()["choices"][0])
            assert "".join(map(text_of, choices)) == text
            assert len({event["id"] for event in events}) == 1
            assert choices[-1]["finish_reason"] == whole.json()["choices"][0]["finish_reason"]
            assert not any(choice["finish_reason"] for choice in choices[:-1])
            counts = (
                "prompt_tokens",
                "completion_tokens",
                "total_tokens",
            )  # how many guesses there are is the load's
            assert [events[-1]["usage"][n] for n in counts] == [whole.json()["usage"][n] for n in counts]
            texts.setdefault(path, []).append(text)
    for of_path in texts.values():
        assert all_alike(of_path)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_clients_of_tgi_get_the_same_tokens_whole_and_streamed(targets: list[Target], prompt: str) -> None:
    replies = []
    for target in targets:
        asked = {"inputs": prompt, "parameters": {"max_new_tokens": NUM_TOKENS, "details": True}}
        whole = target.ask("POST", "/generate", asked).json()
        raw = target.ask("POST", "/generate_stream", asked).body.decode()
        lines = [line for line in raw.split("\n\n") if line]
        assert all(line.startswith("data:") for line in lines)
        events = [json.loads(line.removeprefix("data:")) for line in lines]
        ids = [event["token"]["id"] for event in events]
        assert ids == [token["id"] for token in whole["details"]["tokens"]]
        assert events[-1]["generated_text"] == whole["generated_text"]
        assert [event["index"] for event in events] == list(range(1, len(events) + 1))
        completion = target.ask("POST", COMPLETION_URL, target.completion(prompt)).json()["choices"][0][
            "text"
        ]
        assert whole["generated_text"] == completion
        replies.append((ids, whole["generated_text"], whole["details"]["finish_reason"]))
    assert all_alike(replies)


def test_a_connection_is_used_again_also_behind_streams_and_errors(targets: list[Target]) -> None:
    async def talk(target: Target) -> list[int]:
        connection = await Connection.open(target.live)
        statuses = []
        for i in range(9):
            fields = target.chat("hi", stream=i % 3 == 0, temperature=7 if i % 3 == 2 else 0)
            raw = request_bytes(target.live, "POST", CHAT_URL, json.dumps(fields).encode())
            await connection.send(raw)
            statuses.append((await connection.answer()).status)
        connection.close()
        return statuses

    for target in targets:
        assert asyncio.run(talk(target)) == [200, 200, 400] * 3


def test_other_methods_are_refused_with_those_that_are_allowed(targets: list[Target]) -> None:
    for target in targets:
        for method in ("OPTIONS", "GET", "PUT", "DELETE"):
            answer = target.ask(method, CHAT_URL)
            assert (answer.status, answer.headers["allow"]) == (405, "POST")
            assert "error" in answer.json()
        assert target.ask("GET", "/health").status == 200


def test_a_mix_of_clients_at_once_gets_what_each_gets_alone(targets: list[Target]) -> None:
    """Rows of a batch that touch each other change a text here and there."""

    async def mixed(target: Target) -> list[str]:
        requests = [
            (COMPLETION_URL, target.completion(prompt, max_tokens=8 + i))
            for i, prompt in enumerate(PROMPTS * 4)
        ]
        alone = [
            (await ask(target.live, "POST", *request)).json()["choices"][0]["text"] for request in requests
        ]
        noise = [
            ask(target.live, "POST", CHAT_URL, target.chat(prompt, stream=True, temperature=1, seed=i))
            for i, prompt in enumerate(PROMPTS)
        ]
        together = await asyncio.gather(*(ask(target.live, "POST", *request) for request in requests), *noise)
        assert [answer.json()["choices"][0]["text"] for answer in together[: len(requests)]] == alone
        assert all(events_of(answer.body) for answer in together[len(requests) :])
        return alone

    assert all_alike([asyncio.run(mixed(target)) for target in targets])


@pytest.mark.nightly
@pytest.mark.parametrize("path", [CHAT_URL, COMPLETION_URL])
def test_guidellm_measures_both_arms_without_an_error(
    targets: list[Target], path: str, tiny_base: Path, tmp_path: Path
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in PROMPTS * 2))
    environment = {
        **os.environ,
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "TRANSFORMERS_OFFLINE": "1",
        "GUIDELLM__MAX_WORKER_PROCESSES": "1",
    }
    for target in targets:
        out = tmp_path / f"{target.model}.json"
        backend = {
            "kind": "openai_http",
            "target": target.live.url,
            "model": target.model,
            "request_format": path,
            "max_tokens": NUM_TOKENS,
            "extras": {"body": {"temperature": 0}},
        }
        columns = {"kind": "generative_column_mapper", "column_mappings": {"text_column": "text"}}
        command = [sys.executable, "-m", "guidellm", "run", "--disable-console-interactive"]
        command += [
            "--backend",
            json.dumps(backend),
            "--tokenizer",
            f"kind=huggingface_auto,model={tiny_base}",
        ]
        command += ["--data", json.dumps({"kind": "json_file", "path": str(data)})]
        command += ["--data-column-mapper", json.dumps(columns), "--profile", "kind=concurrent,streams=2"]
        command += ["--constraint", "kind=max_requests,count=8", "--output", f"kind=json,path={out}"]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        metrics = json.loads(out.read_text())["benchmarks"][0]["metrics"]["request_latency"]
        assert (metrics["successful"]["count"], metrics["errored"]["count"]) == (8, 0)
