"""Serving while replicas and nodes die, versions change and load comes and goes: what the clients notice of it.

    pytest -m nightly tests/test_serve_campaign.py -s

takes half an hour on two quiet cores, and prints what it measured.
"""

import asyncio
import collections
import multiprocessing
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
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


ON_THE_HEAD = {"num_cpus": 0, "resources": {"head": 0.01}}


def file_of(shape: str, args: dict[str, Any], port: int, **engine: Any) -> ServeConfig:
    """A serve file with one application at the root; engine: what `deployments` says of its engine."""
    app: dict[str, Any] = {"name": "app", "args": args, "deployments": [{"name": "Engine", **engine}]}
    if shape == "resilient":
        app |= {"import_path": "medusa_ray.serve:build_resilient_app", "args": {"models": [args]}}
        is_in_nodes = "head" in ray.cluster_resources()
        router = {"name": "Router", "ray_actor_options": ON_THE_HEAD if is_in_nodes else {"num_cpus": 0.5}}
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
        self.ends = False
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
        await until(lambda: states_of(deployment) != {"RUNNING": 2}, 120)
        await until(lambda: states_of(deployment) == {"RUNNING": 2}, 600)
        log.append(time.monotonic() - began_s)
        newest = max(replicas_of(deployment), key=lambda replica: replica.create_time())
        computed_s = sum(newest.cpu_times()[:2])
        print(
            f"healthy again after {log[-1]:.1f} s, of {computed_s:.1f} s of CPU for the new replica",
            flush=True,
        )


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
    median_s = sorted(healthy_after_s)[NUM_KILLS // 2]
    print(f"{shape}: healthy again after {median_s:.1f} s, {max(healthy_after_s):.1f} at most")
    errors = collections.Counter(outcome.error for outcome in load.outcomes if not outcome.looks_whole)
    print(errors.most_common(6))
    assert not asker.failures
    if shape == "resilient":
        kinds = {"stream answered", "whole answered", "stream broken with an error event"}
        assert set(load.counts()) <= kinds


@pytest.mark.parametrize("shape", ["resilient", "fast"])
def test_a_new_version_under_load_fails_no_request(
    ray_cluster: None, medusa: dict[str, Any], shape: str
) -> None:
    """Streams that run when their replica is told to go come to their end."""
    num_tokens = 200

    async def scenario(url: str, port: int) -> Load:
        texts = await texts_of(url, "medusa", num_tokens)
        async with load_on(url, "medusa", 8, num_tokens) as load:
            await asyncio.sleep(2)
            began_s = time.monotonic()
            newer = file_of(shape, {**medusa, "max_concurrent_requests": 100}, port, num_replicas=2)
            await asyncio.to_thread(serve.deploy, newer, 600)
            print(f"{shape}: the new version took {time.monotonic() - began_s:.1f} s", flush=True)
            while len(load.outcomes) < 300:
                await asyncio.sleep(1)
        check(load.outcomes, texts)
        return load

    port = serve.free_port()
    with deployed(file_of(shape, medusa, port, num_replicas=2)) as url:
        load = asyncio.run(scenario(url, port))
        assert httpx.get(f"{url}/info", timeout=60).json()["max_concurrent_requests"] == 100
    print(f"{shape}: a new version; {load.counts()}")
    assert load.counts().keys() == {"stream answered", "whole answered"}


@pytest.mark.parametrize(("shape", "by"), [("fast", "requests"), ("resilient", "tokens")])
def test_replicas_come_and_go_with_the_load(
    ray_cluster: None, medusa: dict[str, Any], shape: str, by: str
) -> None:
    """One, three under a step of load, one again, and no request fails."""
    scaling: dict[str, Any] = {
        "min_replicas": 1,
        "max_replicas": 3,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 3,
        "look_back_period_s": 2,
        "metrics_interval_s": 0.5,
    }
    if by == "tokens":
        policy = "medusa_ray.serve.scaling:ByWaitingTokens"
        scaling["policy"] = {"policy_function": policy, "policy_kwargs": {"target_waiting_tokens": 400}}
    deployment = "medusa" if shape == "resilient" else "Engine"

    async def scenario(url: str) -> list[Load]:
        texts = await texts_of(url, "medusa", 200)
        await until(lambda: states_of(deployment) == {"RUNNING": 1}, 120)
        async with load_on(url, "medusa", 10, 200) as step:
            up_s = await until(lambda: states_of(deployment) == {"RUNNING": 3}, 600)
            await asyncio.sleep(5)
        async with load_on(url, "medusa", 1, 20) as trickle:
            down_s = await until(lambda: states_of(deployment) == {"RUNNING": 1}, 600)
        print(f"{shape} by {by}: 3 replicas after {up_s:.1f} s, 1 after {down_s:.1f} s more", flush=True)
        check(step.outcomes, texts)
        return [step, trickle]

    with deployed(file_of(shape, medusa, serve.free_port(), autoscaling_config=scaling)) as url:
        loads = asyncio.run(scenario(url))
    for load in loads:
        print(f"{shape} by {by}: {load.counts()}")
        assert load.counts().keys() <= {"stream answered", "whole answered"}


@pytest.mark.parametrize("shape", ["resilient", "fast"])
def test_a_node_that_is_lost_is_as_a_replica_that_is(medusa: dict[str, Any], shape: str) -> None:
    """A process of its own, since this one's Ray has one node."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        counts, failures = pool.submit(lose_node, shape, medusa).result()
    assert not failures
    if shape == "resilient":
        assert counts.keys() <= {"stream answered", "whole answered", "stream broken with an error event"}


def lose_node(shape: str, medusa: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Two nodes with a replica each; the one without a proxy is killed under load, and another one joins later."""
    from ray.cluster_utils import Cluster

    # Room for one replica on each.
    head = {"num_cpus": 1, "resources": {"head": 1}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    deployment = "medusa" if shape == "resilient" else "Engine"

    async def scenario(url: str) -> tuple[Load, Asker]:
        texts = await texts_of(url, "medusa", NUM_TOKENS)
        async with load_on(url, "medusa", 6, NUM_TOKENS) as load:
            asker = Asker(url)
            askers = [asyncio.create_task(asker.ask_on(seed)) for seed in range(4)]
            await asyncio.sleep(3)
            victim = next(iter(cluster.worker_nodes))
            began_s = time.monotonic()
            await asyncio.to_thread(cluster.remove_node, victim, allow_graceful=False)
            await until(lambda: states_of(deployment).get("RUNNING") == 1, 300)
            print(
                f"{shape}: the loss of a node was noticed after {time.monotonic() - began_s:.1f} s",
                flush=True,
            )
            cluster.add_node(num_cpus=1)  # in this thread, since it sets a signal's handler; clients wait meanwhile
            await until(lambda: states_of(deployment) == {"RUNNING": 2}, 600)
            print(f"{shape}: healthy again after {time.monotonic() - began_s:.1f} s", flush=True)
            await asyncio.sleep(3)
            asker.ends = True
            await asyncio.gather(*askers)
        check(load.outcomes, texts)
        return load, asker

    try:
        url = serve.deploy(file_of(shape, medusa, serve.free_port(), num_replicas=2), timeout_s=600)["app"]
        load, asker = asyncio.run(scenario(url))
        print(f"{shape}: a node lost; {load.counts()}; openai: {len(asker.texts)} answered, {asker.failures}")
        return load.counts(), asker.failures
    finally:
        ray.shutdown()
        cluster.shutdown()
