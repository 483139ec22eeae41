"""A list of shards and a worker -> what the worker made of each, as they finish. Ray Data runs it.

A shard is a small dict that says which rows to take and which part to write; a worker writes its part by
itself, so rows do not pass through the driver. Ray Data gives each shard to a process, and to another one
when that process or its node dies.
"""

import json
import logging
import math
import os
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning

from medusa_ray import parts
from medusa_ray.config import ModelConfig, UserError, least_and_most

Shard = dict[str, Any]
Worker = Callable[[Shard], dict[str, Any]]
MakeWorker = Callable[[], Worker]

LOG = logging.getLogger("medusa_ray")
LOG_INTERVAL_S = 5.0
TYPE = "accelerator_type:"  # begins what Ray counts of each type of accelerator


def base_of(model: ModelConfig) -> str:
    """The base as a worker finds it, which may run in another folder."""
    return os.path.abspath(model.base) if os.path.isdir(model.base) else model.base


def device_of(model: ModelConfig) -> str:
    """cpu or cuda, by what the cluster has. Raises UserError when a GPU is asked for and there is none."""
    has_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    if model.device == "cuda" and not has_gpu:
        raise UserError("model.device is 'cuda', but no node of Ray has a GPU. Set it to 'auto' or 'cpu'.")
    return "cuda" if has_gpu and model.device != "cpu" else "cpu"


def count_of(resource: str, accelerator_type: str | None, key: str) -> float:
    """How many CPUs or GPUs the cluster has, of one type where one is named.

    key: where the config names it. Raises UserError when no node is of that type: Ray would wait for one for ever.
    """
    if accelerator_type is None:
        return float(ray.cluster_resources().get(resource, 0))
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if found := [there for there in resources if f"{TYPE}{accelerator_type}" in there]:
        return float(sum(there.get(resource, 0) for there in found))
    types = sorted(
        {name.removeprefix(TYPE) for there in resources for name in there if name.startswith(TYPE)}
    )
    raise UserError(
        f"{key} is {accelerator_type!r}, but the nodes have {', '.join(types) or 'no accelerator'}. Name one of these, "
        "leave it out, or start a node that has it first."
    )


def node() -> str:
    """The node that this process runs on; one without a name outside Ray."""
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""


def nodes() -> set[str]:
    """All that are there."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]} if ray.is_initialized() else {""}


class Room(NamedTuple):
    """What a trainer takes of a GPU, and what each of the actors does that stream to it."""

    trainer: float
    actor: float
    num_actors: int  # of one trainer


def room(num_trainers: int, num_actors: int, device: str, accelerator_type: str | None = None) -> Room:
    """Whole ones where the cluster has two for each trainer; else each trainer shares its GPU with its only actor.

    num_actors: wanted in all; each trainer has one at least. Raises UserError when there are too few CPUs.
    """
    there = int(count_of(resource_of(device), accelerator_type, "train.accelerator_type"))
    others = there // num_trainers - 1
    if others >= 1:
        return Room(1, 1, min(others, max(1, num_actors // num_trainers)))
    if device == "cpu":  # not shared, as Ray Data begins with tasks that take a whole one
        raise UserError(
            f"hidden.mode is 'stream', which takes two CPUs for each of train.num_workers={num_trainers}, but the "
            f"cluster has {there}. Lower train.num_workers, set hidden.mode to 'compute', or add nodes."
        )
    # Over a half and under: two trainers never meet on one GPU, which NCCL refuses.
    return Room(0.6, 0.4, 1)


def resource_of(device: str) -> str:
    """What Ray counts of a device."""
    return "GPU" if device == "cuda" else "CPU"


def actors(
    num_actors: int | str,
    num_shards: int,
    device: str,
    share: float = 1,
    at_a_time: int = 1,
    retries: int = 3,
    accelerator_type: str | None = None,
    section: str = "distill",
) -> dict[str, Any]:
    """Arguments of map_batches for a pool of actors, as many as the cluster holds and the shards can use.

    num_actors: as distill.num_actors. share: of a GPU, for each. at_a_time: shards, in threads of one actor. retries:
    of a shard whose actors die. accelerator_type: that of the section of the config. Raises UserError when no node has
    it.
    """
    least, most = least_and_most(num_actors)
    there = int(count_of(resource_of(device), accelerator_type, f"{section}.accelerator_type")) or 1
    fitting = there * math.floor(1 / share + 1e-9)  # no actor has parts of two GPUs
    if isinstance(num_actors, str) and num_actors != "auto":
        # The cluster may grow with what is asked of it, so that what is there now is no limit.
        size = {"min_size": max(1, min(least, num_shards)), "max_size": max(1, int(min(most, num_shards)))}
    else:
        size = {"size": max(1, int(min(most, num_shards, fitting)))}
    return {
        "compute": ray.data.ActorPoolStrategy(
            **size,
            max_tasks_in_flight_per_actor=at_a_time + 1,
            max_concurrent_calls_per_actor=at_a_time,
            enable_true_multi_threading=at_a_time > 1,
        ),
        "num_cpus": 1,
        "num_gpus": share if device == "cuda" else 0,
        # Ray's default is to try for ever; a shard that ends so many processes is at fault itself.
        "max_task_retries": retries,
        **({"accelerator_type": accelerator_type} if accelerator_type else {}),
    }


def tasks(num_shards: int, shards_per_process: int) -> dict[str, Any]:
    """Arguments of map_batches for light workers in processes that Ray has already started."""
    wanted = math.ceil(num_shards / shards_per_process)
    fitting = min(wanted, int(ray.cluster_resources().get("CPU", 1)))
    return {"compute": ray.data.TaskPoolStrategy(size=max(fitting, 1)), "num_cpus": 1}


def block(shard: Shard) -> pa.Table:
    """A shard as it goes to a worker."""
    return pa.Table.from_pylist([shard])


def run(
    stage: str, blocks: list[pa.Table], make_worker: MakeWorker, **resources: Any
) -> Iterator[dict[str, Any]]:
    """What the workers made of the shards, in the order in which they finish.

    make_worker: called once in each process. resources: what `actors` or `tasks` returned. Raises UserError
    when a worker raised one.
    """
    if not blocks:
        return
    function = _Process if isinstance(resources["compute"], ray.data.ActorPoolStrategy) else _work
    results = _mapped(blocks, function, make_worker, sys.stderr.isatty(), **resources)
    progress = _Progress(stage, len(blocks))
    for row in results.iter_rows():
        if row["mistake"] is not None:
            raise (parts.StorageError if row["is_of_storage"] else UserError)(row["mistake"])
        result = json.loads(row["result"])
        progress.log(result)
        yield result


class _Progress:
    """A line for LOG_INTERVAL_S of results: how far, how fast, how much longer."""

    def __init__(self, stage: str, num_shards: int) -> None:
        self.stage, self.num_shards = stage, num_shards
        self.start_s = self.logged_s = time.monotonic()
        self.number = self.num_rows = self.num_errors = 0
        self.first: tuple[float, int] | None = None  # when it came, and its rows: workers were loaded by then

    def log(self, result: dict[str, Any]) -> None:
        self.number += 1
        counts = result.get("rows")
        if isinstance(counts, dict):
            self.num_rows += counts["in"]
            self.num_errors += counts["in"] - counts["good"]
        now_s = time.monotonic()
        if self.first is None:
            self.first = now_s, self.num_rows
        if now_s - self.logged_s <= LOG_INTERVAL_S and self.number < self.num_shards:
            return
        self.logged_s = now_s
        fields = f"shards={self.number} of={self.num_shards} seconds={now_s - self.start_s:.1f}"
        since_s, num_since = now_s - self.first[0], self.number - 1
        if num_since:
            fields += f" eta_s={since_s / num_since * (self.num_shards - self.number):.0f}"
        if self.num_rows:
            fields += f" rows={self.num_rows} errors={self.num_errors}"
            if since_s:
                fields += f" rows_per_s={(self.num_rows - self.first[1]) / since_s:.1f}"
        LOG.info("stage=%s %s", self.stage, fields)


def tables(
    blocks: list[pa.Table],
    num_rows: list[int],
    make_worker: Callable[[], Callable[[Shard], pa.Table]],
    **resources: Any,
) -> Iterator[pa.Table]:
    """What the workers made of the shards, in the order of the shards, made as it is asked for.

    num_rows: of each table, at least 1. make_worker, resources: as in `run`.
    """
    if not blocks:
        return
    made = _mapped(blocks, _TableProcess, make_worker, False, **resources)
    # Ray Data cuts large tables to blocks of its own.
    found: Iterator[Any] = iter(made.iter_batches(batch_size=None, batch_format="pyarrow"))
    left: list[pa.Table] = []
    for wanted in num_rows:
        while sum(map(len, left)) < wanted:
            left.append(next(found))
        whole = pa.concat_tables(left)
        yield whole.slice(0, wanted)
        left = [whole.slice(wanted)]


def _mapped(
    blocks: list[pa.Table], function: Any, make_worker: Any, shows_progress: bool, **resources: Any
) -> Any:
    """The pipeline, not begun. One shard is one batch, so that whatever finished is not done again."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the plan of every pipeline is no news to a user
    dataset = ray.data.from_blocks(blocks)  # from_arrow has a task for each, and keeps 40 KiB of each
    dataset.context.enable_progress_bars = shows_progress
    dataset.context.execution_options.preserve_order = function is _TableProcess
    with warnings.catch_warnings():
        # Ray 2.60 takes max_task_retries in no other way, yet warns that 2.64 will not; see what it has then.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return dataset.map_batches(
            function,
            fn_kwargs={"make_worker": make_worker, "run_id": uuid.uuid4().hex},
            batch_size=1,  # of a block, which has one row; where there are GPUs Ray takes no None
            batch_format="pyarrow",
            **resources,
        )


class _Process:
    """An actor of the pool."""

    def __call__(self, batch: pa.Table, make_worker: MakeWorker, run_id: str) -> pa.Table:
        return _work(batch, make_worker, run_id)


class _TableProcess:
    """An actor of the pool whose workers make tables."""

    def __call__(self, batch: pa.Table, make_worker: Any, run_id: str) -> pa.Table:
        (shard,) = batch.to_pylist()
        return _worker_of(make_worker, run_id)(shard)


_worker: dict[str, Any] = {}  # by run, since Ray keeps processes for later pipelines
_making = threading.Lock()


def _worker_of(make_worker: Any, run_id: str) -> Any:
    with _making:  # the other threads of an actor wait for the one worker of all
        if run_id not in _worker:
            _worker.clear()
            _worker[run_id] = make_worker()
        return _worker[run_id]


def _work(batch: pa.Table, make_worker: MakeWorker, run_id: str) -> pa.Table:
    try:
        worker = _worker_of(make_worker, run_id)
        results = [json.dumps(worker(shard)) for shard in batch.to_pylist()]
    except Exception as error:
        of_storage = parts.storage_error(error)
        if not of_storage and not isinstance(error, UserError):
            raise
        # As a value: Ray Data's own exceptions do not carry it to the driver.
        return _results([None], str(of_storage or error), bool(of_storage))
    return _results(results)


def _results(
    results: Sequence[str | None], mistake: str | None = None, is_of_storage: bool = False
) -> pa.Table:
    return pa.table(
        {
            "result": pa.array(results, pa.string()),
            "mistake": pa.array([mistake] * len(results), pa.string()),
            "is_of_storage": [is_of_storage] * len(results),
        }
    )
