"""One rank's part of a training: fed with batches, it takes DeepSpeed's steps, keeps checkpoints and the journal.

# N positions   H heads   W = H, or 1 + H where the base is trained too   C hidden   M draft vocabulary
# T positions of a row
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from medusa_ray import parts, shards
from medusa_ray.config import HeadsConfig, RunConfig, TrainConfig
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.ranks import tokens_per_step
from medusa_ray.medusa.tree import Tree
from medusa_ray.train import checkpoints
from medusa_ray.train.corpus import Corpus
from medusa_ray.train.engine import HeadTrainer, full_state, gathered, load_full_state, start
from medusa_ray.train.feed import Feed, Source, Streamed, Wanted, from_base, from_disk
from medusa_ray.train.journal import Journal
from medusa_ray.train.order import Ints, Plan
from medusa_ray.train.watch import Meter, StopFile, Trace, judge, sums_of

STOP = "stop"  # a file in training/: save and leave
STOPPED = "stopped"  # what a worker returns then


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know."""

    section: ClassVar = "train"  # of the config, where its learning rate stands
    hidden: str  # hidden/, or distilled/ where the states are streamed
    training: str
    output: str  # heads/
    base: str
    device: str
    form: Any  # a Form, or of rows
    names: list[str]  # of the parts
    held_out: list[Wanted]  # rows that are not
    num_positions: int
    token_map_M: Tensor | None  # the tokens that heads guess; None for the whole vocabulary
    tree_nodes: int  # of the tree that the held-out rows are judged by
    heads: HeadsConfig
    train: TrainConfig
    num_workers: int  # that are there
    streamed: Streamed | None

    def new_model(self, output_layer_VC: Tensor | None) -> Any:
        assert output_layer_VC is not None
        return HeadTrainer(self.heads, self.train, output_layer_VC, self.token_map_M)

    def source(self) -> Source:
        if self.streamed is None:
            return from_disk(self.hidden)
        return from_base(self.hidden, self.base, self.device, self.streamed)

    def write(self, weights: dict[str, Tensor], output_layer_VC: Tensor | None, model: Any) -> None:
        """Writes what was trained. model: as `new_model` made it, its own weights wherever DeepSpeed has left them."""
        model = self.new_model(output_layer_VC)
        model.load_state_dict(weights, strict=False)  # but for what the base shares, and the token map
        model.heads.save(self.output, self.base)

    @classmethod
    def of(cls, config: RunConfig, corpus: Corpus, token_map_M: Tensor | None, device: str) -> "Job":
        streamed = None
        if corpus.is_streamed:
            room = shards.room(
                config.train.most_workers, config.hidden.num_actors, device, config.train.accelerator_type
            )
            streamed = Streamed(config.model, config.hidden, config.data.loss_on, room)
        return cls(
            hidden=corpus.folder,
            training=parts.absolute(config.artifact("training")),
            output=parts.absolute(config.artifact("heads")),
            base=shards.base_of(config.model),
            device=device,
            form=corpus.form,
            names=corpus.names,
            held_out=corpus.held_out,
            num_positions=corpus.num_positions,
            token_map_M=token_map_M,
            tree_nodes=config.evaluate.tree_nodes,
            heads=config.heads,
            train=config.train,
            num_workers=config.train.most_workers,
            streamed=streamed,
        )

    def epoch(self, number: int) -> Plan:
        return Plan(number, ((0, self.num_positions),), self.num_workers, self.per_step)

    @property
    def per_step(self) -> int:
        """Positions of a worker: all workers that are there together take what the most would, but for rounding."""
        train = self.train
        of_all = train.gradient_accumulation_steps * train.batch_size * train.most_workers
        return -(-of_all // self.num_workers)

    @property
    def num_micro_batches(self) -> int:
        return -(-self.per_step // self.train.batch_size)


@dataclass
class State:
    """How far a run has come."""

    step: int
    plan: Plan
    done: int  # steps of the plan
    history: list[dict[str, Any]]  # lines of the journal
    best: dict[str, Any] | None = None  # {"name": of a checkpoint, "loss": x}, by the held-out loss

    @classmethod
    def of(cls, saved: dict[str, Any], job: Job) -> "State":
        """From a checkpoint, whose workers may have been others than these."""
        plan = Plan(**saved["plan"] | {"spans": tuple(map(tuple, saved["plan"]["spans"]))})
        state = cls(**saved | {"plan": plan})
        fresh = job.epoch(plan.epoch)
        if (plan.num_workers, plan.per_step) != (fresh.num_workers, fresh.per_step):
            rest = plan.rest(state.done)
            state.plan, state.done = Plan(plan.epoch, rest, fresh.num_workers, fresh.per_step), 0
        return state

    def best_is_worse_than(self, loss: float) -> bool:
        """Takes note of the checkpoint that is about to be written, if so."""
        if self.best is not None and self.best["loss"] <= loss:
            return False
        self.best = {"name": checkpoints.name_of(self.step), "loss": loss}
        return True


class Outcome(NamedTuple):
    """Of a step of all ranks."""

    figures: dict[str, Any] | None  # when it is logged: loss, head_loss, top1, top5
    culprit: str | None  # why the optimizer must not take this step
    must_stop: bool


def worker(config: dict[str, Any]) -> str | None:
    """Returns why training had to stop, or None when heads/ is written."""
    context = ray.train.get_context()
    job: Job = replace(config["job"], num_workers=context.get_world_size())
    run = Run(
        job,
        context.get_world_rank(),
        ray.get(config["output_layer"]),
        ray.get(config["counts"]),
    )
    problem = run.take_steps()
    if run.journal:
        run.journal.write()
    if problem is None:
        run.write_heads()
    return problem


class Run:
    """A rank's state, and the loop."""

    def __init__(self, job: Job, rank: int, output_layer_VC: Tensor | None, counts: list[Ints]) -> None:
        """counts: of each part, the positions of each of its rows that are trained on."""
        self.job, self.train, self.rank = job, job.train, rank
        self.output_layer_VC = output_layer_VC
        model = job.new_model(output_layer_VC)
        self.engine = start(model, job.train, job.device, job.num_micro_batches)
        self.weight_W = model.weights().to(self.engine.device)
        self.state = self._resume()
        epoch = self.state.plan.epoch
        self.plans = [self.state.plan, *map(job.epoch, range(epoch + 1, job.train.epochs))]
        feed = Feed(counts, job.names, job.train.seed, job.source(), job.form, self.rank)
        held_out = job.held_out[self.rank :: job.num_workers]
        self.held_out, self.steps = feed.open(held_out, self.plans, self.state.done, job.train.batch_size)
        self.journal = Journal(job.output, job.train, self.state.history) if self.rank == 0 else None
        self.stop = StopFile(f"{job.training}/{STOP}") if self.rank == 0 else None
        self.meter = Meter(self.engine.device, model.dtype, model.flops_per_position, job.num_workers)
        self.trace = Trace(job.train.profile_steps, job.output) if self.rank == 0 else None

    def _resume(self) -> State:
        """Rank 0 says which checkpoint: others might see another one as the newest whole."""
        checkpoint = checkpoints.newest(self.job.training) if self.rank == 0 else None
        name = agreed(checkpoint and checkpoint.name)
        if name is None:
            return State(0, self.job.epoch(0), 0, [])
        checkpoint = checkpoint or checkpoints.read(self.job.training, name)
        nothing = self.job.form.nothing().to(self.engine.device)
        zero_W = torch.zeros_like(self.weight_W)
        step = checkpoint.state["step"]
        load_full_state(
            self.engine, checkpoint.tensors, step, lambda: self.engine(nothing, zero_W, False).loss
        )
        return State.of(checkpoint.state, self.job)

    def take_steps(self) -> str | None:
        """All that are left. Returns why not, if so."""
        state = self.state
        for plan in self.plans:
            if plan is not state.plan:
                state.plan, state.done = plan, 0
            while state.done < plan.num_steps:
                if problem := self._move_on(next(self.steps)):
                    return problem
        return None

    def _move_on(self, micro_batches: list[Any]) -> str | None:
        """One step, and whatever is due after it."""
        state, train = self.state, self.train
        number, num_steps = state.step + 1, self._num_steps()
        rate = learning_rate(state.step, num_steps, train)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        is_last = number == num_steps
        is_judged = bool(self.job.held_out) and (number % train.eval_steps == 0 or is_last)
        is_logged = number % train.logging_steps == 0 or is_last or is_judged
        if self.trace:
            self.trace.before(number)
        outcome = self._step(micro_batches, is_logged)
        if outcome.culprit is not None:
            return (
                f"step={number} {outcome.culprit}. Training stopped before this step. Lower "
                f"{self.job.section}.learning_rate, now {train.learning_rate}, or mend these rows of "
                f"{self.job.hidden}; then remove {self.job.training}, which is of the run as it was."
            )
        state.step, state.done = number, state.done + 1
        if self.trace:
            self.trace.after(number)
        self.meter.count(sum(batch.num_positions for batch in micro_batches))
        held_out = self._judge() if is_judged else None
        if is_logged:
            self._record(outcome.figures, rate, held_out)
        is_best = held_out is not None and state.best_is_worse_than(held_out["loss"])
        is_due = number % train.save_steps == 0 or state.done == state.plan.num_steps
        if (is_due or is_best or outcome.must_stop) and (problem := self._save()):
            return problem
        return STOPPED if outcome.must_stop else None

    def _num_steps(self) -> int:
        """Of the whole run, as its workers are now."""
        state = self.state
        later = (self.train.epochs - state.plan.epoch - 1) * self.job.epoch(0).num_steps
        return state.step - state.done + state.plan.num_steps + later

    def _step(self, micro_batches: list[Any], is_logged: bool) -> Outcome:
        """One step of the optimizer, unless some rank's loss is not finite."""
        engine = self.engine
        # What is random in a step, as dropout is, follows from the step: a resumed run repeats it.
        draw = np.random.SeedSequence([self.train.seed, self.state.step, self.rank])
        torch.manual_seed(int(draw.generate_state(1)[0]))
        batches = [batch.to(engine.device) for batch in micro_batches]
        num_W = torch.stack([engine.module.num_losses(batch) for batch in batches]).sum(dim=0)
        dist.all_reduce(num_W)  # of the whole step, so that each label counts the same wherever it falls
        # DeepSpeed takes means over ranks and micro-batches, where sums are wanted.
        weight_W = self.weight_W * dist.get_world_size() * len(batches) / num_W.clamp(min=1)
        sums, is_finite = [], []
        for number, batch in enumerate(batches, 1):
            result = engine(batch, weight_W, is_logged)
            is_finite.append(result.loss.detach().isfinite())
            if is_logged:
                sums.append(sums_of(result))
            engine.backward(result.loss)
            if number == len(batches):
                culprit, must_stop = self._agree(torch.stack(is_finite), batches)
                if culprit is not None:
                    return Outcome(None, culprit, must_stop)
            engine.step()  # which moves the weights after the last micro-batch only
        if not is_logged:
            return Outcome(None, None, must_stop)
        return Outcome(self._figures(torch.stack(sums).sum(dim=0), num_W), None, must_stop)

    def _figures(self, sums_4W: Tensor, num_W: Tensor) -> dict[str, Any]:
        """Means over all labels of all ranks. sums_4W: loss_sum_H, num_labels_H, top1_H and top5_H of this rank."""
        dist.all_reduce(sums_4W)
        loss_W, labels_W, top1_W, top5_W = sums_4W
        mean_W = loss_W / num_W.clamp(min=1)
        top1_W, top5_W = top1_W / labels_W.clamp(min=1), top5_W / labels_W.clamp(min=1)
        num_heads = self.job.heads.num_heads
        figures = {
            "loss": (mean_W @ self.weight_W).item(),
            "head_loss": mean_W[-num_heads:].tolist(),
            "top1": top1_W[-num_heads:].tolist(),
            "top5": top5_W[-num_heads:].tolist(),
        }
        if len(mean_W) > num_heads:
            figures |= {"base_kl": mean_W[0].item(), "base_top1": top1_W[0].item()}
        return figures

    def _agree(self, is_finite: Tensor, batches: list[Any]) -> tuple[str | None, bool]:
        """What forbids the step, as the first rank that it concerns puts it, and whether to save and leave.

        All ranks learn it, so all stop and none waits for another.
        """
        num_ranks = dist.get_world_size()
        may_go_on = not (self.stop and self.stop.is_set)
        mine = torch.where(is_finite.all(), num_ranks, self.rank)
        votes = torch.stack([mine, torch.tensor(int(may_go_on), device=mine.device)])
        dist.all_reduce(votes, dist.ReduceOp.MIN)
        rank, may_go_on = votes.tolist()  # the one sync of a step
        if rank == num_ranks:
            return None, not may_go_on
        text = None
        if rank == self.rank:
            batch = batches[int(is_finite.int().argmin())]
            ids = batch.suspects()
            text = f"rank={rank}: the loss is not finite, of rows {', '.join(ids[:5])}" + (
                " ..." if ids[5:] else ""
            )
        return agreed(text, rank), not may_go_on

    # ------------------------------------------------------------------------------------------ watching

    def _record(self, figures: dict[str, Any] | None, rate: float, held_out: dict[str, Any] | None) -> None:
        assert figures is not None
        state = self.state
        steps_per_epoch = self.job.epoch(0).num_steps
        position = state.plan.epoch + 1 - (state.plan.num_steps - state.done) / steps_per_epoch
        record: dict[str, Any] = {
            "step": state.step,
            "of": self._num_steps(),
            "epoch": round(position, 4),
            "learning_rate": rate,
        }
        record |= figures | self.meter.read()
        if held_out is not None:
            record["held_out"] = held_out
        if self.journal:
            self.journal.add(record)

    @torch.no_grad()
    def _judge(self) -> dict[str, Any]:
        """Figures of the held-out rows: mean losses, top-1, top-5, and tokens per step of a chain and a tree.

        Half of the rows shape the tree and the others judge it.
        """
        seen = self.engine.module.seen(self.held_out)
        with gathered(self.engine):
            heads: MedusaHeads = self.engine.module.heads
            judged = [judge(heads, batch.to(self.engine.device)) for batch, _ in seen]
        none_W = torch.zeros_like(self.weight_W)  # a rank may hold no held-out row
        sums_4W, num_W = torch.stack([none_W] * 4), none_W
        for (sums_4H, num_H, _), (_, base_sums_4X) in zip(judged, seen, strict=True):
            base_sums_4X = base_sums_4X.to(sums_4H.device)
            sums_4W = sums_4W + torch.cat([base_sums_4X, sums_4H], dim=1)
            num_W = num_W + torch.cat([base_sums_4X[1], num_H])
        dist.all_reduce(num_W)
        mine = [rank_TH for *_, ranks in judged for rank_TH in ranks]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        ranks = [rank_TH for theirs in everyone for rank_TH in theirs]
        shaping, scoring = (ranks[::2], ranks[1::2]) if len(ranks) > 1 else (ranks, ranks)
        tree = Tree.calibrated(torch.cat(shaping), self.job.tree_nodes)
        figures = self._figures(sums_4W, num_W)
        trees = {"chain": Tree.chain(heads.num_heads), f"tree_{self.job.tree_nodes}": tree}
        return figures | {"tokens_per_step": {name: tokens_per_step(scoring, t) for name, t in trees.items()}}

    # ------------------------------------------------------------------------------------------ keeping

    def _save(self) -> str | None:
        """A checkpoint of the run as it is; or why it could not be written."""
        state, training = self.state, self.job.training
        tensors = {
            name: tensor.to("cpu", copy=True) for name, tensor in full_state(self.engine) if self.rank == 0
        }
        problem = None
        if self.rank == 0:
            try:
                checkpoints.write(training, state.step, asdict(state), tensors)
                checkpoints.keep(training, {state.best["name"]} if state.best else set())
            except OSError as error:
                problem = (
                    f"step={state.step}: the checkpoint cannot be written: {error}. Make room at {training}."
                )
        return agreed(problem)

    def write_heads(self) -> None:
        """Rank 0 writes weights and config.json into heads/, of the last checkpoint or the best."""
        if self.rank == 0:
            best = self.state.best if self.train.keep == "best" else None
            name = best["name"] if best else checkpoints.names(self.job.training)[-1]
            saved = checkpoints.read(self.job.training, name).tensors
            weights = {
                key.removeprefix("weight/"): value
                for key, value in saved.items()
                if key.startswith("weight/")
            }
            self.job.write(weights, self.output_layer_VC, self.engine.module)
        dist.barrier()


def agreed(value: Any, rank: int = 0) -> Any:
    """What this rank says, on all ranks."""
    box = [value]
    dist.broadcast_object_list(box, src=rank)
    return box[0]


def learning_rate(step: int, num_steps: int, train: TrainConfig) -> float:
    """Of the optimizer step after `step` others."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, num_steps - train.warmup_steps)
    shapes = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return train.learning_rate * shapes[train.lr_scheduler]
