"""Clients that hang up and requests that are no HTTP, once more through Ray Serve's proxy."""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray.serve
from live_server import Connection, Live, ask, request_bytes
from test_hostile import CHAT_URL, COMPLETION_URL, GOOD, raw_cases, statuses_of, text_of

from medusa_ray import config, serve
from medusa_ray.config import ServeConfig

pytestmark = pytest.mark.ray
NUM_CLIENTS = 40
FREED_S = 0.5
POLL_S = 0.02
APP = "/app"


@pytest.fixture(scope="module")
def live(ray_cluster: None, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    args = {
        "model_id": "medusa",
        "base": str(tiny_base),
        "compile": "no",
        "dtype": "float32",
        "max_total_tokens": 512,
    }
    file = {"applications": [{"name": "app", "route_prefix": APP, "args": args}]}
    file["http_options"] = {"port": serve.free_port()}
    serve.deploy(config.parse(ServeConfig, file, "clients.yaml"))
    yield Live(file["http_options"]["port"], tmp_path_factory.mktemp("clients") / "none", APP)
    serve.shutdown()
    ray.serve.shutdown()


async def num_open(live: Live) -> float:
    lines = (await ask(live, "GET", "/metrics")).body.decode().splitlines()
    names = ("medusa_ray_num_requests_running{", "medusa_ray_num_requests_waiting{")
    return sum(float(line.split()[-1]) for line in lines if line.startswith(names))


async def hang_up(live: Live, i: int) -> float:
    """Leaves in the middle of a reply, streamed or not; returns how long the engine then still was at it."""
    rng = random.Random(i)
    fields = {**GOOD[COMPLETION_URL], "max_tokens": 480, "ignore_eos": True, "stream": i % 2 == 0}
    connection = await Connection.open(live)
    await connection.send(request_bytes(live, "POST", COMPLETION_URL, json.dumps(fields).encode()))
    if fields["stream"]:
        await connection.head()
        for _ in range(rng.randrange(1, 5)):
            await connection.chunk()
    else:
        await asyncio.sleep(rng.uniform(0.05, 0.3))
    closed_s = time.monotonic()
    connection.close(abruptly=rng.random() < 0.5)
    while await num_open(live):
        assert time.monotonic() - closed_s < 20
        await asyncio.sleep(POLL_S)
    return time.monotonic() - closed_s


def test_a_client_that_hangs_up_on_the_proxy_leaves_nothing(live: Live) -> None:
    async def leave() -> list[float]:
        return [await hang_up(live, i) for i in range(NUM_CLIENTS)]

    left_s = asyncio.run(leave())
    print(
        f"clients={NUM_CLIENTS} median_s={statistics.median(left_s):.3f} max_s={max(left_s):.3f}, polls included"
    )
    assert statistics.median(left_s) <= FREED_S


def test_what_is_no_http_gets_no_5xx_of_the_proxy_and_the_next_request_is_right(live: Live) -> None:
    """The proxy answers routes of its own, so that statuses differ from the application's; none may be a failure.

    But one: Ray 2.60's proxy reads an x-request-id as UTF-8, and fails where it is none, before it asks us.
    """

    async def attack() -> dict[str, list[int | None]]:
        reference = text_of(await ask(live, "POST", CHAT_URL, GOOD[CHAT_URL]))
        found = {}
        for case in raw_cases(APP):
            found[case.name] = await statuses_of(live, case)
            assert text_of(await ask(live, "POST", CHAT_URL, GOOD[CHAT_URL])) == reference
        return found

    found = asyncio.run(attack())
    print(f"cases={len(found)} {sorted({status or 0 for statuses in found.values() for status in statuses})}")
    assert found.pop("bytes in the id") == [500]
    assert not {name: statuses for name, statuses in found.items() if any((s or 0) >= 500 for s in statuses)}
