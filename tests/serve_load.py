"""Load on an OpenAI server while things die under it: what each client got, and was it whole."""

import asyncio
import collections
import json
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

PROMPTS = [f"{n} SELECT name FROM t WHERE x = {n * 7}" for n in range(24)]


@dataclass
class Outcome:
    """What came of one request."""

    prompt: str
    stream: bool
    status: int | None = None  # none came
    text: str = ""
    num_events: int = 0
    finish_reason: str | None = None
    is_done: bool = False  # `data: [DONE]` came
    error: str | None = None  # an error event's message, an error body's, or what the connection died of
    has_error_event: bool = False

    @property
    def looks_whole(self) -> bool:
        return self.is_done or self.finish_reason is not None

    @property
    def has_begun(self) -> bool:
        return self.stream and self.num_events > 0

    def take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.has_error_event, self.error = True, event["error"]["message"]
            return
        self.num_events += 1
        for choice in event["choices"]:
            self.text += choice["text"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason


def body_of(model: str, prompt: str, max_tokens: int, **fields: Any) -> dict[str, Any]:
    fixed = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return fixed | fields


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Outcome:
    """One request, without a retry."""
    outcome = Outcome(body["prompt"], bool(body.get("stream")))
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            outcome.status = response.status_code
            if not outcome.stream or response.status_code != 200:
                raw = await response.aread()
                if response.status_code == 200:
                    outcome.take(json.loads(raw))
                else:
                    outcome.error = raw.decode(errors="replace")[:300]
                return outcome
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    outcome.is_done = True
                elif line.startswith("data: "):
                    outcome.take(json.loads(line.removeprefix("data: ")))
    except httpx.HTTPError as error:
        outcome.error = repr(error)
    return outcome


@dataclass
class Load:
    """Clients that ask again as soon as they have their answer, half of them for streams."""

    url: str
    model: str
    max_tokens: int
    outcomes: list[Outcome] = field(default_factory=list)
    ends: bool = False

    async def client(self, seed: int, http: httpx.AsyncClient) -> None:
        numbers = random.Random(seed)
        while not self.ends:
            body = body_of(self.model, numbers.choice(PROMPTS), self.max_tokens, stream=seed % 2 == 0)
            self.outcomes.append(await ask(http, self.url, body))

    def counts(self) -> dict[str, int]:
        """How many ended how."""
        return dict(collections.Counter(kind_of(outcome) for outcome in self.outcomes))


def kind_of(outcome: Outcome) -> str:
    kind = "stream" if outcome.stream else "whole"
    if outcome.looks_whole:
        return f"{kind} answered"
    if outcome.has_begun:
        return f"{kind} broken with an error event" if outcome.has_error_event else f"{kind} cut"
    return f"{kind} failed with {outcome.status}"


@asynccontextmanager
async def load_on(url: str, model: str, num_clients: int, max_tokens: int) -> AsyncIterator[Load]:
    """Load as long as the body runs; each client ends with the answer that it waits for."""
    load = Load(url, model, max_tokens)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=120, limits=limits) as http:
        clients = [asyncio.create_task(load.client(seed, http)) for seed in range(num_clients)]
        try:
            yield load
        finally:
            load.ends = True
            await asyncio.gather(*clients)


async def texts_of(url: str, model: str, max_tokens: int) -> dict[str, str]:
    """The greedy text of each prompt while nobody disturbs."""
    async with httpx.AsyncClient(timeout=120) as http:
        outcomes = [await ask(http, url, body_of(model, prompt, max_tokens)) for prompt in PROMPTS]
    assert all(outcome.looks_whole for outcome in outcomes), outcomes
    return {outcome.prompt: outcome.text for outcome in outcomes}


def replicas_of(deployment: str) -> list[psutil.Process]:
    """Processes that this one's Ray has started as its replicas, those that are still starting among them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            # The method that it is in, if any, is behind the name.
            title = re.compile(rf"ray::\S*ServeReplica:\w+:{deployment}(\.\w+)?")
            if process.status() != psutil.STATUS_ZOMBIE and title.fullmatch(process.cmdline()[0]):
                found.append(process)
        except (psutil.NoSuchProcess, IndexError):
            continue
    return found


async def until(is_so: Callable[[], bool], limit_s: float) -> float:
    """Seconds until it is so. Raises AssertionError when it is not in time."""
    began_s = time.monotonic()
    while not await asyncio.to_thread(is_so):
        assert time.monotonic() - began_s < limit_s, f"not within {limit_s} s"
        await asyncio.sleep(0.1)
    return time.monotonic() - began_s
