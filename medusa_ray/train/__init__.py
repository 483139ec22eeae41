"""Hidden states -> Medusa heads. Ray Train runs it; each DeepSpeed engine holds the heads alone.

A run is a function of its config and of hidden/: (seed, epoch) put the positions in a line that workers share
(order.py), and the learning rate follows from the step. A checkpoint needs only weights, the optimizer's moments and
how far the line was taken, and a resumed run is the same run.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import fsspec
import ray
import ray.train
from ray.train.torch import TorchTrainer
from torch import Tensor

from medusa_ray import parts, provenance, shards
from medusa_ray.config import RunConfig, UserError
from medusa_ray.states import read_output_layer
from medusa_ray.train import checkpoints, joint
from medusa_ray.train.corpus import Corpus
from medusa_ray.train.engine import deepspeed_config
from medusa_ray.train.journal import CURVE, check_trackers, line, read_curve
from medusa_ray.train.meeting import Meeting
from medusa_ray.train.order import Ints
from medusa_ray.train.worker import STOP, STOPPED, Job, worker

LOG = logging.getLogger("medusa_ray")
# How often Ray Train's controller looks at its workers; its own 2 s would be lost at every start and end.
POLL_S = "0.2"
# How long it waits for room, each wait counting as a failure: its own 60 s are too few for a node to take the place of
# one that was lost. A range of workers keeps these, after which Ray has noticed that the node is gone.
NODE_S = "300"
RESIZE_S = 60.0  # between two looks whether a wider cluster has room for more workers
RUN = "run.json"  # in training/: the config and inputs of its checkpoints, and whether the run is over
# What may be another when a run goes on: none of it changes what the heads learn, but for the order of the rows.
FREE = {
    "num_workers", "batch_size", "gradient_accumulation_steps", "zero_stage", "logging_steps", "save_steps",
    "eval_steps", "max_failures", "trackers", "profile_steps", "deepspeed", "keep", "gradient_checkpointing",
}  # fmt: skip

PLACE = {"placement", "accelerator_type"}  # where workers run: heads are the same wherever


def run(config: RunConfig) -> str:
    """Writes heads/ and returns its URI; with config.joint, warm_heads/ before it and adapter/ beside it.

    Raises UserError when hidden/ cannot train these heads, the loss is not finite, or training/ holds the unfinished
    run of another config. A killed run goes on from its newest checkpoint, in training/ beside heads/.
    """
    if config.joint is None:
        train_heads(config, "heads")
    else:
        joint.check(config)  # now, rather than when the heads are warm
        train_heads(config, "warm_heads")
        train_jointly(config)
    return config.artifact("heads")


def train_heads(config: RunConfig, name: str) -> None:
    """hidden/ -> heads, into the artifact of that name."""
    heads, hidden, distilled = (
        parts.absolute(config.artifact(folder)) for folder in (name, "hidden", "distilled")
    )
    settings = {
        "revision": config.model.revision,
        "heads": config.heads.model_dump(),
        "train": config.train.model_dump(exclude=PLACE),
    }
    inputs = {"hidden": provenance.digest(hidden), "base": provenance.digest(config.model.base)}
    if provenance.is_complete(heads, settings, inputs):
        return
    if provenance.read(hidden) is None:
        raise UserError(f"{hidden} is not finished. Run the hidden stage first.")
    check_trackers(config.train)  # now, rather than in every worker
    deepspeed_config(config.train)

    output_layer_VC = read_output_layer(config.model)
    is_streamed = config.hidden.mode == "stream"
    corpus = Corpus.survey(distilled if is_streamed else hidden, config, output_layer_VC.shape[1])
    token_map_M, draft_coverage = corpus.draft(config.heads, output_layer_VC.shape[0])
    job = replace(Job.of(config, corpus, token_map_M, shards.device_of(config.model)), output=heads)
    facts = fit(job, [heads], settings, inputs, output_layer_VC, corpus.counts)
    provenance.write(heads, settings, inputs, **facts, draft_coverage=draft_coverage)


def train_jointly(config: RunConfig) -> None:
    """distilled/ and warm_heads/ -> adapter/ and heads/."""
    assert config.joint is not None
    distilled, warm_heads = (parts.absolute(config.artifact(name)) for name in ("distilled", "warm_heads"))
    settings = {
        "model": config.model.model_dump(include={"revision", "dtype", "quantization"}),
        "loss_on": config.data.loss_on,
        "train": config.train.model_dump(exclude=PLACE),
        "joint": config.joint.model_dump(),
    }
    inputs = {"distilled": provenance.digest(distilled), "warm_heads": provenance.digest(warm_heads)}
    inputs["base"] = provenance.digest(config.model.base)
    heads = parts.absolute(config.artifact("heads"))
    if provenance.is_complete(heads, settings, inputs):
        return
    deepspeed_config(joint.settings_of(config.train, config.joint))
    counts, held_out = joint.survey(distilled, config)
    job = joint.JointJob.of_rows(config, counts, held_out, shards.device_of(config.model))
    facts = fit(job, [heads, job.adapter], settings, inputs, None, counts)
    provenance.write(job.adapter, settings, inputs)
    provenance.write(heads, settings, inputs, **facts)


def fit(
    job: Job,
    outputs: list[str],
    settings: dict[str, Any],
    inputs: dict[str, str],
    output_layer_VC: Tensor | None,
    counts: list[Ints],
) -> dict[str, Any]:
    """Runs a job to its end, from its newest checkpoint if there is one. Returns facts for provenance."""
    if not begin(job.training, settings, inputs):
        for output in outputs:
            remove(output)
    with relayed(f"{job.output}/{CURVE}"), stoppable(job.training):
        result: Any = trainer(job, output_layer_VC, counts).fit()
    if result.return_value == STOPPED:
        LOG.warning("stage=train has saved and stopped. The same command goes on from %s", job.training)
        raise SystemExit(128 + signal.SIGTERM)
    if result.return_value is not None:
        raise UserError(result.return_value)
    finish(job.training)
    return {
        "num_steps": read_curve(f"{job.output}/{CURVE}")[-1]["step"],
        "num_positions": job.num_positions,
        "num_held_out": sum(len(row_R) for _, row_R in job.held_out),
    }


def begin(training: str, settings: dict[str, Any], inputs: dict[str, str]) -> bool:
    """Makes training/ ready, and says whether the run in it goes on.

    Raises UserError when it holds the unfinished run of another config or of other data.
    """
    bound: dict[str, Any] = {
        section: {key: value for key, value in settings[section].items() if key not in FREE}
        for section in ("train", "joint")
        if section in settings
    }
    ours = {**settings, **bound, **inputs}
    if checkpoints.names(training) and exists(f"{training}/{RUN}"):
        found = provenance.read_json(f"{training}/{RUN}")
        apart = [f"{key} was {old}, and is {new}" for key, old, new in provenance.differences(found["of"], ours)]
        if apart and not found["is_over"]:
            raise UserError(
                f"{training} holds a run that is not over, and it is another: {'; '.join(apart)}. Set these back to go "
                "on with it, or remove the folder, or set output to another place."
            )
        if not apart and not found["is_over"]:
            remove(f"{training}/{STOP}")
            return True
    remove(training)
    provenance.write_json(f"{training}/{RUN}", {"of": ours, "is_over": False})
    return False


def finish(training: str) -> None:
    """Declares the run over. The last checkpoint and the best stay."""
    found = provenance.read_json(f"{training}/{RUN}")
    provenance.write_json(f"{training}/{RUN}", found | {"is_over": True})
    remove(f"{training}/ray")


@contextmanager
def stoppable(training: str) -> Iterator[None]:
    """Has SIGTERM, which is how jobs are stopped, save the run first."""
    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody handle signals
        yield
        return

    def stop(*_: Any) -> None:
        LOG.warning("stage=train told to stop: saving first")
        provenance.write_json(f"{training}/{STOP}", {})

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def trainer(job: Job, output_layer_VC: Tensor | None, counts: list[Ints]) -> TorchTrainer:
    """Raises UserError when the cluster has no room for the workers."""
    on_gpu = job.device == "cuda"
    train = job.train
    resource, least, most = shards.resource_of(job.device), train.least_workers, train.most_workers
    there = int(shards.count_of(resource, train.accelerator_type, "train.accelerator_type"))
    if there < least:
        raise UserError(
            f"train.num_workers is {train.num_workers}, and each takes a {resource}, but the cluster has {there}. Set "
            f"it to {there} at most, or add nodes."
        )
    share = 1.0
    if job.streamed:
        share, actor_share, num_actors = job.streamed.room
        LOG.info(
            "stage=train %ss=%d trainers=%d trainer_share=%.1f actors=%d actor_share=%.1f",
            resource.lower(), there, most, share, most * num_actors, actor_share,
        )  # fmt: skip
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_S)
    if least == most:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", NODE_S)
    # Nothing here is compiled, but DeepSpeed would import the compiler: a second of every worker's start.
    environment = {"DS_ACCELERATOR": job.device, "TORCHDYNAMO_DISABLE": "1"}
    if len(ray.nodes()) == 1:  # a process that waits for nodes to be reclaimed has nothing to wait for
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    api: Any = ray.train  # its stubs are those of Train V1, which knows fewer arguments
    loop: Any = worker
    return TorchTrainer(
        loop,
        train_loop_config={
            "job": job,
            "output_layer": ray.put(output_layer_VC),
            "counts": ray.put(counts),
        },
        torch_config=Meeting(backend="nccl" if on_gpu else "gloo"),
        scaling_config=api.ScalingConfig(
            num_workers=most if least == most else (least, most),
            use_gpu=on_gpu,
            elastic_resize_monitor_interval_s=RESIZE_S,
            placement_strategy=train.placement.upper(),
            accelerator_type=train.accelerator_type,
            resources_per_worker={"CPU": 1, "GPU": share} if on_gpu else {"CPU": 1},
        ),
        run_config=api.RunConfig(
            name="ray",
            storage_path=job.training,
            # A node that is lost before the workers have met counts as the controller's failure.
            failure_config=api.FailureConfig(
                max_failures=train.max_failures, controller_failure_limit=train.max_failures
            ),
            worker_runtime_env={"env_vars": environment},
        ),
    )


@contextmanager
def relayed(curve: str) -> Iterator[None]:
    """Logs what rank 0 adds to training.jsonl meanwhile, since a worker's own log stays with the worker."""
    ended = threading.Event()

    def follow() -> None:
        newest, is_over = 0, False
        while not is_over:
            is_over = ended.wait(0.5)  # and then once more, for the last lines
            for record in read_curve(curve):
                if record["step"] > newest:
                    newest = record["step"]
                    LOG.info("%s", line(record))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def exists(uri: str) -> bool:
    filesystem, path = fsspec.core.url_to_fs(uri)
    return filesystem.exists(path)


def remove(uri: str) -> None:
    filesystem, path = fsspec.core.url_to_fs(uri)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)
