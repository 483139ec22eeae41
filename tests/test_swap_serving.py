"""`user_config` of a serve file: other heads for the replicas that run. Without Ray first, then under load."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ray.serve
import torch
from fastapi.testclient import TestClient
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from medusa_ray import config, serve
from medusa_ray.config import EngineConfig, ServeConfig, UserError
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.serve import Server, build_api
from medusa_ray.serve.app import Replica
from medusa_ray.serve.cluster import application

COMPLETION_URL = "/v1/completions"
ENGINE: dict[str, Any] = {"model_id": "m", "dtype": "float32", "device": "cpu", "compile": "no", "threads": 1}


@pytest.fixture(scope="module")
def heads(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of heads: two of this base, and one of another."""
    folders = {}
    for name, num_heads, hidden_size in (("first", 3, 32), ("second", 2, 32), ("foreign", 3, 16)):
        folders[name] = str(tmp_path_factory.mktemp(name))
        torch.manual_seed(num_heads)
        made = MedusaHeads(num_heads, 1, hidden_size=hidden_size, vocab_size=262)
        made.save(folders[name], str(tiny_base))
    return folders


# ------------------------------------------------------------------------------------------- without Ray


def replica_of(base: Path, **args: Any) -> Any:
    """A replica as Ray Serve makes it, but without its threads."""
    server = Server.load(EngineConfig(base=str(base), **ENGINE, **args))
    return SimpleNamespace(server=server, has_started=False)


def reconfigure(replica: Any, user_config: dict[str, Any] | None) -> None:
    asyncio.run(Replica.reconfigure(replica, user_config, rank=0))  # type: ignore[attr-defined]


def test_a_replica_serves_what_user_config_says_and_without_it_what_args_say(
    tiny_base: Path, heads: dict[str, str]
) -> None:
    replica = replica_of(tiny_base, heads=heads["first"], tree="chain")
    client = TestClient(build_api(replica.server))
    asked = {"model": "m", "prompt": "SELECT", "temperature": 0, "max_tokens": 40}
    served, texts, versions = [], set(), set()
    for user_config in (None, {"heads": heads["second"]}, {"heads": None}, {"tree": [[0], [1]]}, {}, None):
        reconfigure(replica, user_config)
        info = client.get("/info").json()
        served.append((info["heads"], info["num_heads"], info["tree_nodes"]))
        versions.add(info["heads_version"])
        texts.add(client.post(COMPLETION_URL, json=asked).json()["choices"][0]["text"])
    first, second = heads["first"], heads["second"]
    assert served == [
        (first, 3, 3),
        (second, 2, 2),
        (None, 0, 0),
        (first, 3, 2),
        (first, 3, 3),
        (first, 3, 3),
    ]
    assert len(versions) == 3
    assert len(texts) == 1
    lines = client.get("/metrics").text.splitlines()
    infos = {
        line.split('"')[1]: line.split()[-1] for line in lines if line.startswith("medusa_ray_heads_info{")
    }
    assert infos == {first: "1.0", second: "0.0", "none": "0.0"}


@pytest.mark.parametrize(
    ("user_config", "says"),
    [
        ({"heads": "FOREIGN"}, "hidden size of 16, but the base has 32"),
        ({"heads": "no/such/folder"}, "no/such/folder/medusa_lm_head.safetensors does not exist"),
        ({"tree": [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]}, "4 deep, but there are only 3 heads"),
        ({"haeds": "x"}, "haeds is not a key; did you mean heads"),
    ],
)
def test_what_cannot_be_served_fails_a_start_but_not_a_replica_that_serves(
    tiny_base: Path, heads: dict[str, str], user_config: dict[str, Any], says: str
) -> None:
    """Ray Serve ends a replica whose reconfigure raises, and the next one would die of the same."""
    if user_config.get("heads") == "FOREIGN":
        user_config = {"heads": heads["foreign"]}
    replica = replica_of(tiny_base, heads=heads["first"])
    with pytest.raises(ValueError, match=says):
        reconfigure(replica, user_config)
    reconfigure(replica, None)
    client = TestClient(build_api(replica.server))
    assert client.get("/info").json()["heads_refused"] is None
    reconfigure(replica, user_config)
    info = client.get("/info").json()
    assert (info["heads"], info["num_heads"]) == (heads["first"], 3)
    assert says in info["heads_refused"]
    assert 'medusa_ray_heads_refused{model_name="m"} 1.0' in client.get("/metrics").text
    asked = {"model": "m", "prompt": "SELECT", "max_tokens": 5}
    assert client.post(COMPLETION_URL, json=asked).status_code == 200
    reconfigure(replica, {"heads": None})
    assert client.get("/info").json()["heads_refused"] is None


def test_a_null_of_user_config_reaches_the_replica(tiny_base: Path) -> None:
    """Dropped as unset, it would leave the heads of args in place."""
    override: dict[str, Any] = {"name": "Engine", "user_config": {"heads": None}}
    app = {"name": "a", "args": {"model_id": "m", "base": "b", "heads": "h"}, "deployments": [override]}
    file = config.parse(ServeConfig, {"applications": [app]}, "x.yaml")
    deployment = application(file.applications[0])._bound_deployment
    assert deployment._deployment_config.user_config == {"heads": None}
    override["user_config"] = {"head": None}
    with pytest.raises(UserError, match=r"user_config\.head is not a key; did you mean .*user_config\.heads"):
        config.parse(ServeConfig, {"applications": [app]}, "x.yaml")


# ------------------------------------------------------------------------------------------------ with Ray


@pytest.fixture
def file(ray_cluster: None, tiny_base: Path, heads: dict[str, str]) -> Iterator[dict[str, Any]]:
    """A serve file, as plain values, whose application runs."""
    args = {
        **ENGINE,
        "base": str(tiny_base),
        "heads": heads["first"],
        "max_batch_size": 8,
        "max_total_tokens": 256,
    }
    app = {"name": "m", "import_path": "medusa_ray.serve:build_app", "args": args}
    app["deployments"] = [{"name": "Engine", "ray_actor_options": {"num_cpus": 0.5}}]
    raw = {"http_options": {"host": "127.0.0.1", "port": serve.free_port()}, "applications": [app]}
    ray.serve.start(http_options=raw["http_options"])
    redeploy(raw)
    yield raw
    serve.shutdown()
    ray.serve.shutdown()


def redeploy(raw: dict[str, Any]) -> None:
    """What `serve deploy` does with a file; the application runs, as before maybe."""
    client = _get_global_client()
    assert client is not None
    config.parse(ServeConfig, raw, "x.yaml")
    client.deploy_apps(ServeDeploySchema.model_validate(raw))
    deadline_s = time.monotonic() + 300
    while (app := ray.serve.status().applications.get("m")) is None or app.status != "RUNNING":
        assert time.monotonic() < deadline_s, app
        time.sleep(0.05)


@pytest.mark.ray
def test_heads_swapped_under_load_lose_no_request_and_change_no_text(
    file: dict[str, Any], heads: dict[str, str]
) -> None:
    """`serve deploy` of a file whose user_config alone has changed reaches the replica that runs."""
    url = f"http://127.0.0.1:{file['http_options']['port']}"
    serve.wait_for_route(f"{url}/health", time.monotonic() + 120)
    prompts = [f"SELECT {i}" for i in range(8)]
    texts: dict[str, set[str]] = {prompt: set() for prompt in prompts}
    statuses: Counter[int] = Counter()
    is_over = threading.Event()

    def ask_for_ever(prompt: str) -> None:
        asked = {"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": 60, "ignore_eos": True}
        with httpx.Client(timeout=120) as client:
            while not is_over.is_set():
                answer = client.post(f"{url}{COMPLETION_URL}", json=asked)
                statuses[answer.status_code] += 1
                texts[prompt].add(answer.json()["choices"][0]["text"])

    def facts() -> tuple[str | None, int, bool]:
        info = httpx.get(f"{url}/info", timeout=120).json()
        return info["heads"], info["tree_nodes"], info["heads_refused"] is None

    def replicas() -> set[str]:
        lines = httpx.get(f"{url}/metrics", timeout=120).text.splitlines()
        return {line.split('replica="')[1].split('"')[0] for line in lines if "heads_info{" in line}

    callers = [threading.Thread(target=ask_for_ever, args=(prompt,)) for prompt in prompts]
    for caller in callers:
        caller.start()
    first, second, the_one = heads["first"], heads["second"], replicas()
    served, deployment = [facts()], file["applications"][0]["deployments"][0]
    for user_config in (
        {"heads": second, "tree": "auto"},
        {"heads": None},
        {"heads": heads["foreign"]},
        {"tree": [[0], [1]]},
        None,
    ):
        deployment.pop("user_config", None)
        if user_config is not None:
            deployment["user_config"] = user_config
        redeploy(file)
        deadline_s = time.monotonic() + 120
        while facts() == served[-1] and time.monotonic() < deadline_s:
            time.sleep(0.1)
        served.append(facts())
    is_over.set()
    for caller in callers:
        caller.join()
    at_last = [(first, 2, True), (first, 3, True)]
    assert served == [(first, 3, True), (second, 2, True), (None, 0, True), (None, 0, False), *at_last]
    assert replicas() == the_one, "another replica has started"
    assert set(statuses) == {200}
    assert statuses[200] > 50
    assert all(len(seen) == 1 for seen in texts.values()), "a text has changed"
