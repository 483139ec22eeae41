"""distilled/ and heads -> an adapter on the base, and heads that were trained together with it: Medusa-2.

The base learns to have states from which heads can guess, while its divergence from itself without the adapter keeps
what it says (arXiv 2401.10774, 2.2.2 and its self-distillation). Rows take the place of positions: each step passes
whole rows through the base, with the adapter and without.

# N positions   H heads   W = 1 + H: the base, which says the next token, and the heads   C hidden   V vocabulary
# K tokens that the base names for a label, none with hard labels
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medusa_ray import parts, records, shards
from medusa_ray.config import JointConfig, ModelConfig, RunConfig, TrainConfig, UserError
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.loss import (
    IGNORED,
    HeadLoss,
    Teacher,
    cross_entropy_for,
    labels_for,
    medusa_loss,
    num_losses,
)
from medusa_ray.states import leaves_labels
from medusa_ray.train.corpus import is_held_out, share_held_out
from medusa_ray.train.engine import Group, Seen, deepspeed_config, meet
from medusa_ray.train.feed import Source, Wanted, from_disk
from medusa_ray.train.order import Ints
from medusa_ray.train.rows import Batch
from medusa_ray.train.worker import Job

# transformers and peft are imported where they are used: the driver, and training of heads alone, need neither.

LOGITS_AT_ONCE = 2**26  # numbers: 256 MiB in float32
ADAPTER = "base."  # how names of trained tensors begin that are not the heads'


# ------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    row_id: str
    input_ids: list[int]
    position: range  # where the base is asked for the next token, and each head for a later one
    labels_NW: Tensor


@dataclass(frozen=True)
class Rows:
    rows: list[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, where: Any) -> "Rows":
        """Some of the rows, by a slice or by their numbers."""
        return Rows(self.rows[where] if isinstance(where, slice) else [self.rows[number] for number in where])

    def to(self, device: torch.device) -> "Rows":
        """Itself: what goes to a device is made of it in the forward pass."""
        return self

    @property
    def num_positions(self) -> int:
        """Tokens that pass through the base."""
        return sum(len(row.input_ids) for row in self.rows)

    def suspects(self) -> list[str]:
        return sorted(row.row_id for row in self.rows)


@dataclass(frozen=True)
class RowForm:
    """What the tables of distilled/ are read for."""

    num_heads: int
    loss_on: str

    def batch(self, table: pa.Table) -> Rows:
        return Rows([self._row(row) for row in table.to_pylist()])

    def nothing(self) -> Rows:
        """A row without a label."""
        return Rows([Row("", [0, 0], range(1), torch.full((1, 1 + self.num_heads), IGNORED))])

    def joined(self, batches: list[Rows]) -> Rows:
        return Rows([row for batch in batches for row in batch.rows])

    def _row(self, row: dict[str, Any]) -> Row:
        found = records.hidden_row(row["id"], row["prompt_ids"], row["reply_ids"], b"", self.loss_on)
        ids = found["input_ids"]
        position = range(records.first_position(len(row["prompt_ids"]), self.loss_on), len(ids) - 1)
        # The base is the head before the first: at the position before, that head would be asked for the same token.
        labels_NW = labels_for(
            torch.tensor(ids),
            torch.tensor(found["label_mask"]),
            torch.tensor(position) - 1,
            1 + self.num_heads,
        )
        return Row(row["id"], ids, position, labels_NW)


def survey(distilled: str, config: RunConfig) -> tuple[list[Ints], list[Wanted]]:
    """For each row of each part whether it is trained on, 0 or 1, and the rows that are held out.

    Raises UserError when there are fewer rows than workers.
    """
    names = parts.names(distilled)
    share = share_held_out(distilled, config.train)
    counts, held_out = [], []
    for name in names:
        rows = parts.read(distilled, name).to_pylist()
        is_usable_R = np.array([leaves_labels(row, config.data.loss_on) for row in rows], dtype=bool)
        is_held_R = np.array([is_held_out(row["id"], share) for row in rows], dtype=bool)
        counts.append((is_usable_R & ~is_held_R).astype(np.int64))
        if len(held_R := np.flatnonzero(is_usable_R & is_held_R)):
            held_out.append((name, held_R))
    if (num_rows := sum(int(count_R.sum()) for count_R in counts)) < config.train.most_workers:
        raise UserError(
            f"{distilled} has {num_rows} rows with a label, and train.num_workers={config.train.num_workers} want one "
            "each at least. Give more chats."
        )
    return counts, held_out


# ------------------------------------------------------------------------------------------------------ module


class Outcome(NamedTuple):
    """Of some rows."""

    result: HeadLoss  # of W
    states_NC: Tensor
    teacher: Teacher


class JointTrainer(nn.Module):
    """What DeepSpeed wraps: the base, whose adapter alone is trained, and the heads."""

    output_VC: Tensor

    def __init__(
        self,
        model: ModelConfig,
        base: str,
        device: str,
        warm_heads: str,
        train: TrainConfig,
        joint: JointConfig,
        top_k: int,
    ) -> None:
        """base, device: model.base and model.device as this process finds them. warm_heads: URI. top_k: K.

        Raises ValueError when the base cannot be loaded, or not be trained in this way.
        """
        super().__init__()
        from medusa_ray.medusa.base import load
        from medusa_ray.medusa.states import has_plain_logits

        self.train_config, self.joint, self.top_k = train, joint, top_k
        self.dtype = getattr(torch, train.dtype)
        base_dtype = torch.bfloat16 if train.dtype == "bfloat16" else getattr(torch, model.dtype)
        bare = without_weights(base, model.revision)
        self.num_base_parameters = bare.num_parameters(exclude_embeddings=True)
        self._logits: Callable[[Tensor], Tensor] = (
            self._plain_logits if has_plain_logits(bare) else self._own_logits
        )
        # DeepSpeed takes a base apart as it loads in its own dtype only, and not in four bits.
        is_sharded = joint.zero_stage == 3 and dist.is_initialized()
        if is_sharded and model.quantization == "none" and base_dtype == self.dtype:
            with taken_apart(train, device):
                loaded = load(base, base_dtype, device, model.revision).requires_grad_(False)
            output_VC = whole(loaded.get_output_embeddings().weight)
        else:
            loaded = load(base, base_dtype, device, model.revision, model.quantization).requires_grad_(False)
            output_VC = loaded.get_output_embeddings().weight.detach()
        # Of its own, as ZeRO-3 takes the base's apart; elsewhere it is the very tensor.
        self.register_buffer("output_VC", output_VC, persistent=False)
        torch.manual_seed(train.seed)  # half of an adapter begins at random
        self.base, self.is_adapted = adapted(loaded, joint, base, model.revision), True
        if joint.gradient_checkpointing:
            for layer in layers_of(loaded):
                # As transformers would, but it does so in training mode only, where layers have dropout of their own.
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        self.heads = MedusaHeads.load(warm_heads, self.dtype, device)
        if self.heads.shares_output:
            self.heads.init_from(output_VC.to(self.dtype))
        self.train()

    @cached_property
    def is_packable(self) -> bool:
        """Measured in the first pass, since there is no other before DeepSpeed can put a base together."""
        from medusa_ray.medusa.states import is_packable

        with self._without_adapter():
            return is_packable(self.base.get_base_model())

    @property
    def flops_per_position(self) -> float:
        """Of the base: forward with and without the adapter, and back through it. Heads see few of the positions."""
        return 6 * self.num_base_parameters

    def train(self, mode: bool = True) -> "JointTrainer":
        super().train(mode)
        # A base's own dropout would set it apart from itself.
        for name, module in self.base.named_modules():
            module.training = mode and ".lora_dropout." in name
        return self

    def groups(self) -> list[Group]:
        adapter = [weight for weight in self.base.parameters() if weight.requires_grad]
        share = self.joint.heads_learning_rate / self.joint.learning_rate
        return [{"params": adapter, "share": 1.0}, {"params": list(self.heads.parameters()), "share": share}]

    def weights(self) -> Tensor:
        """By which the mean losses of the base and of each head [W] count."""
        weight_H = self.train_config.head_weight ** torch.arange(self.heads.num_heads)
        return torch.cat([torch.ones(1), self.joint.heads_weight * weight_H])

    def num_losses(self, batch: Rows) -> Tensor:
        labels_NW = self._labels(batch)
        return torch.cat([(labels_NW[:, :1] != IGNORED).sum(dim=0), num_losses(self.heads, labels_NW[:, 1:])])

    def forward(self, batch: Rows, weight_W: Tensor, with_hits: bool) -> HeadLoss:
        """Figures are of the base, whose loss is its divergence from itself without the adapter, and of the heads."""
        return self._outcome(batch, weight_W, with_hits).result

    def _outcome(self, batch: Rows, weight_W: Tensor, with_hits: bool) -> Outcome:
        with torch.no_grad(), self._without_adapter():
            own_NC = self.states(batch)
        states_NC = self.states(batch)
        labels_NW = self._labels(batch)
        sums, *said_NK = self._divergence(states_NC, own_NC, labels_NW[:, 0])
        # What head k is asked for, the base says k + 1 positions later, or nobody is asked: then any row will do.
        later_NH = torch.arange(len(own_NC)).unsqueeze(1) + torch.arange(1, self.heads.num_heads + 1)
        later_NH = later_NH.clamp(max=len(own_NC) - 1).to(own_NC.device)
        teacher = Teacher(*(some_NK[later_NH] for some_NK in said_NK))
        found = medusa_loss(
            self.heads,
            states_NC.to(self.dtype),
            labels_NW[:, 1:],
            weight_W[1:],
            cross_entropy_for(self.heads, len(states_NC)),
            teacher,
            with_hits,
        )
        top1_W = None if found.top1_H is None else torch.cat([sums[1:2], found.top1_H])
        top5_W = None if found.top5_H is None else torch.cat([sums[2:3], found.top5_H])
        result = HeadLoss(
            sums[0] * weight_W[0] + found.loss,
            torch.cat([sums[:1].detach(), found.loss_sum_H]),
            (labels_NW != IGNORED).sum(dim=0),
            top1_W,
            top5_W,
        )
        return Outcome(result, states_NC, teacher)

    def states(self, batch: Rows) -> Tensor:
        """The base's states [N, C] at all positions of all rows, in their order."""
        from medusa_ray.medusa.states import packs, states_of_pass

        lengths = [len(row.input_ids) for row in batch.rows]
        (rows,) = packs(lengths, len(lengths) * max(lengths), shares_rows=self.is_packable)
        tokens: Any = [[batch.rows[number].input_ids for number in row] for row in rows]
        wanted: Any = [[batch.rows[number].position for number in row] for row in rows]
        found_NC = states_of_pass(self.base.get_base_model(), tokens, wanted, self.is_packable)
        numbers = [number for row in rows for number in row]
        pieces = found_NC.split([len(batch.rows[number].position) for number in numbers])
        return torch.cat(
            [piece for _, piece in sorted(zip(numbers, pieces, strict=True), key=lambda pair: pair[0])]
        )

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        was_adapted, self.is_adapted = self.is_adapted, False
        self.base.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            self.is_adapted = was_adapted
            if was_adapted:  # one such context may be inside another
                self.base.base_model.enable_adapter_layers()

    def _divergence(
        self, states_NC: Tensor, own_NC: Tensor, label_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Summed KL(without the adapter || with it) where there is a label, and how many labels it has first, and among
        its five likeliest [3]; ids and log-probabilities [N, K] of what the base says next without the adapter. Full
        logits never exist.
        """
        size = max(1, LOGITS_AT_ONCE // len(self.output_VC))
        chunks = zip(states_NC.split(size), own_NC.split(size), label_N.split(size), strict=True)
        found = [
            checkpoint(self._divergence_of, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
        sums, ids, logprobs = zip(*found, strict=True)
        return torch.stack(sums).sum(dim=0), torch.cat(ids), torch.cat(logprobs)

    def _divergence_of(
        self, states_NC: Tensor, own_NC: Tensor, label_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits_NV = self._logits(states_NC).float()
        with torch.no_grad():
            own_NV = self._logits(own_NC).float().log_softmax(dim=1)
            is_hit_NK = logits_NV.topk(min(5, logits_NV.shape[1])).indices == label_N[:, None]
        losses_N = F.kl_div(logits_NV.log_softmax(dim=1), own_NV, reduction="none", log_target=True).sum(
            dim=1
        )
        sums = torch.stack(
            [losses_N.where(label_N != IGNORED, 0).sum(), is_hit_NK[:, 0].sum(), is_hit_NK.sum()]
        )
        said = own_NV.topk(self.top_k)
        return sums, said.indices.int(), said.values

    def _plain_logits(self, states_NC: Tensor) -> Tensor:
        return F.linear(states_NC, self.output_VC)

    def _own_logits(self, states_NC: Tensor) -> Tensor:
        from medusa_ray.medusa.states import logits_of

        return logits_of(self.base.get_base_model(), states_NC)

    def _labels(self, batch: Rows) -> Tensor:
        return torch.cat([row.labels_NW for row in batch.rows]).to(self.output_VC.device)

    @torch.no_grad()
    def seen(self, held_out: list[Rows]) -> list[Seen]:
        """The states of the adapted base, and how far it is from itself."""
        size = self.train_config.batch_size
        batches = [rows[first : first + size] for rows in held_out for first in range(0, len(rows), size)]
        # Every rank passes as often, since ZeRO-3 gathers the base from all of them; what is added counts nothing.
        num_batches = torch.tensor(len(batches), device=self.output_VC.device)
        dist.all_reduce(num_batches, dist.ReduceOp.MAX)
        form = RowForm(self.heads.num_heads, "")
        batches += [form.nothing()] * (int(num_batches) - len(batches))
        self.eval()
        zero_W = self.weights().to(self.output_VC.device) * 0
        found = []
        for batch in batches:
            result, states_NC, teacher = self._outcome(batch, zero_W, True)
            assert result.top1_H is not None
            assert result.top5_H is not None
            figures = result.loss_sum_H, result.num_labels_H, result.top1_H, result.top5_H
            sums_41 = torch.stack([figure[:1].float() for figure in figures])
            id_N = np.repeat([row.row_id for row in batch.rows], [len(row.position) for row in batch.rows])
            found.append(Seen(Batch(states_NC, self._labels(batch)[:, 1:], teacher, id_N), sums_41))
        self.train()
        return found


def without_weights(base: str, revision: str | None) -> Any:
    """The model of a base on the meta device."""
    from transformers import AutoModelForCausalLM

    from medusa_ray.medusa.base import text_config

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(text_config(base, revision))


@contextmanager
def taken_apart(train: TrainConfig, device: str) -> Iterator[None]:
    """A context in which each rank keeps its part of a model as transformers loads it, and never has the whole."""
    from transformers.integrations import HfDeepSpeedConfig

    meet(device)
    config: Any = HfDeepSpeedConfig(deepspeed_config(train))
    yield
    del config  # transformers goes by whether there is one


def whole(weight: Any) -> Tensor:
    """A copy of a weight that was taken apart."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


def layers_of(base: Any) -> list[Any]:
    """What transformers knows to be fit for a second computation: attention and MLP, again and again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]


def adapted(base: Any, joint: JointConfig, name: str, revision: str | None) -> Any:
    """The base with a fresh adapter, which changes nothing yet. Raises ValueError for targets that it does not have."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=joint.rank,
        lora_alpha=joint.alpha,
        lora_dropout=joint.dropout,
        target_modules=joint.targets,
        base_model_name_or_path=name,
        revision=revision,
    )
    model: Any = get_peft_model(base, config)
    if any(weight.requires_grad for weight in base.get_output_embeddings().parameters()):
        raise ValueError(
            "the output layer is among them, which stays as it is: heads share it, or began as copies"
        )
    return model


def check(config: RunConfig) -> None:
    """Raises UserError for a base or for joint.targets that cannot be trained, no weight being loaded for that."""
    from medusa_ray.medusa.base import fetched, under_adapter
    from medusa_ray.medusa.states import has_plain_logits

    assert config.joint is not None
    base, revision = config.model.base, config.model.revision
    if under_adapter(fetched(base), revision)[0] != fetched(base):
        raise UserError(
            f"model.base is {base}, an adapter, and joint training would put another one on top. Merge it, save the "
            "model, and set model.base to that folder."
        )
    model = without_weights(base, revision)
    if config.joint.zero_stage == 3 and not has_plain_logits(model):
        raise UserError(
            f"joint.zero_stage is 3, but {base} scales, caps or shifts what its output layer says, which joint "
            "training does by passes of the base that ZeRO-3 cannot tell apart. Set joint.zero_stage to 2."
        )
    try:
        adapted(model, config.joint, base, revision)
    except ValueError as error:
        raise UserError(
            f"joint.targets is {config.joint.targets!r}: {error}. Name linear layers of {base}."
        ) from error
    if config.joint.gradient_checkpointing and not layers_of(model):
        raise UserError(
            f"joint.gradient_checkpointing is on, but {base} has no layers that transformers could compute a second "
            "time. Set it to false."
        )


# --------------------------------------------------------------------------------------------------------- job


@dataclass(frozen=True)
class JointJob(Job):
    """A Job whose positions are rows of distilled/."""

    section = "joint"
    warm_heads: str
    adapter: str
    model: ModelConfig
    joint: JointConfig
    top_k: int

    @classmethod
    def of_rows(
        cls, config: RunConfig, counts: list[Ints], held_out: list[Wanted], device: str
    ) -> "JointJob":
        assert config.joint is not None
        folders = {
            name: parts.absolute(config.artifact(name))
            for name in ("distilled", "warm_heads", "heads", "adapter", "joint_training")
        }
        return cls(
            hidden=folders["distilled"],
            training=folders["joint_training"],
            output=folders["heads"],
            base=shards.base_of(config.model),
            device=device,
            form=RowForm(config.heads.num_heads, config.data.loss_on),
            names=parts.names(folders["distilled"]),
            held_out=held_out,
            num_positions=int(sum(count_R.sum() for count_R in counts)),
            token_map_M=None,  # the heads bring theirs
            tree_nodes=config.evaluate.tree_nodes,
            heads=config.heads,
            train=settings_of(config.train, config.joint),
            num_workers=config.train.most_workers,
            streamed=None,
            warm_heads=folders["warm_heads"],
            adapter=folders["adapter"],
            model=config.model,
            joint=config.joint,
            top_k=config.hidden.top_k if config.train.labels == "soft" else 0,
        )

    def new_model(self, output_layer_VC: Tensor | None) -> Any:
        return JointTrainer(
            self.model, self.base, self.device, self.warm_heads, self.train, self.joint, self.top_k
        )

    def source(self) -> Source:
        return from_disk(self.hidden)

    def write(self, weights: dict[str, Tensor], output_layer_VC: Tensor | None, model: Any) -> None:
        """Writes adapter/, which is a base wherever one is asked for, and heads/."""
        filesystem, path = fsspec.core.url_to_fs(self.adapter)
        filesystem.makedirs(path, exist_ok=True)
        tensors = {
            name.removeprefix(ADAPTER).replace(".default.", "."): value.to(model.dtype).contiguous()
            for name, value in weights.items()
            if name.startswith(ADAPTER)
        }
        whole = safetensors.torch.save(tensors, metadata={"format": "pt"})
        filesystem.pipe_file(f"{path}/adapter_model.safetensors", whole)
        described = model.base.peft_config["default"].to_dict() | {"inference_mode": True}
        text = json.dumps(described, indent=2, sort_keys=True, default=sorted) + "\n"
        filesystem.pipe_file(f"{path}/adapter_config.json", text.encode())
        heads = MedusaHeads.load(self.warm_heads, model.dtype)
        own = {
            name.removeprefix("heads."): value for name, value in weights.items() if name.startswith("heads.")
        }
        heads.load_state_dict(own, strict=False)  # but for the token map
        heads.save(self.output, self.adapter)


def settings_of(train: TrainConfig, joint: JointConfig) -> TrainConfig:
    """`train` where `joint` says nothing else."""
    return train.model_copy(update={key: value for key, value in joint if key in TrainConfig.model_fields})
