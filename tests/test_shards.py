"""A pool no larger than asked for, and mistakes that reach the user as mistakes."""

from collections.abc import Callable

import pytest
import ray

from medusa_ray import shards
from medusa_ray.config import ModelConfig, UserError


@pytest.fixture
def cluster_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda **resources: monkeypatch.setattr(ray, "cluster_resources", lambda: resources)


def test_auto_takes_a_gpu_where_there_is_one(cluster_of: Callable[..., None]) -> None:
    cluster_of(CPU=4.0, GPU=1.0)
    assert [shards.device_of(ModelConfig(base="b", device=device)) for device in ("auto", "cpu", "cuda")] == [
        "cuda", "cpu", "cuda",
    ]  # fmt: skip
    cluster_of(CPU=4.0)
    assert shards.device_of(ModelConfig(base="b")) == "cpu"
    with pytest.raises(UserError, match=r"model\.device is 'cuda', but no node of Ray has a GPU"):
        shards.device_of(ModelConfig(base="b", device="cuda"))


def test_a_pool_is_no_larger_than_the_cluster_the_wish_or_the_work(cluster_of: Callable[..., None]) -> None:
    """A pool that asks for more than there is waits for ever."""
    cluster_of(CPU=4.0, GPU=2.0)
    assert shards.actors(3, 10, "cpu")["compute"].max_size == 3
    assert shards.actors(9, 10, "cpu")["compute"].max_size == 4
    assert shards.actors(9, 10, "cuda")["compute"].max_size == 2
    assert shards.actors(9, 1, "cpu")["compute"].max_size == 1
    assert shards.actors("auto", 10, "cpu")["compute"].max_size == 4
    assert shards.actors("auto", 10, "cuda", 0.4)["compute"].max_size == 4  # no actor has parts of two GPUs
    grows = shards.actors("3-9", 10, "cuda", 0.5, at_a_time=2)
    assert (grows["compute"].min_size, grows["compute"].max_size, grows["num_gpus"]) == (3, 9, 0.5)
    assert shards.actors("3-9", 2, "cpu")["compute"].max_size == 2
    assert shards.tasks(13, 6)["compute"].size == 3
    assert shards.tasks(1000, 6)["compute"].size == 4


def test_a_pool_counts_what_nodes_of_its_type_have(
    cluster_of: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor that waits for a type that no node has waits for ever."""
    cluster_of(CPU=24.0, GPU=14.0)
    sizes = [
        ("accelerator_type:L4", 2.0, True),
        ("accelerator_type:L4", 4.0, False),
        ("accelerator_type:H100", 8.0, True),
    ]
    nodes = [{"Alive": alive, "Resources": {"CPU": 8.0, "GPU": num, name: 1.0}} for name, num, alive in sizes]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    pool = shards.actors("auto", 99, "cuda", accelerator_type="L4")
    assert (pool["compute"].max_size, pool["accelerator_type"]) == (2, "L4")
    assert "accelerator_type" not in shards.actors("auto", 99, "cuda")
    assert shards.room(4, 1, "cuda", "H100") == (1, 1, 1)
    with pytest.raises(
        UserError, match=r"hidden.accelerator_type is 'A100', but the nodes have H100, L4\. Name one"
    ):
        shards.actors(1, 9, "cuda", accelerator_type="A100", section="hidden")


def test_trainers_and_their_actors_fit_on_the_cluster(cluster_of: Callable[..., None]) -> None:
    """A trainer holds its GPU for as long as it waits for an actor that finds none."""
    for num_gpus in range(1, 10):
        cluster_of(CPU=32.0, GPU=float(num_gpus))
        for num_trainers in range(1, num_gpus + 1):
            for num_actors in (1, 2, 8):
                room = shards.room(num_trainers, num_actors, "cuda")
                assert 1 <= room.num_actors <= max(1, num_actors // num_trainers)
                assert room.trainer > 0.5  # or NCCL would meet two ranks on one GPU
                free = [1.0] * num_gpus
                taken = [room.trainer] * num_trainers + [room.actor] * (num_trainers * room.num_actors)
                for share in taken:
                    fitting = [gpu for gpu in range(num_gpus) if free[gpu] > share - 1e-9]
                    assert fitting, (num_gpus, num_trainers, room)
                    free[fitting[0]] -= share
    cluster_of(CPU=4.0, GPU=8.0)
    assert shards.room(2, 6, "cuda") == (1, 1, 3)
    assert shards.room(2, 99, "cuda") == (1, 1, 3)
    assert shards.room(4, 1, "cuda") == (1, 1, 1)
    assert shards.room(5, 8, "cuda") == (0.6, 0.4, 1)
    assert shards.room(2, 1, "cpu") == (1, 1, 1)
    with pytest.raises(UserError, match=r"two CPUs for each of train.num_workers=3, but the cluster has 4"):
        shards.room(3, 1, "cpu")
    assert shards.actors(1, 10, "cuda", 0.4)["num_gpus"] == 0.4


def test_no_shards_need_no_pipeline() -> None:
    assert list(shards.run("data", [], lambda: dict, compute=None)) == []


def test_progress_tells_how_far_how_fast_and_how_much_longer(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first result comes when the workers have loaded, which says nothing of the rate."""
    clock = [0.0]
    monkeypatch.setattr(shards.time, "monotonic", lambda: clock[0])
    caplog.set_level("INFO", "medusa_ray")
    progress = shards._Progress("distill", 10)
    for clock[0] in (100.0, 102.0, 104.0, 106.0):
        progress.log({"rows": {"in": 8, "good": 7}})
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "stage=distill shards=1 of=10 seconds=100.0 rows=8 errors=1",
        "stage=distill shards=4 of=10 seconds=106.0 eta_s=12 rows=32 errors=4 rows_per_s=4.0",
    ]


@pytest.mark.ray
def test_a_users_mistake_in_a_worker_reaches_the_user(ray_cluster: None) -> None:
    """Ray Data wraps what a worker raises; the user would read a page of traceback."""

    def make_worker() -> shards.Worker:
        def work(shard: shards.Shard) -> dict[str, int]:
            if shard["n"] == 2:
                raise UserError("two is one too many")
            return {"twice": 2 * shard["n"]}

        return work

    good = [shards.block({"n": n}) for n in (0, 1)]
    results = shards.run("test", good, make_worker, **shards.tasks(2, 1))
    assert sorted(result["twice"] for result in results) == [0, 2]
    with pytest.raises(UserError, match=r"^two is one too many$"):
        list(shards.run("test", [*good, shards.block({"n": 2})], make_worker, **shards.tasks(3, 1)))
