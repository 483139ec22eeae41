"""OpenAI's own client against real servers: Medusa and the baseline of one base, with the same text from both."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import torch
import uvicorn
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from medusa_ray import demo
from medusa_ray.chat import Chat
from medusa_ray.config import EngineConfig
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.cache import PAGE_SIZE
from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.tree import Tree
from medusa_ray.serve import Server, build_api

pytestmark = pytest.mark.long
BASE = Path(demo.__file__).parent / "base"
ASK: Any = [
    {"role": "user", "content": "CREATE TABLE pets (name TEXT, age INT)\nHow many pets are older than 3?"}
]
TREE = [(0,), (1,), (0, 0), (2,), (0, 1), (1, 0), (0, 0, 0)]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": NOTHING}}


class Pet(BaseModel):
    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=30)
    is_cat: bool


class Running:
    """A server of the shipped base on a free port of the loopback, in a thread."""

    def __init__(self, heads: MedusaHeads | None) -> None:
        backbone = Backbone.load(str(BASE), torch.float32, "cpu")
        tree = Tree.from_paths(TREE) if heads else None
        self.engine = Engine(backbone, heads, tree, max_batch_size=8, max_total_tokens=1024, max_waiting=16)
        args = EngineConfig(model_id="demo", base=str(BASE))
        server = Server(self.engine, Chat.load(str(BASE)), args)
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self._uvicorn = uvicorn.Server(uvicorn.Config(build_api(server), log_level="error"))
        self._thread = threading.Thread(target=self._uvicorn.run, args=([listening],))
        self._thread.start()
        while not self._uvicorn.started:
            time.sleep(0.01)

    def close(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Running]]:
    torch.manual_seed(5)
    heads = MedusaHeads(num_heads=3, num_layers=1, hidden_size=384, vocab_size=1024, layout="own").eval()
    running = {"baseline": Running(None), "medusa": Running(heads)}
    yield running
    for server in running.values():
        server.close()


@pytest.fixture(params=["medusa", "baseline"])
def client(servers: dict[str, Running], request: pytest.FixtureRequest) -> OpenAI:
    return client_of(servers[request.param])


def client_of(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def shape_of(value: Any) -> Any:
    """A response without what differs from one call to the next, and between Medusa and the baseline."""
    if isinstance(value, dict):
        left_out = ("id", "created", "metrics", "completion_tokens_details")
        return {
            k: round(v, 3) if k == "logprob" else shape_of(v) for k, v in value.items() if k not in left_out
        }
    return [shape_of(inner) for inner in value] if isinstance(value, list) else value


def test_medusa_and_the_baseline_answer_alike(servers: dict[str, Running]) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "pet", "schema": Pet.model_json_schema()}}
    asked: list[dict[str, Any]] = [
        {"messages": ASK, "temperature": 0, "max_tokens": 40},
        {"messages": ASK, "temperature": 0, "max_tokens": 12, "logprobs": True},
        {"messages": ASK, "seed": 7, "n": 3, "max_tokens": 24},
        {"messages": ASK, "temperature": 0, "max_tokens": 80, "response_format": schema},
        {"messages": ASK, "seed": 3, "max_tokens": 80, "tools": [WEATHER, CLOCK], "tool_choice": "required"},
        {"messages": ASK, "temperature": 0, "max_tokens": 40, "stop": ["FROM", "WHERE"]},
        {
            "messages": ASK,
            "temperature": 0,
            "frequency_penalty": 0.5,
            "logit_bias": {"70": 3},
            "max_tokens": 30,
        },
    ]
    for fields in asked:
        bodies = [
            client_of(s).chat.completions.create(model="demo", **fields).model_dump()
            for s in servers.values()
        ]
        one, other = (shape_of(without_call_ids(body)) for body in bodies)
        assert one == other, fields
    assert servers["medusa"].engine.counters.num_drafts > 0
    assert servers["baseline"].engine.counters.num_drafts == 0


def without_call_ids(body: Any) -> Any:
    return json.loads(json.dumps(body).replace('"id": "call_', '"id": "'))


def test_a_chat_is_the_same_whole_streamed_and_asynchronous(client: OpenAI) -> None:
    fields: Any = {"model": "demo", "messages": ASK, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**fields)
    text = whole.choices[0].message.content
    assert text
    assert whole.choices[0].finish_reason in ("stop", "length")

    stream = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage == whole.usage

    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as many:
            replies = await asyncio.gather(*(many.chat.completions.create(**fields) for _ in range(4)))
            events = await many.chat.completions.create(**fields, stream=True)
            parts = [c.choices[0].delta.content or "" async for c in events]
            return [*(reply.choices[0].message.content or "" for reply in replies), "".join(parts)]

    assert set(asyncio.run(ask())) == {text}


def test_null_is_a_field_left_out(client: OpenAI) -> None:
    names = (
        "max_tokens temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty logit_bias n "
        "stop stream stream_options ignore_eos return_token_ids logprobs top_logprobs tools tool_choice "
        "parallel_tool_calls response_format structured_outputs acceptance speculates deadline_s user"
    )
    fields = {"model": "demo", "messages": ASK, "seed": 5, "max_completion_tokens": 8}
    url = f"{client.base_url}chat/completions"
    bodies = [
        httpx.post(url, json={**fields, **more}, timeout=60).json()
        for more in ({}, dict.fromkeys(names.split()))
    ]
    assert shape_of(bodies[0]) == shape_of(bodies[1])


def test_several_choices_are_repeatable_and_the_first_is_the_only_ones(client: OpenAI) -> None:
    fields: Any = {"model": "demo", "messages": ASK, "temperature": 1.2, "seed": 11, "max_tokens": 20}

    def texts(**more: Any) -> list[str | None]:
        choices = client.chat.completions.create(**fields, **more).choices
        assert [choice.index for choice in choices] == list(range(len(choices)))
        return [choice.message.content for choice in choices]

    four = texts(n=4)
    assert len(set(four)) == 4
    assert texts(n=4) == four
    assert texts() == texts(n=1) == four[:1]
    assert texts(n=2) == four[:2]

    streamed: dict[int, str] = {}
    order, last = [], None
    stream = client.chat.completions.create(
        **fields, n=4, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
            order.append(choice.index)
        last = chunk
    assert [streamed[i] for i in range(4)] == four
    assert order != sorted(order)  # they come side by side
    whole = client.chat.completions.create(**fields, n=4)
    assert last is not None
    assert last.usage == whole.usage
    alone = client.chat.completions.create(**fields)
    assert whole.usage
    assert alone.usage
    assert whole.usage.prompt_tokens == alone.usage.prompt_tokens
    assert whole.usage.completion_tokens > alone.usage.completion_tokens


def test_text_completions_take_several_prompts_and_echo_them(client: OpenAI) -> None:
    fields: Any = {"model": "demo", "temperature": 0, "max_tokens": 8}
    alone = [client.completions.create(**fields, prompt=p).choices[0].text for p in ("SELECT", "a b")]
    both = client.completions.create(**fields, prompt=["SELECT", "a b"])
    assert [choice.text for choice in both.choices] == alone
    tokens = httpx.post(f"{str(client.base_url)[:-3]}tokenize", json={"prompt": "SELECT"}).json()["tokens"]
    assert client.completions.create(**fields, prompt=[tokens, tokens]).choices[1].text == alone[0]
    echoed = client.completions.create(**fields, prompt=["SELECT", "a b"], echo=True, n=2, best_of=2)
    assert [choice.text for choice in echoed.choices] == [
        "SELECT" + alone[0],
        "SELECT" + alone[0],
        "a b" + alone[1],
        "a b" + alone[1],
    ]
    parts = [
        c.choices[0].text for c in client.completions.create(**fields, prompt="a b", echo=True, stream=True)
    ]
    assert "".join(parts) == "a b" + alone[1]
    logged = client.completions.create(**fields, prompt="SELECT", logprobs=2).choices[0].logprobs
    assert logged is not None
    assert "".join(logged.tokens or []) == alone[0]
    assert all(len(top) >= 2 for top in logged.top_logprobs or [])


def test_logprobs_are_of_the_tokens_of_the_text(client: OpenAI) -> None:
    choice = client.chat.completions.create(
        model="demo", messages=ASK, temperature=0, max_tokens=12, logprobs=True, top_logprobs=3
    ).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert "".join(entry.token for entry in content).removesuffix("<|end|>") == choice.message.content
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.token == entry.top_logprobs[0].token  # greedy
        assert entry.logprob <= 0


def test_a_reply_to_a_pydantic_model_is_one(client: OpenAI) -> None:
    for temperature in (0, 1):
        reply = client.chat.completions.parse(
            model="demo", messages=ASK, temperature=temperature, seed=2, max_tokens=90, response_format=Pet
        )
        assert isinstance(reply.choices[0].message.parsed, Pet)
        assert reply.choices[0].finish_reason == "stop"


def test_json_objects_and_vllms_structured_outputs_hold(client: OpenAI) -> None:
    def ask(**more: Any) -> str:
        reply = client.chat.completions.create(
            model="demo", messages=ASK, temperature=0, max_tokens=150, **more
        )
        return reply.choices[0].message.content or ""

    assert ask(response_format={"type": "json_object"}).startswith("{")
    assert ask(extra_body={"structured_outputs": {"choice": ["yes", "no"]}}) in ("yes", "no")
    date = ask(extra_body={"structured_outputs": {"regex": r"\d{4}-\d\d"}})
    assert len(date) == 7
    assert date[4] == "-"
    schema = {**Pet.model_json_schema(), "additionalProperties": False}
    jsonschema.validate(json.loads(ask(extra_body={"structured_outputs": {"json": schema}})), schema)


@pytest.mark.parametrize(
    ("choice", "several", "names"),
    [
        ("required", None, {"get_weather", "clock"}),
        ("required", True, {"get_weather", "clock"}),
        ({"type": "function", "function": {"name": "get_weather"}}, None, {"get_weather"}),
    ],
)
def test_forced_calls_are_calls_with_valid_arguments(
    client: OpenAI, choice: Any, several: Any, names: set[str]
) -> None:
    fields: Any = {
        "model": "demo",
        "messages": ASK,
        "seed": 1,
        "max_tokens": 150,
        "tools": [WEATHER, CLOCK],
        "tool_choice": choice,
        **({} if several is None else {"parallel_tool_calls": several}),
    }
    whole = client.chat.completions.create(**fields).choices[0]
    assert whole.finish_reason in (("tool_calls", "length") if several else ("tool_calls",))
    assert whole.message.content is None
    calls: Any = whole.message.tool_calls
    assert len({call.id for call in calls}) == len(calls) >= 1
    for call in calls:
        assert call.function.name in names
        if whole.finish_reason == "tool_calls":
            schema = {t["function"]["name"]: t["function"]["parameters"] for t in (WEATHER, CLOCK)}[
                call.function.name
            ]
            jsonschema.validate(json.loads(call.function.arguments), schema)

    if whole.finish_reason == "length":  # at which the client raises
        return
    with client.chat.completions.stream(**fields) as stream:
        final: Any = stream.get_final_completion().choices[0]
    assert final.finish_reason == whole.finish_reason
    assert [(c.function.name, c.function.arguments) for c in final.message.tool_calls] == [
        (c.function.name, c.function.arguments) for c in calls
    ]


def test_a_chat_goes_on_with_what_a_call_gave(client: OpenAI) -> None:
    fields: Any = {"model": "demo", "seed": 1, "max_tokens": 60, "tools": [WEATHER]}
    called = client.chat.completions.create(messages=ASK, tool_choice="required", **fields).choices[0].message
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": '{"degrees": 3}'}  # type: ignore[index]
    reply = client.chat.completions.create(messages=[*ASK, called, result], **fields)
    assert reply.choices[0].message.content
    without = client.chat.completions.create(messages=ASK, tool_choice="none", **fields)
    plain = client.chat.completions.create(messages=ASK, model="demo", seed=1, max_tokens=60)
    assert without.choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"n": 9}, "n is 9"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type is 'xml'"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "wizard"}},
                }
            },
            "response_format.json_schema.schema cannot be followed: Invalid type: wizard",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            'Unimplemented keys: ["not"]',
        ),
        (
            {"response_format": {"type": "json_object"}, "tools": [CLOCK]},
            "response_format and tools both say",
        ),
        ({"tool_choice": "required"}, "there are no tools"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "expected the name of one of the tools, clock",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name is 'a b'"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
                "tool_choice": "required",
                "extra_body": {"ignore_eos": True},
            },
            "ignore_eos is true",
        ),
        (
            {"extra_body": {"structured_outputs": {"regex": "("}}},
            "structured_outputs.regex cannot be followed",
        ),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, "both say"),
        (
            {"extra_body": {"structured_outputs": {"grammar": "x"}}},
            "structured_outputs.grammar is not supported",
        ),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_the_field(
    client: OpenAI, fields: dict[str, Any], says: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="demo", messages=ASK, stream=stream, **fields)
        assert says in caught.value.message


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": ["a"] * 5}, "prompt has 5 prompts, but at most 4"),
        ({"prompt": "a", "best_of": 2}, "best_of is 2"),
        ({"prompt": "a", "suffix": "b"}, "suffix is not supported"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "logprobs is 1"),
    ],
)
def test_text_completions_refuse_what_they_cannot_do(
    client: OpenAI, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        client.completions.create(model="demo", **fields)


def test_a_client_that_hangs_up_ends_all_its_choices(servers: dict[str, Running]) -> None:
    server = servers["medusa"]
    body = {"model": "demo", "messages": ASK, "n": 6, "stream": True, "ignore_eos": True, "max_tokens": 200}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
        assert server.engine.scheduler.num_open == 6
    deadline = time.monotonic() + 10
    while server.engine.scheduler.num_open and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.engine.scheduler.num_open == 0


def test_the_prompt_of_several_choices_goes_through_the_base_once(servers: dict[str, Running]) -> None:
    server = servers["baseline"]
    messages: Any = [{"role": "user", "content": "one long prompt that nobody has sent before, " * 8}]
    before = server.engine.counters.num_prompt_tokens
    reply = client_of(server).chat.completions.create(model="demo", messages=messages, n=8, max_tokens=4)
    assert reply.usage is not None
    # Whole pages are shared, so the other seven have less than one to do.
    num_tokens = reply.usage.prompt_tokens
    assert num_tokens > 2 * PAGE_SIZE
    assert server.engine.counters.num_prompt_tokens - before == num_tokens + 7 * (num_tokens % PAGE_SIZE)


def test_tokens_of_texts_and_chats_are_told_and_turned_back(servers: dict[str, Running]) -> None:
    url, chat = servers["medusa"].url, Chat.load(str(BASE))

    def post(route: str, **body: Any) -> Any:
        return httpx.post(url + route, json=body).json()

    ids = post("/tokenize", model="demo", prompt="SELECT 日本")
    assert ids == {"tokens": chat.text_ids("SELECT 日本"), "count": len(ids["tokens"]), "max_model_len": 1024}
    assert post("/detokenize", model="demo", tokens=ids["tokens"]) == {"prompt": "SELECT 日本"}
    assert post("/tokenize", messages=ASK)["tokens"] == chat.prompt_ids(ASK)
    assert post("/tokenize", messages=ASK, add_generation_prompt=False)["tokens"] == chat.prompt_ids(ASK)[:-1]
    spans = post("/tokenize", inputs="SELECT x")
    assert [span["id"] for span in spans] == chat.text_ids("SELECT x")
    assert all(span["text"] == "SELECT x"[span["start"] : span["stop"]] for span in spans)
    assert "none of them came" in post("/tokenize", model="demo")["error"]["message"]
    assert "tokens.1 is 1024; expected 0 to 1023" in post("/detokenize", tokens=[1, 1024])["error"]["message"]
    assert "does not exist here" in post("/detokenize", model="x", tokens=[1])["error"]["message"]
