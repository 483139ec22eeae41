"""Ten times what a server can do: who is not served is told so at once, and nothing stays behind.

The engine is slowed, so that one client process can ask for ten times its capacity.
"""

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import Live, ask, live_server, until_idle

CHAT_URL = "/v1/chat/completions"
NUM_TOKENS, NUM_ROWS, MAX_CONCURRENT = 8, 4, 16
STEP_S = 0.1
CAPACITY_PER_S = NUM_ROWS / (NUM_TOKENS * STEP_S)  # at the most; a busy machine has less
FACTOR = 10
LIMIT_S = 30  # after which a request hangs
BACK_S = 5
MEMORY_MIB = 20
FIELDS: dict[str, Any] = {
    "model": "medusa",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": NUM_TOKENS,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def live(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    args = {"max_batch_size": NUM_ROWS, "max_concurrent_requests": MAX_CONCURRENT, "max_total_tokens": 128}
    with live_server(tmp_path_factory.mktemp("overload"), STEP_S, base=str(tiny_base), **args) as server:
        yield server


async def latency_s(live: Live) -> float:
    """Of a request that is alone."""
    answer = await ask(live, "POST", CHAT_URL, FIELDS)
    assert answer.status == 200
    return answer.took_s


async def overload(live: Live, duration_s: float) -> dict[str, Any]:
    """Requests at ten times the capacity for so long, every other one a stream; what came of them."""
    normal_s = statistics.median([await latency_s(live) for _ in range(5)])
    await burst(live, 3)  # the first overload takes memory that stays
    before = await until_idle(live)
    started_s = time.monotonic()
    outcomes, took_s, sampling = (
        Counter(),
        {200: [], 429: []},
        asyncio.create_task(peak_mib(live, duration_s)),
    )
    for status, seconds in await burst(live, duration_s):
        outcomes[status] += 1
        took_s.setdefault(status, []).append(seconds)
    ended_s = time.monotonic()
    while (back_s := await latency_s(live)) > 1.5 * normal_s + 0.1:
        assert time.monotonic() - ended_s < 2 * BACK_S, (back_s, normal_s)
    after = await until_idle(live)
    return {
        "requests": sum(outcomes.values()),
        "outcomes": dict(outcomes),
        "seconds": round(ended_s - started_s, 1),
        "per_s_of_capacity": round(sum(outcomes.values()) / duration_s / CAPACITY_PER_S, 2),
        "served_of_capacity": round(outcomes[200] / (ended_s - started_s) / CAPACITY_PER_S, 2),
        "slowest_200_s": max(took_s[200]),
        "slowest_429_s": max(took_s[429]),
        "median_429_s": statistics.median(took_s[429]),
        "normal_s": normal_s,
        "back_after_s": time.monotonic() - ended_s,
        "grown_mib": after["rss_mib"] - before["rss_mib"],
        "peak_grown_mib": await sampling - before["rss_mib"],
        "left": (
            after["num_free_pages"] - before["num_free_pages"],
            after["num_files"] - before["num_files"],
        ),
    }


async def burst(live: Live, duration_s: float) -> list[tuple[Any, float]]:
    """Status and time of each request of an open loop: they come whether or not others have been answered."""

    async def one(stream: bool) -> tuple[Any, float]:
        started_s = time.monotonic()
        try:
            answer = await asyncio.wait_for(
                ask(live, "POST", CHAT_URL, {**FIELDS, "stream": stream}), LIMIT_S
            )
        except TimeoutError:
            return "hung", LIMIT_S
        except (OSError, asyncio.IncompleteReadError) as error:
            return type(error).__name__, time.monotonic() - started_s
        status: Any = answer.status
        if status == 429 and int(answer.headers.get("retry-after", "0")) < 1:
            status = "429 without Retry-After"
        if status == 200 and not whole(answer.body, stream):
            status = "200 that is cut"
        return status, answer.took_s

    tasks, period_s = [], 1 / (FACTOR * CAPACITY_PER_S)
    started_s = time.monotonic()
    while (at_s := len(tasks) * period_s) < duration_s:
        await asyncio.sleep(max(started_s + at_s - time.monotonic(), 0))
        tasks.append(asyncio.create_task(one(stream=len(tasks) % 2 == 0)))
    return list(await asyncio.gather(*tasks))


def whole(body: bytes, stream: bool) -> bool:
    if stream:
        return body.endswith(b"data: [DONE]\n\n") and b'"finish_reason":"length"' in body
    return json.loads(body)["usage"]["completion_tokens"] == NUM_TOKENS


async def peak_mib(live: Live, duration_s: float) -> float:
    ends_s, peak = time.monotonic() + duration_s, 0.0
    while time.monotonic() < ends_s:
        peak = max(peak, (await live.watched_async())["rss_mib"])
        await asyncio.sleep(0.5)
    return peak


def check(result: dict[str, Any]) -> None:
    print(result)
    assert set(result["outcomes"]) == {200, 429}
    assert result["per_s_of_capacity"] >= FACTOR - 0.5
    assert result["back_after_s"] <= BACK_S
    assert result["peak_grown_mib"] <= MEMORY_MIB
    assert result["grown_mib"] <= MEMORY_MIB
    assert result["left"][0] == 0


def test_ten_times_the_capacity_is_served_or_told_to_come_back(live: Live) -> None:
    """A queue without an end would answer everybody, too late for anybody."""
    check(asyncio.run(overload(live, 8)))


@pytest.mark.nightly
def test_a_minute_of_ten_times_the_capacity_leaves_nothing_behind(live: Live) -> None:
    check(asyncio.run(overload(live, 60)))
