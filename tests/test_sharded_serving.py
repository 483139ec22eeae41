"""A base over two processes, behind Ray Serve."""

import signal
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray.serve
import torch
from fastapi.testclient import TestClient

from medusa_ray import config, serve
from medusa_ray.config import EngineConfig, ServeConfig, UserError
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.serve import Server, build_api

COMPLETION_URL = "/v1/completions"


@pytest.mark.ray
@pytest.mark.timeout(600)  # two starts of two processes each
def test_a_replica_of_two_shards_answers_as_one_process_does_and_is_replaced_when_a_shard_dies(
    ray_cluster: None, tiny_base: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    heads = MedusaHeads(3, 1, hidden_size=32, vocab_size=262, layout="shared")
    heads.save(tmp_path, str(tiny_base))
    args = {
        "model_id": "m",
        "base": str(tiny_base),
        "heads": str(tmp_path),
        "dtype": "float32",
        "device": "cpu",
    }
    args |= {"compile": "no", "threads": 1, "max_total_tokens": 256}
    asked = [
        {"model": "m", "prompt": f"SELECT {i}", "temperature": i % 2, "seed": 1, "max_tokens": 30}
        for i in range(6)
    ]
    alone = TestClient(build_api(Server.load(EngineConfig(**args))))
    texts = [alone.post(COMPLETION_URL, json=body).json()["choices"][0]["text"] for body in asked]

    app = {"name": "m", "args": {**args, "tensor_parallel": 2}}
    raw = {"http_options": {"port": serve.free_port()}, "applications": [app]}
    url = serve.deploy(config.parse(ServeConfig, raw, "x.yaml"))["m"]
    try:
        assert answers(url, asked) == texts
        assert httpx.get(f"{url}/info", timeout=60).json()["tensor_parallel"] == 2
        (follower,) = followers()
        follower.send_signal(signal.SIGKILL)
        deadline_s = time.monotonic() + 20
        while (
            httpx.get(f"{url}/health", timeout=60).status_code == 200
        ):  # of an engine that has nothing to do
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        serve.wait_for_route(f"{url}/health", time.monotonic() + 180)
        assert answers(url, asked) == texts
    finally:
        serve.shutdown()
        ray.serve.shutdown()
    deadline_s = time.monotonic() + 20
    while followers():
        assert time.monotonic() < deadline_s, "a follower has outlived its leader"
        time.sleep(0.1)


def answers(url: str, asked: list[dict[str, Any]]) -> list[str]:
    replies = [httpx.post(f"{url}{COMPLETION_URL}", json=body, timeout=60) for body in asked]
    return [reply.json()["choices"][0]["text"] for reply in replies]


def followers() -> list[psutil.Process]:
    """Those of this user's that this test's cluster runs."""
    mine = psutil.Process().children(recursive=True)
    return [
        process
        for process in mine
        if process.is_running() and "Follower.follow" in " ".join(cmdline(process))
    ]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def test_shards_without_a_place_of_their_own_are_refused() -> None:
    override: dict[str, Any] = {"name": "Engine", "placement_group_bundles": [{"CPU": 1}]}
    app = {
        "name": "m",
        "args": {"model_id": "m", "base": "b", "tensor_parallel": 2},
        "deployments": [override],
    }
    with pytest.raises(
        UserError, match="tensor_parallel 2, but 1 placement_group_bundles; give one for each shard"
    ):
        config.parse(ServeConfig, {"applications": [app]}, "x.yaml")
    override["placement_group_bundles"] = [{"CPU": 1, "accelerator_type:L4": 0.001}] * 2
    config.parse(ServeConfig, {"applications": [app]}, "x.yaml")
    override["ray_actor_options"] = {"accelerator_type": "L4"}
    with pytest.raises(UserError, match=r"first shard alone, .* Name them in placement_group_bundles"):
        config.parse(ServeConfig, {"applications": [app]}, "x.yaml")
