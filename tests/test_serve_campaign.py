"""Serving while replicas and nodes die, versions change and load comes and goes: what the clients notice of it.

    pytest -m nightly tests/test_serve_campaign.py -s

takes half an hour on two quiet cores, and prints what it measured.
"""

import asyncio
import collections
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
from serve_load import (
    PROMPTS,
    Load,
    Outcome,
    body_of,
    load_on,
    replicas_of,
    texts_of,
    until,
)

from medusa_ray import config, serve
from medusa_ray.config import ServeConfig
from medusa_ray.medusa.heads import MedusaHeads

pytestmark = [pytest.mark.nightly, pytest.mark.ray, pytest.mark.timeout(3600)]
ENGINE = {
    "compile": "no",
    "dtype": "float32",
    "device": "cpu",
    "max_batch_size": 8,
    "max_total_tokens": 512,
    "threads": 1,
}
NUM_TOKENS = 120
NUM_KILLS = 20


@pytest.fixture(scope="module")
def medusa(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Args of an engine with heads."""
    heads = tmp_path_factory.mktemp("heads")
    MedusaHeads(num_heads=3, num_layers=1, hidden_size=32, vocab_size=262).save(heads, str(tiny_base))
    return {**ENGINE, "model_id": "medusa", "base": str(tiny_base), "heads": str(heads)}


def file_of(shape: str, args: dict[str, Any], port: int, **engine: Any) -> ServeConfig:
    """A serve file with one application at the root; engine: what `deployments` says of its engine."""
    app: dict[str, Any] = {"name": "app", "args": args, "deployments": [{"name": "Engine", **engine}]}
    if shape == "resilient":
        app |= {"import_path": "medusa_ray.serve:build_resilient_app", "args": {"models": [args]}}
        router = {"name": "Router", "ray_actor_options": {"num_cpus": 0.5}}
        app["deployments"] = [router, {"name": "medusa", **engine}]
    raw = {"http_options": {"port": port}, "applications": [app]}
    return config.parse(ServeConfig, raw, "x.yaml")


@contextmanager
def deployed(file: ServeConfig) -> Iterator[str]:
    try:
        yield serve.deploy(file, timeout_s=600)["app"]
    finally:
        serve.shutdown()
        ray.serve.shutdown()


def states_of(deployment: str) -> dict[str, int]:
    """Replicas by state."""
    overview = ray.serve.status().applications["app"].deployments[deployment]
    return {
        state.value if hasattr(state, "value") else state: n
        for state, n in overview.replica_states.items()
        if n
    }


class Asker:
    """The official client, as it comes: it asks again up to twice."""

    def __init__(self, url: str) -> None:
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
        self.num_answered, self.ends = 0, False
        self.failures: list[str] = []
        self.texts: list[tuple[str, str]] = []

    async def ask_on(self, seed: int) -> None:
        numbers = random.Random(seed)
        while not self.ends:
            prompt = numbers.choice(PROMPTS)
            body = body_of("medusa", prompt, NUM_TOKENS)
            ignore_eos = {"ignore_eos": body.pop("ignore_eos")}
            try:
                reply = await self.client.completions.create(**body, extra_body=ignore_eos)
                self.texts.append((prompt, reply.choices[0].text))
            except openai.OpenAIError as error:
                self.failures.append(repr(error))


def check(outcomes: list[Outcome], texts: dict[str, str]) -> None:
    """No answer looks whole that is not, and none is another one."""
    for outcome in outcomes:
        if outcome.looks_whole:
            assert outcome.text == texts[outcome.prompt]
            assert outcome.is_done or not outcome.stream
        else:
            assert texts[outcome.prompt].startswith(outcome.text)


async def kill_on_and_on(deployment: str, num_kills: int, log: list[float]) -> None:
    """SIGKILL to one of the replicas, as soon as all are well again; log: seconds until they were."""
    numbers = random.Random(1)
    for _ in range(num_kills):
        await asyncio.sleep(numbers.uniform(0.5, 3))
        victim = numbers.choice(await asyncio.to_thread(replicas_of, deployment))
        victim.kill()
        began_s = time.monotonic()
        # First it has to be noticed.
        await until(lambda: states_of(deployment) != {"RUNNING": 2}, 60)
        await until(lambda: states_of(deployment) == {"RUNNING": 2}, 240)
        log.append(time.monotonic() - began_s)
        print(f"healthy again after {log[-1]:.1f} s", flush=True)


@pytest.mark.parametrize("shape", ["resilient", "fast"])
def test_twenty_kills(ray_cluster: None, medusa: dict[str, Any], shape: str) -> None:
    """Of one of two replicas, under load. In the resilient shape whoever had not begun to read gets an answer, and a
    broken stream says so; in the fast one the official client, asking again as it does, gets them all."""
    deployment = "medusa" if shape == "resilient" else "Engine"

    async def scenario(url: str) -> tuple[Load, Asker, list[float]]:
        texts = await texts_of(url, "medusa", NUM_TOKENS)
        healthy_after_s: list[float] = []
        async with load_on(url, "medusa", 6, NUM_TOKENS) as load:
            asker = Asker(url)
            askers = [asyncio.create_task(asker.ask_on(seed)) for seed in range(4)]
            await kill_on_and_on(deployment, NUM_KILLS, healthy_after_s)
            while len(asker.texts) < 1000:
                await asyncio.sleep(1)
            asker.ends = True
            await asyncio.gather(*askers)
        check(load.outcomes, texts)
        assert all(text == texts[prompt] for prompt, text in asker.texts)
        return load, asker, healthy_after_s

    with deployed(file_of(shape, medusa, serve.free_port(), num_replicas=2)) as url:
        load, asker, healthy_after_s = asyncio.run(scenario(url))
    print(f"{shape}: {NUM_KILLS} kills; {load.counts()}")
    print(f"{shape}: openai client: {len(asker.texts)} answered, {len(asker.failures)} failed")
    print(
        f"{shape}: healthy again after {sorted(healthy_after_s)[NUM_KILLS // 2]:.1f} s, {max(healthy_after_s):.1f} at most"
    )
    errors = collections.Counter(outcome.error for outcome in load.outcomes if not outcome.looks_whole)
    print(errors.most_common(6))
    assert not asker.failures
    if shape == "resilient":
        kinds = {"stream answered", "whole answered", "stream broken with an error event"}
        assert set(load.counts()) <= kinds
