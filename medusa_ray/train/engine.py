"""The heads in a DeepSpeed engine: its config, and its whole state whatever ZeRO has made of it.

# N positions   H heads   C hidden   V vocabulary
"""

import importlib
import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medusa_ray import provenance
from medusa_ray.config import HeadsConfig, TrainConfig, UserError
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.loss import HeadLoss, cross_entropy_for, medusa_loss, num_losses
from medusa_ray.train.rows import Batch

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
# Of bitsandbytes: codes and the scale of each block of 256, or moments as they are of a weight under 4,096 numbers.
# What codes stand for would not do: where a block's largest number is negative it comes back with other codes.
BLOCKS = ("state1", "state2", "absmax1", "absmax2")


class Group(TypedDict):
    """Weights of one learning rate."""

    params: list[nn.Parameter]
    share: float  # of the config's


class Seen(NamedTuple):
    """Held-out rows as the heads see them."""

    batch: Batch
    base_sums_4X: Tensor  # loss_sum_H and so on of the base, X 1 where it is trained too and 0 where not


class HeadTrainer(nn.Module):
    """What DeepSpeed wraps. The loss is inside, since ZeRO-3 gathers weights around a module's forward."""

    def __init__(
        self, heads: HeadsConfig, train: TrainConfig, output_layer_VC: Tensor, token_map_M: Tensor | None
    ) -> None:
        super().__init__()
        vocab_size, hidden_size = output_layer_VC.shape
        self.dtype = getattr(torch, train.dtype)
        torch.manual_seed(train.seed)  # low-rank terms begin at random
        self.heads = MedusaHeads(
            **heads.model_dump(exclude={"draft_vocab_size"}),
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            token_map_M=token_map_M,
            dtype=self.dtype,
        )
        self.heads.init_from(output_layer_VC.to(self.dtype))
        self.cross_entropy = cross_entropy_for(self.heads, train.batch_size)
        self.head_weight = train.head_weight
        self.flops_per_position = heads.flops_per_position(hidden_size, self.heads.draft_vocab_size)

    def groups(self) -> list[Group]:
        return [{"params": list(self.parameters()), "share": 1.0}]

    def weights(self) -> Tensor:
        """By which the mean loss of each head [H] counts."""
        return torch.full((self.heads.num_heads,), self.head_weight) ** torch.arange(self.heads.num_heads)

    def num_losses(self, batch: Batch) -> Tensor:
        return num_losses(self.heads, batch.labels_NH)

    def seen(self, held_out: list[Batch]) -> list[Seen]:
        return [Seen(batch, torch.empty(4, 0)) for batch in held_out]

    def forward(self, batch: Batch, weight_H: Tensor, with_hits: bool) -> HeadLoss:
        return medusa_loss(
            self.heads,
            batch.hidden_NC.to(self.dtype),
            batch.labels_NH,
            weight_H,
            self.cross_entropy,
            batch.teacher,
            with_hits,
        )


def start(model: Any, train: TrainConfig, device: str, num_micro_batches: int) -> Any:
    """A DeepSpeed engine around a model that names what is trained of it by `groups`.

    num_micro_batches: of a step, which are more than the config says where workers are fewer than the most.
    """
    import deepspeed  # here, since it looks for an accelerator, which the driver need not have

    if device == "cpu":
        torch.set_num_threads(1)  # a worker has one CPU
    torch.backends.cuda.matmul.allow_tf32 = train.tf32
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    meet(device)
    config = deepspeed_config(train) | {"gradient_accumulation_steps": num_micro_batches}
    optimizer = None
    if "optimizer" not in config:
        optimizer = new_optimizer(model.groups(), train)
    parameters = None if optimizer else model.groups()
    engine = deepspeed.initialize(
        model=model, optimizer=optimizer, model_parameters=parameters, config=config
    )[0]
    set_step(engine, 0)  # ZeRO 0 in bf16 has taken a step already, of nothing, that Adam would count
    return engine


def meet(device: str) -> None:
    """Has DeepSpeed talk to the other ranks the way that torch does."""
    import deepspeed

    # On a CPU DeepSpeed compiles an operator of its inference for a minute, and fails without a compiler.
    # Training never calls it. deepspeed 0.19 has no switch for that; drop this when it has one.
    comm: Any = importlib.import_module("deepspeed.comm.torch")
    if device == "cpu" and hasattr(comm, "build_shm_op"):
        comm.build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend=dist.get_backend())


def new_optimizer(groups: list[Any], train: TrainConfig) -> torch.optim.Optimizer:
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=train.weight_decay, fused=True)
    from bitsandbytes.optim import AdamW8bit

    eight_bit: torch.optim.Optimizer = AdamW8bit(groups, weight_decay=train.weight_decay)
    return eight_bit


def deepspeed_config(train: TrainConfig) -> dict[str, Any]:
    """TrainConfig in DeepSpeed's words, and a file of the user's own on top.

    Raises UserError where that file says something else than the config, or cannot be read, and where the optimizer is
    of a package that is not installed.
    """
    if train.optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise UserError(
            "train.optimizer is 'adamw_8bit', but its package is not installed: pip install \"medusa_ray[quantized]\", "
            "or set train.optimizer to 'adamw'."
        )
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {"stage": train.zero_stage},
        "bf16": {"enabled": train.dtype == "bfloat16"},
        "steps_per_print": 2**62,  # our own lines say more
    }
    if train.deepspeed is None:
        return derived
    try:
        own = provenance.read_json(train.deepspeed)
    except (OSError, ValueError) as error:
        raise UserError(f"train.deepspeed is {train.deepspeed!r}, which cannot be read: {error}") from error
    config = merged(derived, own, train.deepspeed)
    if train.optimizer != "adamw" and "optimizer" in config:
        raise UserError(
            f"{train.deepspeed} has an optimizer, but train.optimizer is {train.optimizer!r}. Take the section out, or "
            "set train.optimizer to 'adamw', which such a section replaces."
        )
    return config


KEYS = {  # where the config says what a DeepSpeed file may say too
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "zero_optimization.stage": "train.zero_stage",
    "bf16.enabled": "train.dtype",
}


def merged(derived: dict[str, Any], own: dict[str, Any], file: str) -> dict[str, Any]:
    """`auto` in the file is what the config says, as in files that were written for transformers' Trainer."""
    if "scheduler" in own and not is_auto(own["scheduler"].get("params")):
        raise UserError(
            f"{file} has a scheduler, but learning rates follow train.lr_scheduler and train.warmup_steps. "
            "Take the section out."
        )
    if own.get("fp16", {}).get("enabled") is True:
        raise UserError(f"{file} enables fp16, but heads train in float32 or bfloat16: set train.dtype.")
    left_out = {"scheduler", "fp16", "train_batch_size"}
    if is_auto(own.get("optimizer", {}).get("params")):
        left_out.add("optimizer")

    def merge(ours: dict[str, Any], theirs: dict[str, Any], prefix: str) -> dict[str, Any]:
        result = dict(ours)
        for key, value in theirs.items():
            dotted = f"{prefix}{key}"
            if isinstance(value, dict):
                result[key] = merge(ours.get(key, {}), value, f"{dotted}.")
            elif value == "auto":
                continue  # ours, or DeepSpeed's default
            elif dotted in KEYS and value != ours[key]:
                raise UserError(
                    f"{file} says {dotted}: {value}, but {KEYS[dotted]} makes it {ours[key]}. Write 'auto' there, "
                    f"or change {KEYS[dotted]}."
                )
            else:
                result[key] = value
        return result

    return merge(derived, {key: value for key, value in own.items() if key not in left_out}, "")


def is_auto(params: dict[str, Any] | None) -> bool:
    return bool(params) and set((params or {}).values()) == {"auto"}


# ------------------------------------------------------------------------------------------------------ state


def optimizer_of(engine: Any) -> Any:
    """torch's own optimizer, from under whatever ZeRO has wrapped around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def gathered(engine: Any) -> Any:
    """A context in which the heads' weights are there; ZeRO-3 shards them."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(engine.module.heads.parameters()))


def trained(engine: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in engine.module.named_parameters() if weight.requires_grad]


def full_state(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights in fp32 and moments of the optimizer by name, each whole, whatever ZeRO's stage and the number of ranks:
    of what is trained. Moments in 8 bits are as the optimizer has them.

    All ranks must ask for all of them, since each holds a part.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    masters = unsharded_masters(engine)
    link_moments(engine)
    for name, weight in trained(engine):
        if masters is None:
            yield f"weight/{name}", safe_get_full_fp32_param(weight)
            for moment in MOMENTS:
                yield f"{moment}/{name}", safe_get_full_optimizer_state(weight, moment)
        else:
            yield f"weight/{name}", masters[weight].detach()
            for moment, value in moments_of(engine, masters[weight]).items():
                yield f"{moment}/{name}", value


def load_full_state(engine: Any, tensors: dict[str, Tensor], step: int, idle: Callable[[], Tensor]) -> None:
    """Takes over what `full_state` gave after so many steps of the optimizer.

    idle: makes a loss without gradients, of a micro-batch that teaches nothing.
    """
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(engine.gradient_accumulation_steps()):  # an optimizer makes its state in its first step
        engine.backward(idle())
        engine.step()
    masters = unsharded_masters(engine)
    link_moments(engine)
    set_step(engine, step)
    for name, weight in trained(engine):
        value = tensors[f"weight/{name}"].to(engine.device)
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            weight.data.copy_(value)
        if masters is None:
            safe_set_full_fp32_param(weight, value)
            for moment in MOMENTS:
                value = tensors[f"{moment}/{name}"].to(engine.device)
                safe_set_full_optimizer_state(weight, value, moment)
        else:
            masters[weight].data.copy_(value)
            for moment, held in moments_of(engine, masters[weight]).items():
                held.copy_(tensors[f"{moment}/{name}"])


def set_step(engine: Any, step: int) -> None:
    """Of how many steps the optimizer corrects the bias: a tensor of torch's, a number of bitsandbytes'."""
    for state in optimizer_of(engine).state.values():
        state["step"] = state["step"].fill_(step) if torch.is_tensor(state["step"]) else step


def moments_of(engine: Any, master: Tensor) -> dict[str, Tensor]:
    """Of a weight that is not sharded."""
    state = optimizer_of(engine).state[master]
    return {name: state[name] for name in MOMENTS + BLOCKS if name in state}


def link_moments(engine: Any) -> None:
    """ZeRO 1 and 2 tell weights of their moments once the first group of them has taken a step, when the others have
    none yet. deepspeed 0.19 never does so again; drop this when it waits for the last."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def unsharded_masters(engine: Any) -> dict[Tensor, Tensor] | None:
    """The fp32 weight of each weight with ZeRO 0, where DeepSpeed's own way to them does not work."""
    if engine.zero_optimization_stage():
        return None
    if not hasattr(engine.optimizer, "fp32_groups"):
        return {weight: weight for _, weight in trained(engine)}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {weight: master for pair in groups for weight, master in zip(*pair, strict=True)}
