"""Malformed and hostile requests: each is refused in words, none is a 5xx, and the next good one is answered rightly.

The requests come from the JSON schemas of the request models, so that a field that is added is attacked at once, and
from a list made by hand of what no schema knows.
"""

import asyncio
import copy
import gzip
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from live_server import Answer, Connection, Live, ask, live_server, request_bytes

from medusa_ray.medusa.heads import MedusaHeads

CHAT_URL, COMPLETION_URL = "/v1/chat/completions", "/v1/completions"
TGI_URLS = ("/generate", "/generate_stream", "/")
TGI: dict[str, Any] = {"inputs": "hi", "parameters": {"max_new_tokens": 8}}
# A request to each route of the server's OpenAPI document that takes one; a route that is added needs one here.
GOOD: dict[str, dict[str, Any]] = {
    CHAT_URL: {
        "model": "medusa",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 8,
        "temperature": 0,
    },
    COMPLETION_URL: {"model": "medusa", "prompt": "hi", "max_tokens": 8, "temperature": 0},
    **dict.fromkeys(TGI_URLS, TGI),
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [7, 8]},
}
REFERENCES = (CHAT_URL, COMPLETION_URL, "/generate")  # are asked after each attack in turn
MAX_BUSY_S = 1.0  # of a processor's time, for which the event loop may keep everybody else waiting
MAX_MESSAGE = 1100  # characters of an error, whatever came
BIG = 1_900_000  # just below the limit of a body

# JSON values as they are written, some of which no JSON writer would write.
VALUES: dict[str, bytes] = {
    **{
        f"{text} as it is": text.encode() for text in ("null", "true", "false", "[]", "{}", "NaN", "Infinity")
    },
    **{
        f"the number {text}": text.encode()
        for text in ("0", "-1", "-0", "1.0", "0.1", "1e308", "1e-400", "-1e400")
    },
    **{f"the number {n}": str(n).encode() for n in (2**31, 2**63, 2**64, -(2**63) - 1, 10**18)},
    "1e400": b"1e400",
    "an int of 400 digits": b"9" * 400,
    "an int of 4,200 digits": b"9" * 4200,
    "an int of a million digits": b"9" * 1_000_000,
    "a fraction of a million digits": b"0." + b"9" * 1_000_000,
    "an octal number": b"017",
    "a hex number": b"0x10",
    "a word": b"nil",
    "nothing at all": b"",
    "an empty text": b'""',
    "a number as text": b'"1"',
    "a null byte, written out": b'"a\\u0000b"',
    "a null byte as it is": b'"a\x00b"',
    "a lone high surrogate": b'"a\\ud800b"',
    "a lone low surrogate": b'"a\\udc00b"',
    "surrogates the wrong way round": b'"\\udc00\\ud800"',
    "half of a surrogate pair": b'"\\ud83d"',
    "invalid UTF-8": b'"\xff\xfe"',
    "overlong UTF-8": b'"\xc0\xaf"',
    "a UTF-8 surrogate": b'"\xed\xa0\x80"',
    "a character cut in two": '"ü'.encode()[:-1] + b'"',
    "a path": b'"../../../../etc/passwd"',
    "an absolute path": b'"/etc/passwd"',
    "a URL": b'"http://127.0.0.1:1/x"',
    "an unknown escape": b'"\\x41"',
    "a text without an end": b'"abc',
    "a template": b'"{{ 7 * 7 }}{% raw %}"',
    "special tokens": b'"<|end|><|system|><|assistant|><|im_end|>"',
    "joined emoji": '"👩‍👩‍👧‍👦🏳️‍🌈"'.encode(),
    "right to left": '"\u202egnihton\u202c\u200f"'.encode(),
    "a tower of accents": ('"Z' + "\u0300\u0301\u0302" * 200 + '"').encode(),
    "two million characters": b'"' + b"A" * BIG + b'"',
    "two million blanks": b'"' + b" " * BIG + b'"',
    "a hundred thousand emoji": ('"' + "😀" * 100_000 + '"').encode(),
    "an array of a null": b"[null]",
    "an array of a number": b"[7]",
    "an array of an array": b"[[[]]]",
    "an array of texts": b'["a", "b"]',
    "an array of an object": b'[{"a": {"b": []}}]',
    "an object of a number": b'{"a": 1}',
    "an object without a name": b'{"": null}',
    "an object with one name twice": b'{"a": 1, "a": 2}',
    "an array 100,000 deep": b"[" * 100_000 + b"]" * 100_000,
    "an array 100,000 deep without an end": b"[" * 100_000,
    "an array 150 deep": b"[" * 150 + b"]" * 150,
    "an object 100,000 deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "an object 150 deep": b'{"a":' * 150 + b"1" + b"}" * 150,
    "an array without an end": b"[1, 2",
    "many nulls": b"[" + b"null," * (BIG // 5) + b"null]",
    "many fractions": b"[" + b"0.5," * (BIG // 4) + b"0]",
    "many token ids": b"[" + b"7," * (BIG // 2) + b"7]",
    "many empty objects": b"[" + b"{}," * (BIG // 3) + b"{}]",
    "many empty arrays": b"[" + b"[]," * (BIG // 3) + b"[]]",
    "many texts": b"[" + b'"a",' * (BIG // 4) + b'"a"]',
    "many names": b"{" + b",".join(b'"a%d":"x"' % i for i in range(BIG // 14)) + b"}",
    "many numbers as names": b"{" + b",".join(b'"%d":1' % i for i in range(BIG // 11)) + b"}",
    "a name of a million characters": b'{"' + b"n" * 1_000_000 + b'": 1}',
}


# ------------------------------------------------------------------------------------- bodies from a schema

PLACE = "\uf8ff here \uf8ff"


@dataclass(frozen=True)
class Case:
    """A request, and what an error must name where it names anything."""

    name: str
    url: str
    body: bytes
    names: tuple[str, ...] = ()


def resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """A schema itself, where it refers to another; of alternatives the first that is not null."""
    while True:
        if "$ref" in schema:
            schema = root[schema["$ref"].rsplit("/", 1)[1]]
        elif options := schema.get("anyOf") or schema.get("oneOf"):
            schema = next(option for option in options if option.get("type") != "null")
        else:
            return schema


def example(schema: dict[str, Any], root: dict[str, Any]) -> Any:
    """A small value that a schema allows."""
    schema = resolved(schema, root)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    match schema.get("type"):
        case "object":
            properties = schema.get("properties", {})
            return {name: example(properties[name], root) for name in schema.get("required", ())}
        case "array":
            return [example(schema.get("items", {}), root)] * schema.get("minItems", 0)
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return False
        case _:
            return "a"


def places(
    schema: dict[str, Any], root: dict[str, Any], value: Any, path: str = ""
) -> Iterator[tuple[str, dict[str, Any], Callable[[Any], Any]]]:
    """Path, schema and setter of each field at any depth; a setter gives the whole with another value there."""
    schema = resolved(schema, root)
    for name, inner in schema.get("properties", {}).items():
        parent = value if isinstance(value, dict) else example(schema, root)

        def put(new: Any, parent: Any = parent, name: str = name) -> Any:
            return {**copy.deepcopy(parent), name: new}

        yield f"{path}{name}", inner, put
        child = parent.get(name, example(inner, root))
        for below, its_schema, put_below in places(inner, root, child, f"{path}{name}."):
            yield below, its_schema, lambda new, put=put, put_below=put_below: put(put_below(new))
    if schema.get("type") == "array" and "items" in schema:
        item = value[0] if isinstance(value, list) and value else example(schema["items"], root)
        yield f"{path}0", schema["items"], lambda new: [new]
        for below, its_schema, put_below in places(schema["items"], root, item, f"{path}0."):
            yield below, its_schema, lambda new, put_below=put_below: [put_below(new)]
    if isinstance(schema.get("additionalProperties"), dict):
        yield f"{path}7", schema["additionalProperties"], lambda new: {"7": new}


def beyond(schema: dict[str, Any], root: dict[str, Any]) -> Iterator[tuple[bytes, tuple[str, ...]]]:
    """Values just outside a field's limits, and what an error must say of them: the value and the limit."""
    schema = resolved(schema, root)
    for key, step in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0), ("exclusiveMaximum", 0)):
        if key in schema:
            limit = schema[key]
            yield str(limit + step).encode(), (str(limit + step), str(limit))
    if "maxItems" in schema:
        num = schema["maxItems"] + 1
        value = json.dumps([example(schema["items"], root)] * num)
        yield value.encode(), (str(num - 1),)
    if "minItems" in schema:
        yield b"[]", (str(schema["minItems"]),)
    if "enum" in schema:
        yield b'"something else"', ("something else", str(schema["enum"][-1]))


def schema_cases(live: Live) -> list[Case]:
    """Every hostile value at every place of every request, and what lies just beyond each limit."""
    document = asyncio.run(ask(live, "GET", "/openapi.json")).json()
    root = document["components"]["schemas"]
    bodies = {url: item["post"]["requestBody"] for url, item in document["paths"].items() if "post" in item}
    assert set(bodies) == set(GOOD)
    schemas = {url: body["content"]["application/json"]["schema"] for url, body in bodies.items()}
    return [case for url, schema in schemas.items() for case in cases_of(url, schema, root)]


def cases_of(url: str, whole: dict[str, Any], root: dict[str, Any]) -> list[Case]:
    cases = []
    for path, schema, put in places(whole, root, GOOD[url]):
        top = path.split(".")[0]

        def body(written: bytes, put: Callable[[Any], Any] = put) -> bytes:
            return json.dumps(put(PLACE)).encode().replace(json.dumps(PLACE).encode(), written)

        for name, written in VALUES.items():
            cases.append(Case(f"{url} {path}: {name}", url, body(written), (top,)))
        for written, says in beyond(schema, root):
            cases.append(Case(f"{url} {path}: beyond, {written[:20]!r}", url, body(written), (top, *says)))
        if "." not in path and path in resolved(whole, root).get("required", ()):
            left_out = {name: value for name, value in GOOD[url].items() if name != path}
            cases.append(Case(f"{url} {path}: missing", url, json.dumps(left_out).encode(), (path,)))
    return cases


def hand_made_cases() -> list[Case]:
    """Bodies that are wrong as a whole, and requests that are only wrong in what they mean."""
    whole: dict[str, bytes] = {
        "empty": b"",
        "blanks": b" \r\n\t",
        "a BOM before it": b"\xef\xbb\xbf" + json.dumps(GOOD[CHAT_URL]).encode(),
        "UTF-16": json.dumps(GOOD[CHAT_URL]).encode("utf-16"),
        "two documents": json.dumps(GOOD[CHAT_URL]).encode() * 2,
        "a comma too many": json.dumps(GOOD[CHAT_URL]).encode()[:-1] + b",}",
        "single quotes": str(GOOD[CHAT_URL]).encode(),
        "a comment": b"/* hi */" + json.dumps(GOOD[CHAT_URL]).encode(),
        "a form": b"model=medusa&prompt=hi",
        "XML": b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>",
        "pickle": b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
        "gzip": gzip.compress(json.dumps(GOOD[CHAT_URL]).encode()),
        "a gzip bomb": gzip.compress(b" " * 50_000_000),
        "nulls": b"\x00" * 100,
        "too large": b" " * (2 * 2**20 + 1),
        "one field a thousand times": b"{"
        + b'"temperature": 3,' * 1000
        + json.dumps(GOOD[CHAT_URL]).encode()[1:],
        "the prototype": b'{"__proto__": {"a": 1}, ' + json.dumps(GOOD[CHAT_URL]).encode()[1:],
        "a dunder": b'{"__class__": "x", "model_fields": 1, "model_config": {}, '
        + json.dumps(GOOD[CHAT_URL]).encode()[1:],
        **VALUES,
    }
    cases = [Case(f"{url}: {name}", url, body) for url in GOOD for name, body in whole.items()]
    for url in (CHAT_URL, COMPLETION_URL):
        good = GOOD[url]
        for name in (
            "../../etc/passwd",
            "/etc/passwd",
            "a\x00b",
            "m" * 1_000_000,
            "",
            " ",
            "medusa ",
            "MEDUSA",
            "%2e%2e",
            "é",
        ):
            body = json.dumps({**good, "model": name}).encode()
            cases.append(Case(f"{url}: model {name[:20]!r}", url, body, ("model",)))
        for fields in (
            {"logit_bias": {"262": 1}},
            {"logit_bias": {"-1": 1}},
            {"logit_bias": {"1.5": 1}},
            {"logit_bias": {str(10**30): 1}},
            {"max_tokens": 511},
            {"max_tokens": 10**15},
            {"stop": [""]},
            {"stop": "s" * 257},
            {"stop": ["s"] * 17},
            {"deadline_s": -1e-300},
            {"temprature": 1},
            {"n" * 1_000_000: 1},
            {"tools": [{"type": "function"}]},
            {"response_format": {"type": "jsn_schema"}},
            {"echo": "yes"},
            {"best_of": 3},
        ):
            text = json.dumps({**good, **fields})
            cases.append(Case(f"{url}: {text[-60:]}", url, text.encode(), (next(iter(fields))[:50],)))
    for content in ("x" * 600, "x" * 100_000, " " * BIG):
        body = {**GOOD[CHAT_URL], "messages": [{"role": "user", "content": content}]}
        cases.append(
            Case(
                f"a chat of {len(content)} characters",
                CHAT_URL,
                json.dumps(body).encode(),
                ("messages", "512"),
            )
        )
        body = {**GOOD[COMPLETION_URL], "prompt": content}
        cases.append(
            Case(
                f"a prompt of {len(content)} characters",
                COMPLETION_URL,
                json.dumps(body).encode(),
                ("prompt", "512"),
            )
        )
    for ids in ([262], [-1], [2**70], [], [1] * 600, [1.5], [True], [[1], [2]], [[]], [["a"]]):
        body = {**GOOD[COMPLETION_URL], "prompt": ids}
        cases.append(
            Case(f"prompt ids {str(ids)[:30]}", COMPLETION_URL, json.dumps(body).encode(), ("prompt",))
        )
    many = {**GOOD[CHAT_URL], "messages": [{"role": "user", "content": "a"}] * 40_000}
    cases.append(Case("forty thousand messages", CHAT_URL, json.dumps(many).encode(), ("messages",)))
    return cases


def covering(cases: list[Case], rng: random.Random) -> list[Case]:
    """Few of the cases, among them one of each place and one of each value."""
    seen: set[str] = set()
    chosen = []
    for case in rng.sample(cases, len(cases)):
        place_and_value = set(case.name.split(": ", 1))
        if not place_and_value <= seen:
            chosen.append(case)
            seen |= place_and_value
    return chosen


# ---------------------------------------------------------------------------------------- what must hold


@dataclass
class Campaign:
    """A server under attack: what it said, and whether it still works."""

    live: Live
    references: dict[str, str] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    num_good: int = 0
    wrong: list[str] = field(default_factory=list)
    slow: list[tuple[float, float, str]] = field(
        default_factory=list
    )  # event loop: busy, standing still; case

    @classmethod
    async def begin(cls, live: Live) -> "Campaign":
        campaign = cls(live)
        for url in REFERENCES:
            campaign.references[url] = text_of(await ask(live, "POST", url, GOOD[url]))
        return campaign

    async def attack(self, case: Case) -> None:
        """Sends one case, then a good request. What is wrong is noted rather than raised: all of it is of interest."""
        try:
            answer = await asyncio.wait_for(ask(self.live, "POST", case.url, case.body), 30)
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            self.wrong.append(f"{case.name}: no answer, {type(error).__name__}")
        else:
            self.statuses[answer.status] += 1
            self.wrong += [f"{case.name}: {problem}" for problem in problems(answer, case)]
        await self.stay_right()
        facts = await self.live.watched_async()
        self.slow.append((round(facts["max_busy_s"], 2), round(facts["max_lag_s"], 2), case.name))

    async def stay_right(self) -> None:
        """A good request is answered as before."""
        url = REFERENCES[self.num_good % len(REFERENCES)]
        answer = await asyncio.wait_for(ask(self.live, "POST", url, GOOD[url]), 30)
        assert text_of(answer) == self.references[url]
        self.num_good += 1


def text_of(answer: Answer) -> str:
    assert answer.status == 200, answer
    if "generated_text" in answer.json():
        return answer.json()["generated_text"]
    choice = answer.json()["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def problems(answer: Answer, case: Case) -> Iterator[str]:
    """What is wrong with an answer: it is a 5xx, or an error that says too little, or not in its protocol's shape."""
    if answer.status < 400:
        return
    if answer.status >= 500:
        yield f"status {answer.status}: {answer.body[:300]!r}"
        return
    try:
        body = answer.json()
        is_tgi = case.url in TGI_URLS
        error = {"message": body["error"], "type": body["error_type"]} if is_tgi else body["error"]
        message, param = error["message"], error.get("param")
        assert is_tgi or set(error) >= {"message", "type", "param", "code"}
    except (ValueError, KeyError, TypeError, AssertionError):
        yield f"not in the protocol's shape: {answer.body[:300]!r}"
        return
    if not message or len(message) > MAX_MESSAGE or len(str(param)) > MAX_MESSAGE:
        yield f"a message of {len(message)} characters, a param of {len(str(param))}"
    # Where the text is no JSON, or too large, there are no fields yet.
    if not re.search("not JSON|larger than|more than", message):
        missing = [name for name in case.names if name not in message]
        if missing:
            yield f"does not name {missing}: {message!r}"


class Flow(threading.Thread):
    """A client that streams one reply after the other, and the longest time that it waited for an event."""

    def __init__(self, live: Live) -> None:
        super().__init__()
        self.live, self.ended = live, threading.Event()
        self.max_gap_s, self.num_events = 0.0, 0

    def run(self) -> None:
        asyncio.run(self._stream())

    async def _stream(self) -> None:
        fields = {**GOOD[COMPLETION_URL], "max_tokens": 100, "ignore_eos": True, "stream": True}
        while not self.ended.is_set():
            connection = await Connection.open(self.live)
            raw = request_bytes(self.live, "POST", COMPLETION_URL, json.dumps(fields).encode())
            await connection.send(raw)
            await connection.head()
            last_s = time.monotonic()
            while b"[DONE]" not in await connection.chunk():
                now_s = time.monotonic()
                self.max_gap_s, last_s = max(self.max_gap_s, now_s - last_s), now_s
                self.num_events += 1
            connection.close()
            await asyncio.sleep(0.5)  # most of the time is for the attacks

    def __enter__(self) -> "Flow":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


@pytest.fixture(scope="module")
def live(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("hostile")
    MedusaHeads(num_heads=3, num_layers=1, hidden_size=32, vocab_size=262).save(
        folder / "heads", str(tiny_base)
    )
    with live_server(
        folder, base=str(tiny_base), heads=str(folder / "heads"), max_total_tokens=512
    ) as server:
        yield server


def run(live: Live, cases: list[Case]) -> None:
    """Attacks with every case while somebody streams."""

    async def attack() -> Campaign:
        campaign = await Campaign.begin(live)
        await live.watched_async()
        for case in cases:
            await campaign.attack(case)
        return campaign

    with Flow(live) as flow:
        campaign = asyncio.run(attack())
    facts = live.watched()
    slowest = sorted(campaign.slow, reverse=True)[:10]
    print(*slowest, sep="\n")
    print(
        f"cases={len(cases)} statuses={dict(sorted(campaign.statuses.items()))} good={campaign.num_good} "
        f"max_busy_s={slowest[0][0]} max_lag_s={max(lag for _, lag, _ in campaign.slow)} "
        f"max_gap_s={flow.max_gap_s:.2f} events={flow.num_events}"
    )
    assert not campaign.wrong, "\n".join([f"{len(campaign.wrong)} of {len(cases)}:", *campaign.wrong[:40]])
    assert campaign.num_good >= len(cases)
    assert slowest[0][0] <= MAX_BUSY_S, slowest
    assert facts["failure"] is None


def test_a_sample_of_hostile_bodies_is_refused_in_words(live: Live) -> None:
    """Each value somewhere, and something at each place; the nightly campaign has every value at every place."""
    rng = random.Random(0)
    by_schema = schema_cases(live)
    run(live, [*rng.sample(hand_made_cases(), 120), *covering(by_schema, rng), *rng.sample(by_schema, 250)])


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_every_hostile_value_at_every_place_is_refused_in_words(live: Live) -> None:
    run(live, [*hand_made_cases(), *schema_cases(live)])


# ------------------------------------------------------------------------------------------ wrong as HTTP


@dataclass(frozen=True)
class Raw:
    """Bytes on a connection, and what may come back: statuses, in their order, or None for a connection that ends."""

    name: str
    parts: tuple[bytes, ...]  # a short while apart
    allowed: tuple[int | None, ...]
    ends: bool = False  # whether the client then says that nothing more will come


def raw_cases(prefix: str = "") -> list[Raw]:
    """What proxies, scanners and those who would smuggle a request send, to a server under this path."""
    body = json.dumps(GOOD[CHAT_URL]).encode()
    size = str(len(body)).encode()
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    start = (
        b"POST "
        + prefix.encode()
        + b"/v1/chat/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
    )
    chunked, length = b"Transfer-Encoding: chunked\r\n", b"Content-Length: " + size + b"\r\n"
    get = b"GET " + prefix.encode() + b"/health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    refused, either = (400, 413, 431, None), (200, 400, None)
    cases = [
        Raw("good", (start + length + b"\r\n" + body,), (200,)),
        Raw("chunked", (start + chunked + b"\r\n" + chunks,), (200,)),
        Raw("byte by byte", tuple(bytes([b]) for b in start[-60:]), (400, None), ends=True),
        Raw("two parts", (start + length + b"\r\n" + body[:9], body[9:]), (200,)),
        Raw("bytes", (b"\x00\x01\x02\xff\r\n\r\n",), refused),
        Raw("TLS", (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 300,), refused, ends=True),
        Raw("HTTP/0.9", (b"GET /health\r\n\r\n",), either),
        Raw("HTTP/1.0", (b"GET /health HTTP/1.0\r\n\r\n",), (200,)),
        Raw("HTTP/2 at once", (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",), refused, ends=True),
        Raw("HTTP/9.9", (b"GET /health HTTP/9.9\r\nHost: a\r\n\r\n",), refused),
        Raw("no host", (b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",), either),
        Raw("two hosts", (get + b"Host: b\r\n\r\n",), either),
        Raw("no body", (start + b"Content-Length: 0\r\n\r\n",), (400,)),
        Raw("no length", (start + b"\r\n" + body,), (400, None)),
        Raw("a length below 0", (start + b"Content-Length: -1\r\n\r\n" + body,), refused),
        Raw("a length in words", (start + b"Content-Length: many\r\n\r\n" + body,), refused),
        Raw("a length with a plus", (start + b"Content-Length: +" + size + b"\r\n\r\n" + body,), refused),
        Raw(
            "a length beyond 64 bits",
            (start + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n" + body,),
            refused,
        ),
        Raw("two lengths", (start + length + b"Content-Length: 5\r\n\r\n" + body,), refused),
        Raw("a list of lengths", (start + b"Content-Length: 5, 6\r\n\r\n" + body,), refused),
        Raw("too short a length", (start + b"Content-Length: 5\r\n\r\n" + body,), (400,)),
        Raw("too long a length", (start + b"Content-Length: 9999\r\n\r\n" + body,), (400, None), ends=True),
        Raw(
            "a length of 3 MB", (start + b"Content-Length: 3000000\r\n\r\n" + b" " * 3_000_000,), (413, None)
        ),
        Raw("CL.TE", (start + length + chunked + b"\r\n" + chunks,), either),
        Raw("TE.CL", (start + chunked + b"Content-Length: 4\r\n\r\n" + chunks,), either),
        Raw("TE.TE", (start + chunked + b"Transfer-Encoding: x\r\n\r\n" + chunks,), either),
        Raw("a blank before the colon", (start + b"Transfer-Encoding : chunked\r\n\r\n" + chunks,), either),
        Raw(
            "another coding",
            (start + b"Transfer-Encoding: xchunked\r\n\r\n" + chunks,),
            (400, None),
            ends=True,
        ),
        Raw(
            "a coding behind chunked",
            (start + b"Transfer-Encoding: chunked, identity\r\n\r\n" + chunks,),
            (400, None),
            ends=True,
        ),
        Raw(
            "a coding in tabs", (start + b"Transfer-Encoding:\tchunked\r\n\r\n" + chunks,), either, ends=True
        ),
        Raw("a chunk of size zz", (start + chunked + b"\r\nzz\r\n" + body,), refused),
        Raw("a chunk of size -1", (start + chunked + b"\r\n-1\r\n" + body,), refused),
        Raw("a chunk beyond 64 bits", (start + chunked + b"\r\n" + b"F" * 20 + b"\r\n" + body,), refused),
        Raw(
            "a chunk of 8 EB",
            (start + chunked + b"\r\n7FFFFFFFFFFFFFFF\r\n" + body,),
            (400, 413, None),
            ends=True,
        ),
        Raw("a chunk without its end", (start + chunked + b"\r\n%x\r\n%sXX" % (len(body), body),), refused),
        Raw(
            "chunks beyond the limit",
            (start + chunked + b"\r\n" + (b"10000\r\n" + b" " * 0x10000 + b"\r\n") * 40,),
            (413, None),
        ),
        Raw(
            "a long chunk extension",
            (start + chunked + b"\r\n1;" + b"a" * 100_000 + b"\r\n{\r\n0\r\n\r\n",),
            refused,
        ),
        Raw("a trailer", (start + chunked + b"\r\n" + chunks[:-2] + b"X-A: b\r\n\r\n",), either),
        Raw(
            "gzip",
            (
                start
                + b"Content-Encoding: gzip\r\nContent-Length: 30\r\n\r\n"
                + gzip.compress(b"{}" * 9)[:30].ljust(30),
            ),
            (400, 415),
        ),
        Raw(
            "a form",
            (
                start.replace(b"application/json", b"multipart/form-data; boundary=a")
                + length
                + b"\r\n"
                + body,
            ),
            (200, 400, 415),
        ),
        Raw(
            "UTF-16 by its type",
            (start.replace(b"application/json", b"text/plain; charset=utf-16") + length + b"\r\n" + body,),
            (200, 400, 415),
        ),
        Raw("a bare line feed", (start.replace(b"\r\n", b"\n") + length + b"\n" + body,), either, ends=True),
        Raw("a header without a colon", (get + b"nonsense\r\n\r\n",), refused),
        Raw("a header without a name", (get + b": a\r\n\r\n",), refused),
        Raw("a null byte in a header", (get + b"X-A: a\x00b\r\n\r\n",), refused),
        Raw("a folded header", (get + b"X-A: a\r\n b\r\n\r\n",), either),
        Raw("a blank in a name", (get + b"X A: a\r\n\r\n",), refused),
        Raw("bytes in a header", (get + b"X-A: \xff\xfe\xc3\x28\r\n\r\n",), either),
        Raw(
            "bytes in the id",
            (get + b"X-Request-Id: \xff\xfe" + b"a" * 5000 + b"\r\n\r\n",),
            (200, 400, None),
        ),
        Raw("a key of bytes", (get + b"Authorization: Bearer \xff\r\n\r\n",), (200, 401)),
        Raw(
            "a thousand headers",
            (get + b"".join(b"X-%d: a\r\n" % i for i in range(1000)) + b"\r\n",),
            (200, 400, 431, None),
        ),
        Raw(
            "a flood of headers",
            (get + b"".join(b"X-%d: a\r\n" % i for i in range(20_000)) + b"\r\n",),
            (200, 400, 431, None),
        ),
        Raw(
            "a header of a megabyte",
            (get + b"X-A: " + b"a" * 1_000_000 + b"\r\n\r\n",),
            (200, 400, 431, None),
        ),
        Raw("expects to go on", (start + length + b"Expect: 100-continue\r\n\r\n" + body,), (100, 200)),
        Raw("expects the moon", (start + length + b"Expect: the-moon\r\n\r\n" + body,), (200, 417)),
        Raw(
            "a web socket",
            (
                get.replace(b"close", b"Upgrade")
                + b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            ),
            (200, 400, 403, 404, 426),
        ),
        Raw(
            "h2c",
            (
                get.replace(b"close", b"Upgrade, HTTP2-Settings")
                + b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n",
            ),
            (200, 400, 426),
        ),
        Raw(
            "two at once",
            (
                (start + length + b"\r\n" + body).replace(b"Connection: close\r\n", b"")
                + start
                + length
                + b"\r\n"
                + body,
            ),
            (200, 200),
        ),
        Raw(
            "a good one and bytes",
            ((start + length + b"\r\n" + body).replace(b"Connection: close\r\n", b"") + b"\x00\xff\r\n\r\n",),
            (200, 400, None),
        ),
    ]
    for path, allowed in (
        (b"/../../etc/passwd", (404,)), (b"//etc/passwd", (404,)), (b"/v1/../health", (200, 404)), (b"/%00", (404,)),
        (b"/%ff%fe", (404,)), (b"/%2e%2e/%2e%2e", (404,)), (b"/v1/models?" + b"a=b&" * 5000, (200, 400, 414, 431)),
        (b"/" + b"a" * 1_000_000, (400, 404, 414, 431, None)), (b"http://example.invalid/health", (200, 400, 404)),
        (b"*", (400, 404)), (b"/health#a", (200, 400, 404)), (b"/\xff\xfe", (400, 404)), (b"/he alth", (400,)),
        (b"/v1/chat/completions/", (307, 404, 405)), (b"/openapi.json/../../x", (404,)),
    ):  # fmt: skip
        cases.append(Raw(f"path {path[:30]!r}", (get.replace(b"/health", path), b"\r\n"), allowed))
    for method in (b"GET", b"PUT", b"DELETE", b"PATCH", b"HEAD", b"OPTIONS", b"TRACE", b"PROPFIND"):
        cases.append(Raw(f"method {method!r}", (start.replace(b"POST", method) + b"\r\n",), (405,)))
    for method in (b"CONNECT", b"BREW", b"post", b"G" * 10_000, b"GE\x00T"):
        cases.append(
            Raw(
                f"method {method[:9]!r}",
                (start.replace(b"POST", method) + b"\r\n",),
                (400, 404, 405, 501, None),
            )
        )
    return cases


async def statuses_of(live: Live, case: Raw) -> list[int | None]:
    """The statuses that come back, and None at the end when the connection is left or cut with fewer than allowed."""
    connection = await Connection.open(live)
    found: list[int | None] = []
    num_expected = 2 if case.allowed in ((200, 200), (100, 200)) else 1
    try:
        for part in case.parts:
            await connection.send(part)
            if len(case.parts) > 2:
                await asyncio.sleep(0.002)
        if case.ends and connection.writer.can_write_eof():
            connection.writer.write_eof()
        while len(found) < num_expected:
            found.append(
                (
                    await asyncio.wait_for(connection.answer("HEAD" if "HEAD" in case.name else "POST"), 20)
                ).status
            )
    except (asyncio.IncompleteReadError, ConnectionError):
        found.append(None)
    finally:
        connection.close()
    return found


def test_what_is_wrong_as_http_is_refused_or_cut_and_the_next_request_is_right(live: Live) -> None:
    """Below the application, where uvicorn answers: smuggled requests, wrong lengths, floods, odd methods and paths."""

    async def attack() -> tuple[Campaign, dict[str, list[int | None]]]:
        campaign = await Campaign.begin(live)
        found = {}
        for case in raw_cases():
            try:
                found[case.name] = await statuses_of(live, case)
            except TimeoutError:
                campaign.wrong.append(f"{case.name}: no answer")
                continue
            if case.allowed in ((200, 200), (100, 200)):
                if found[case.name] != list(case.allowed):
                    campaign.wrong.append(f"{case.name}: {found[case.name]}")
            elif not set(found[case.name]) <= set(case.allowed):
                campaign.wrong.append(f"{case.name}: {found[case.name]}, allowed {case.allowed}")
            await campaign.stay_right()
        return campaign, found

    campaign, found = asyncio.run(attack())
    cut = [name for name, statuses in found.items() if None in statuses]
    print(f"cases={len(found)} {Counter(str(statuses) for statuses in found.values())} cut={cut}")
    assert not campaign.wrong, "\n".join(campaign.wrong)


def test_slow_and_silent_clients_keep_nobody_from_being_answered(live: Live) -> None:
    """A hundred that send a byte now and then, in headers or body, and two hundred that say nothing."""

    async def attack() -> float:
        campaign = await Campaign.begin(live)
        raw = request_bytes(live, "POST", CHAT_URL, json.dumps(GOOD[CHAT_URL]).encode())
        slow = [await Connection.open(live) for _ in range(100)]
        silent = [await Connection.open(live) for _ in range(200)]
        cuts = [random.Random(i).randrange(1, len(raw) - 40) for i in range(len(slow))]
        for connection, cut in zip(slow, cuts, strict=True):
            await connection.send(raw[:cut])
        took_s = []
        for i in range(20):
            for connection, cut in zip(slow, cuts, strict=True):
                await connection.send(raw[cut + i : cut + i + 1])
            started_s = time.monotonic()
            await campaign.stay_right()
            took_s.append(time.monotonic() - started_s)
        # Slow is not wrong: who gets to the end is answered.
        for connection, cut in zip(slow[:5], cuts[:5], strict=True):
            await connection.send(raw[cut + 20 :])
            assert text_of(await asyncio.wait_for(connection.answer(), 20)) == campaign.references[CHAT_URL]
        for connection in (*slow, *silent):
            connection.close()
        return max(took_s)

    print(f"slowest_good_s={asyncio.run(attack()):.2f}")
