"""Clients that hang up at random moments: what they had is free at once, and nobody else notices.

A slot that stays taken is a server that gets slower with every impatient client, until it is restarted.
"""

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import WATCH_ID, Connection, Live, ask, live_server, request_bytes, until_idle

from medusa_ray.medusa.heads import MedusaHeads

CHAT_URL, COMPLETION_URL = "/v1/chat/completions", "/v1/completions"
NUM_CLIENTS = 14  # at a time, of whom six find no row and wait
NUM_WITNESSES = 3
MOMENTS = ("body", "at once", "soon", "mid-stream", "last event")
FREED_STEPS, FREED_S = 2, 0.5
MEMORY_MIB = 20


@pytest.fixture(scope="module")
def live(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("disconnects")
    MedusaHeads(num_heads=3, num_layers=1, hidden_size=32, vocab_size=262).save(
        folder / "heads", str(tiny_base)
    )
    args = {
        "base": str(tiny_base),
        "heads": str(folder / "heads"),
        "max_batch_size": 8,
        "max_total_tokens": 512,
    }
    with live_server(folder, **args) as server:
        yield server


def random_request(rng: random.Random) -> dict[str, Any]:
    """Short and long prompts with random beginnings, so that prefills take from one page to seven."""
    prompt = [1, *(rng.randrange(6, 262) for _ in range(rng.choice([5, 60, 200, 400])))]
    return {"model": "medusa", "prompt": prompt, "max_tokens": 100, "temperature": 0, "ignore_eos": True}


async def hang_up(live: Live, watch_id: str, moment: str, stream: bool, rng: random.Random) -> float:
    """Sends a request and leaves at the moment named; returns when."""
    body = json.dumps({**random_request(rng), "stream": stream}).encode()
    raw = request_bytes(live, "POST", COMPLETION_URL, body, **{WATCH_ID: watch_id})
    connection = await Connection.open(live)
    if moment == "body":
        raw = raw[: len(raw) - rng.randrange(1, len(body))]
    await connection.send(raw)
    if moment == "soon" or (not stream and moment not in ("body", "at once")):
        await asyncio.sleep(rng.uniform(0, 0.3))
    elif moment in ("mid-stream", "last event"):
        assert (await connection.head()).status == 200
        num_events = rng.randrange(1, 40) if moment == "mid-stream" else 1000
        for _ in range(num_events):
            if b"[DONE]" in await connection.chunk():
                break
    closed_s = time.monotonic()
    connection.close(abruptly=rng.random() < 0.5)
    return closed_s


async def witness(live: Live, expected: list[tuple[dict[str, Any], str]], done: asyncio.Event) -> int:
    """Asks the same over and over, streaming, until told that all have left; returns how often."""
    num_asked = 0
    while not done.is_set():
        fields, text = expected[num_asked % len(expected)]
        answer = await ask(live, "POST", COMPLETION_URL, {**fields, "stream": True})
        events = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n")]
        assert events[-2:] == ["[DONE]", ""]
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-2]) == text
        num_asked += 1
    return num_asked


async def references(live: Live, rng: random.Random) -> list[tuple[dict[str, Any], str]]:
    """Requests, and what is answered while nobody else asks."""
    asked = [random_request(rng) for _ in range(6)]
    answers = [await ask(live, "POST", COMPLETION_URL, fields) for fields in asked]
    return [(f, a.json()["choices"][0]["text"]) for f, a in zip(asked, answers, strict=True)]


async def disconnect(live: Live, num: int, seed: int) -> dict[str, Any]:
    """That many clients hang up while witnesses look on; asserts what must hold and returns the figures."""
    rng = random.Random(seed)
    expected = await references(live, rng)
    before = await until_idle(live)
    done, closed = asyncio.Event(), {}
    traces: dict[str, Any] = {}
    left = iter(range(num))

    async def client() -> None:
        for i in left:
            own = random.Random(seed * 1_000_003 + i)
            watch_id = f"{MOMENTS[i % len(MOMENTS)]}/{'stream' if own.random() < 0.6 else 'whole'}/{seed}.{i}"
            moment, kind, _ = watch_id.split("/")
            closed[watch_id] = await hang_up(live, watch_id, moment, kind == "stream", own)

    witnesses = [asyncio.create_task(witness(live, expected, done)) for _ in range(NUM_WITNESSES)]
    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
    done.set()
    num_witnessed = sum(await asyncio.gather(*witnesses))
    after = await until_idle(live)
    traces |= after["traces"]
    assert after["num_free_pages"] == before["num_free_pages"]
    assert after["failure"] is None
    return {
        "figures": figures(closed, traces),
        "witnessed": num_witnessed,
        "grown_mib": after["rss_mib"] - before["rss_mib"],
        "tasks": after["num_tasks"] - before["num_tasks"],
        "files": after["num_files"] - before["num_files"],
    }


def figures(closed: dict[str, float], traces: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of those that left while the engine was at their request: how long it held what they had.

    In steps from when the engine was told and from when the server was, and in seconds from when they left.
    """
    told, heard, left_s, seen = [], [], [], Counter()
    for watch_id, closed_s in closed.items():
        moment, kind, _ = watch_id.split("/")
        trace = traces.get(watch_id, {})
        assert moment != "body" or "added_s" not in trace, (watch_id, trace)
        if "added_s" not in trace:
            seen[f"{moment}/{kind}: never begun"] += 1
        elif trace["freed_s"] <= closed_s:
            seen[f"{moment}/{kind}: ended before"] += 1
        else:
            seen[f"{moment}/{kind}: cut"] += 1
            freed = trace["freed_step"]
            # One whose end was on its way already was freed before anybody was told.
            told.append(max(freed - trace.get("cancelled_step", freed), 0))
            heard.append(max(freed - trace.get("heard_step", freed), 0))
            left_s.append(trace["freed_s"] - closed_s)
    return {
        "steps": max(told),
        "steps_from_http": dict(sorted(Counter(heard).items())),
        "left_s": max(left_s),
        "median_left_s": statistics.median(left_s),
        "seen": dict(seen),
    }


def check(result: dict[str, Any]) -> None:
    print(result)
    assert result["figures"]["steps"] <= FREED_STEPS
    assert result["figures"]["left_s"] <= FREED_S
    assert result["grown_mib"] <= MEMORY_MIB
    assert result["tasks"] <= 0


def test_clients_that_hang_up_leave_nothing_and_disturb_nobody(live: Live) -> None:
    """At moments of all kinds, from half a body to the last event, streaming or not."""
    asyncio.run(disconnect(live, 30, seed=1))  # the first requests take memory that stays
    check(asyncio.run(disconnect(live, 120, seed=2)))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_thousand_clients_that_hang_up_leave_nothing_and_disturb_nobody(live: Live) -> None:
    asyncio.run(disconnect(live, 100, seed=3))
    check(asyncio.run(disconnect(live, 1000, seed=4)))
