"""Hidden states -> Medusa heads. Ray Train runs it; each DeepSpeed engine holds the heads alone.

A run is a function of its config and of hidden/: position i, counted over the parts in the order of their
names, belongs to rank i % W; (seed, epoch, rank) fix the order in which a rank takes its own; the learning
rate follows from the step. A checkpoint needs only DeepSpeed's state and the step, and a resumed run is the
same run.

# N positions   H heads   C hidden   V vocabulary   W workers
"""

import importlib
import json
import logging
import math
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor, nn

from medusa_ray import parts, provenance, shards
from medusa_ray.config import HeadsConfig, RunConfig, TrainConfig, UserError
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.loss import IGNORED, HeadLoss, cross_entropy_for, labels_for, medusa_loss
from medusa_ray.states import read_output_layer

LOG = logging.getLogger("medusa_ray")
CURVE = "training.jsonl"
TAG = "state"  # DeepSpeed's name for a checkpoint inside its folder
# How often Ray Train's controller looks at its workers; its own 2 s would be lost at every checkpoint.
POLL_S = "0.2"


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know."""

    hidden: str
    output: str  # heads/
    base: str
    device: str
    output_layer: ray.ObjectRef  # the base's, [V, C]
    num_positions: int  # of hidden/, those that some head has a label for
    token_map_M: Tensor | None  # the tokens that heads guess; None for the whole vocabulary
    heads: HeadsConfig
    train: TrainConfig

    @property
    def positions_per_step(self) -> int:
        return self.train.num_workers * self.train.gradient_accumulation_steps * self.train.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps until every position was seen; the last is filled up with positions seen before."""
        return math.ceil(self.num_positions / self.positions_per_step)

    @property
    def num_steps(self) -> int:
        return self.train.epochs * self.steps_per_epoch


# --------------------------------------------------------------------------------------------------- driver


def run(config: RunConfig) -> str:
    """Writes heads/ and returns its URI.

    Raises UserError when hidden/ cannot train these heads or the loss is not finite. A killed run goes on
    from its newest checkpoint, in training/ beside heads/, which is removed at the end.
    """
    heads, hidden, training = (
        parts.absolute(config.artifact(name)) for name in ("heads", "hidden", "training")
    )
    settings = {
        "revision": config.model.revision,
        "heads": config.heads.model_dump(),
        "train": config.train.model_dump(),
    }
    inputs = {"hidden": provenance.digest(hidden), "base": provenance.digest(config.model.base)}
    if provenance.is_complete(heads, settings, inputs):
        return config.artifact("heads")
    if provenance.read(hidden) is None:
        raise UserError(f"{hidden} is not finished. Run the hidden stage first.")

    output_layer_VC = read_output_layer(config.model)
    num_positions = survey(hidden, config, output_layer_VC.shape[1])
    token_map_M, draft_coverage = choose_draft(hidden, config.heads, output_layer_VC.shape[0])
    job = Job(
        hidden=hidden,
        output=heads,
        base=config.model.base,
        device=shards.device_of(config.model),
        output_layer=ray.put(output_layer_VC),
        num_positions=num_positions,
        token_map_M=token_map_M,
        heads=config.heads,
        train=config.train,
    )
    # The name holds the config: another one starts anew, and the same one finds its checkpoints.
    name = provenance.key(settings, inputs)[:16]
    if not exists(f"{training}/{name}"):
        remove(heads)
    with relayed(f"{heads}/{CURVE}", job.num_steps):
        result: Any = trainer(job, training, name).fit()
    if result.return_value is not None:
        raise UserError(result.return_value)
    remove(training)
    num_seen = job.steps_per_epoch * job.positions_per_step
    facts = {"num_steps": job.num_steps, "num_positions": job.num_positions, "draft_coverage": draft_coverage}
    provenance.write(heads, settings, inputs, **facts, num_repeated_per_epoch=num_seen - job.num_positions)
    return config.artifact("heads")


def trainer(job: Job, storage: str, name: str) -> TorchTrainer:
    on_gpu = job.device == "cuda"
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_S)
    # Nothing here is compiled, but DeepSpeed would import the compiler: a second of every worker's start.
    environment = {"DS_ACCELERATOR": job.device, "TORCHDYNAMO_DISABLE": "1"}
    addresses = [node["NodeManagerAddress"] for node in ray.nodes()]
    if addresses == ["127.0.0.1"]:
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # gloo would look up the host's name, which need not resolve
    if len(addresses) == 1:  # a process that waits for nodes to be reclaimed has nothing to wait for
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    api: Any = ray.train  # its stubs are those of Train V1, which knows fewer arguments
    loop: Any = worker
    return TorchTrainer(
        loop,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=api.ScalingConfig(
            num_workers=job.train.num_workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": 1, "GPU": 1} if on_gpu else {"CPU": 1},
        ),
        run_config=api.RunConfig(
            name=name,
            storage_path=storage,
            # A node that is lost before the workers have met counts as the controller's failure.
            failure_config=api.FailureConfig(
                max_failures=job.train.max_failures, controller_failure_limit=job.train.max_failures
            ),
            checkpoint_config=api.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": environment},
        ),
    )


def survey(hidden: str, config: RunConfig, hidden_size: int) -> int:
    """Counts the positions of hidden/ that can train a head, its states left unread.

    Raises UserError when there are too few, or when the parts are not states of this base.
    """
    num_positions = 0
    for name in parts.names(hidden):
        table = parts.read(hidden, name, ["input_ids", "position", "label_mask"])
        found = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if found.get("hidden_size") != str(hidden_size) or found.get("dtype") not in ("float32", "bfloat16"):
            raise UserError(
                f"{hidden}/{name}.parquet has hidden_size={found.get('hidden_size')} and "
                f"dtype={found.get('dtype')}, but {config.model.base} has a hidden size of {hidden_size}. "
                "Run the hidden stage with this base."
            )
        num_positions += sum(len(usable_N) for _, usable_N, _ in labelled(table, config.heads.num_heads))
    if num_positions < config.train.num_workers:
        raise UserError(
            f"{hidden} has {num_positions} positions with a label for some head, and "
            f"train.num_workers={config.train.num_workers} want one each at least. Give more chats, or allow "
            "longer replies with distill.max_new_tokens."
        )
    return num_positions


def choose_draft(hidden: str, heads: HeadsConfig, vocab_size: int) -> tuple[Tensor | None, float]:
    """The heads.draft_vocab_size tokens that labels name most often, as a token map, and their share of all labels.

    Of tokens that are named equally often, those with the lowest ids. Raises UserError when the base has fewer tokens.
    """
    size = heads.draft_vocab_size
    if size is None:
        return None, 1.0
    if size > vocab_size:
        raise UserError(
            f"heads.draft_vocab_size is {size}, but the base has a vocabulary of {vocab_size}. Set it to less, or to "
            "null for the whole vocabulary."
        )
    count_V = torch.zeros(vocab_size, dtype=torch.int64)
    for name in parts.names(hidden):
        table = parts.read(hidden, name, ["input_ids", "position", "label_mask"])
        rows = [labels_NH.flatten() for _, _, labels_NH in labelled(table, heads.num_heads)]
        labels = torch.cat([*rows, torch.empty(0, dtype=torch.int64)])  # a part may have no rows
        count_V += torch.bincount(labels[labels != IGNORED], minlength=vocab_size)
    chosen_M = count_V.argsort(descending=True, stable=True)[:size]
    coverage = (count_V[chosen_M].sum() / count_V.sum()).item()
    LOG.info("stage=train draft_vocab_size=%d draft_coverage=%.4f", size, coverage)
    return chosen_M.sort().values, coverage


@contextmanager
def relayed(curve: str, num_steps: int) -> Iterator[None]:
    """Logs what rank 0 adds to training.jsonl meanwhile, since a worker's own log stays with the worker."""
    ended = threading.Event()

    def follow() -> None:
        newest, is_over = 0, False
        while not is_over:
            is_over = ended.wait(0.5)  # and then once more, for the last lines
            for record in read_curve(curve):
                if record["step"] > newest:
                    newest = record["step"]
                    LOG.info("%s", line(record, num_steps))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def read_curve(curve: str) -> list[dict[str, Any]]:
    """Records of training.jsonl, which may be about to be written."""
    try:
        with fsspec.open(curve, "r", encoding="utf-8") as file:
            return [json.loads(text) for text in file if text.endswith("\n")]
    except FileNotFoundError:
        return []


def line(record: dict[str, Any], num_steps: int) -> str:
    top1 = ",".join(f"{value:.3f}" for value in record["top1"])
    return f"stage=train step={record['step']} of={num_steps} loss={record['loss']:.3f} top1={top1}"


def exists(uri: str) -> bool:
    filesystem, path = fsspec.core.url_to_fs(uri)
    return filesystem.exists(path)


def remove(folder: str) -> None:
    filesystem, path = fsspec.core.url_to_fs(folder)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


# --------------------------------------------------------------------------------------------------- rows


def labelled(table: pa.Table, num_heads: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each row: its number, the places in its `position` that have a label, and those labels [N, H]."""
    for row in range(len(table)):
        # A copy each: Arrow's memory is read-only, and its booleans are bits.
        ids, position, mask = (
            torch.tensor(table[name][row].values.to_numpy(zero_copy_only=False))
            for name in ("input_ids", "position", "label_mask")
        )
        labels_NH = labels_for(ids, mask, position, num_heads)
        usable_N = (labels_NH != IGNORED).any(dim=1).nonzero().squeeze(1)
        yield row, usable_N, labels_NH[usable_N]


def load_share(job: Job, rank: int) -> tuple[Tensor, Tensor]:
    """Hidden states [N, C], in the base's dtype, and labels [N, H] of the positions that belong to a rank.

    Raises ValueError when a row's bytes are not what its positions need.
    """
    all_hidden, all_labels, num_before = [], [], 0
    for name in parts.names(job.hidden):
        table = parts.read(job.hidden, name)
        metadata = table.schema.metadata
        hidden_size, dtype = int(metadata[b"hidden_size"]), metadata[b"dtype"].decode()
        for row, usable_N, labels_NH in labelled(table, job.heads.num_heads):
            own = slice((rank - num_before) % job.train.num_workers, None, job.train.num_workers)
            num_before += len(usable_N)
            num_positions = len(table["position"][row])
            width = np.int16 if dtype == "bfloat16" else np.int32  # NumPy has no bfloat16, so bits are moved
            raw = np.frombuffer(table["hidden"][row].as_buffer(), width)
            if raw.size != num_positions * hidden_size:
                raise ValueError(
                    f"{job.hidden}/{name}.parquet, row {table['id'][row]}: {raw.nbytes} bytes of states, but "
                    f"{num_positions} positions of {hidden_size} {dtype} each. Run the hidden stage again."
                )
            # Indexing by an array copies, so that the part's memory is given back.
            states_NC = torch.from_numpy(raw.reshape(num_positions, hidden_size)[usable_N[own].numpy()])
            all_hidden.append(states_NC.view(getattr(torch, dtype)))
            all_labels.append(labels_NH[own])
    return torch.cat(all_hidden), torch.cat(all_labels)


def order_of(job: Job, epoch: int, rank: int, num_own: int) -> Tensor:
    """Its positions, as a rank takes them in an epoch [steps, accumulation, batch]: all, then some again."""
    shape = (job.steps_per_epoch, job.train.gradient_accumulation_steps, job.train.batch_size)
    shuffled = np.random.default_rng([job.train.seed, epoch, rank]).permutation(num_own)
    return torch.from_numpy(np.resize(shuffled, shape))


# --------------------------------------------------------------------------------------------------- worker


class HeadTrainer(nn.Module):
    """What DeepSpeed wraps. The loss is inside, since ZeRO-3 gathers weights around a module's forward."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        output_layer_VC = ray.get(job.output_layer)
        vocab_size, hidden_size = output_layer_VC.shape
        self.dtype = getattr(torch, job.train.dtype)
        torch.manual_seed(job.train.seed)  # low-rank terms begin at random
        self.heads = MedusaHeads(
            **job.heads.model_dump(exclude={"draft_vocab_size"}),
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            token_map_M=job.token_map_M,
            dtype=self.dtype,
        )
        self.heads.init_from(output_layer_VC.to(self.dtype))
        self.head_weight = job.train.head_weight
        self.cross_entropy = cross_entropy_for(self.heads, job.train.batch_size)

    def forward(self, hidden_NC: Tensor, labels_NH: Tensor, with_top1: bool) -> HeadLoss:
        return medusa_loss(
            self.heads, hidden_NC.to(self.dtype), labels_NH, self.head_weight, self.cross_entropy, with_top1
        )


def worker(config: dict[str, Any]) -> str | None:
    """One rank's part of the training. Returns why it had to stop, or None when heads/ is written."""
    job: Job = config["job"]
    rank = ray.train.get_context().get_world_rank()
    engine = start_engine(job)
    step, history = restore(engine)
    hidden_NC, labels_NH = load_share(job, rank)
    journal = Journal(job, history) if rank == 0 else None
    order = None
    while step < job.num_steps:
        epoch, place = divmod(step, job.steps_per_epoch)
        if order is None or place == 0:
            order = order_of(job, epoch, rank, len(labels_NH))
        is_logged = (step + 1) % job.train.logging_steps == 0 or step + 1 == job.num_steps
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, job.num_steps, job.train)
        micro_batches = ((hidden_NC[own_N], labels_NH[own_N]) for own_N in order[place])
        metrics, culprit = optimizer_step(engine, micro_batches, is_logged)
        step += 1
        if culprit is not None:
            return (
                f"step={step} rank={culprit}: the loss is not finite, so training stopped before this step. "
                f"Lower train.learning_rate, now {job.train.learning_rate}, or mend the rows of {job.hidden}."
            )
        if journal and metrics is not None:
            journal.add(step, metrics)
        if step % job.train.save_steps == 0 or step % job.steps_per_epoch == 0:
            save(engine, step, journal)
    write_heads(engine, job, rank)
    return None


def start_engine(job: Job) -> Any:
    """A DeepSpeed engine around fresh heads."""
    import deepspeed  # here, since it looks for an accelerator, which the driver need not have

    # On a CPU DeepSpeed compiles an operator of its inference for a minute, and fails without a compiler.
    # Training never calls it. deepspeed 0.19 has no switch for that; drop this when it has one.
    comm: Any = importlib.import_module("deepspeed.comm.torch")
    if job.device == "cpu" and hasattr(comm, "build_shm_op"):
        comm.build_shm_op = lambda: None
    if job.device == "cpu":
        torch.set_num_threads(1)  # a worker has one CPU
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(dist_backend=dist.get_backend())
    model = HeadTrainer(job)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=job.train.weight_decay, fused=True)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(job.train))[0]


def deepspeed_config(train: TrainConfig) -> dict[str, Any]:
    """TrainConfig in DeepSpeed's words."""
    return {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {"stage": train.zero_stage},
        "bf16": {"enabled": train.dtype == "bfloat16"},
        "steps_per_print": 2**62,  # our own lines say more
    }


def learning_rate(step: int, num_steps: int, train: TrainConfig) -> float:
    """Of the optimizer step after `step` others."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, num_steps - train.warmup_steps)
    shapes = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return train.learning_rate * shapes[train.lr_scheduler]


def optimizer_step(
    engine: Any, micro_batches: Iterator[tuple[Tensor, Tensor]], is_logged: bool
) -> tuple[Tensor | None, int | None]:
    """One step of all ranks: its metrics when it is logged, and the rank whose loss forbade it, if any.

    Metrics are means over ranks and micro-batches: loss, each head's loss, each head's top-1.
    """
    num_micro = engine.gradient_accumulation_steps()
    total, metrics = torch.zeros((), device=engine.device), None
    for number, (hidden_NC, labels_NH) in enumerate(micro_batches, 1):
        hidden_NC, labels_NH = hidden_NC.to(engine.device), labels_NH.to(engine.device)
        loss, head_loss_H, top1_H = engine(hidden_NC, labels_NH, is_logged)
        total += loss.detach()
        if is_logged:
            seen = torch.cat([loss.detach().unsqueeze(0), head_loss_H, top1_H]) / num_micro
            metrics = seen if metrics is None else metrics + seen
        engine.backward(loss)
        if number == num_micro and (culprit := first_culprit(total)) is not None:
            return None, culprit
        engine.step()  # which moves the weights after the last micro-batch only
    if metrics is not None:
        dist.all_reduce(metrics)
        metrics /= dist.get_world_size()
    return metrics, None


def first_culprit(loss: Tensor) -> int | None:
    """The first rank whose loss is not finite. All ranks learn it, so all stop and none waits for another."""
    num_ranks = dist.get_world_size()
    rank = torch.where(loss.isfinite(), num_ranks, dist.get_rank())
    dist.all_reduce(rank, dist.ReduceOp.MIN)
    found = int(rank)  # the one sync of a step
    return found if found < num_ranks else None


class Journal:
    """Rank 0's record of the run: training.jsonl and TensorBoard's files in heads/."""

    def __init__(self, job: Job, history: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, since the other ranks need none

        self.job, self.history = job, history
        self.filesystem, self.folder = fsspec.core.url_to_fs(job.output)
        self.filesystem.makedirs(self.folder, exist_ok=True)
        # What a killed run had logged after its last checkpoint is logged again.
        first = history[-1]["step"] + 1 if history else 0
        is_local = "file" in self.filesystem.protocol
        self.board = SummaryWriter(f"{self.folder if is_local else job.output}/tensorboard", purge_step=first)

    def add(self, step: int, metrics: Tensor) -> None:
        """metrics: as optimizer_step returns them."""
        num_heads = self.job.heads.num_heads
        loss, *per_head = metrics.tolist()
        record = {
            "step": step,
            "epoch": round(step / self.job.steps_per_epoch, 4),
            "loss": loss,
            "learning_rate": learning_rate(step - 1, self.job.num_steps, self.job.train),
            "head_loss": per_head[:num_heads],
            "top1": per_head[num_heads:],
        }
        self.history.append(record)
        # Written whole: object stores cannot append, and what a resumed run repeats must not be there twice.
        text = "".join(json.dumps(line) + "\n" for line in self.history)
        self.filesystem.pipe_file(f"{self.folder}/{CURVE}", text.encode())
        self.board.add_scalar("loss", loss, step)
        self.board.add_scalar("learning_rate", record["learning_rate"], step)
        for head in range(num_heads):
            self.board.add_scalar(f"loss/head_{head}", record["head_loss"][head], step)
            self.board.add_scalar(f"top1/head_{head}", record["top1"][head], step)
        self.board.flush()


def save(engine: Any, step: int, journal: Journal | None) -> None:
    """A checkpoint of all ranks: each writes its shard into its own folder, and Ray Train merges these."""
    with tempfile.TemporaryDirectory() as folder:
        state = {"step": step, "history": journal.history if journal else []}
        engine.save_checkpoint(folder, tag=TAG, client_state=state)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"step": step}, checkpoint=checkpoint, checkpoint_dir_name=f"step_{step:08d}")


def restore(engine: Any) -> tuple[int, list[dict[str, Any]]]:
    """Steps done and lines logged by the newest checkpoint, whose weights the engine takes over."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0, []
    with checkpoint.as_directory() as folder:
        _, state = engine.load_checkpoint(folder, tag=TAG)
    return state["step"], state["history"]


def write_heads(engine: Any, job: Job, rank: int) -> None:
    """Rank 0 writes weights and config.json into heads/."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):  # only ZeRO-3 gathers anything
        if rank == 0:
            engine.module.heads.save(job.output, job.base)
    dist.barrier()
