"""What training costs when the base is run anew in each epoch, once, or not at all. No Ray, no DeepSpeed, one process.

    python tests/training_speed.py --distilled medusa-demo/distilled           # the demo's rows on its base
    python tests/training_speed.py --shape llama-8b --device cuda --dtype bfloat16    # random weights and tokens

Three arms train the same heads for the same epochs on the same rows, in turns. Online: each batch of rows, padded to
its longest, goes through the base, then its labels through the heads. Cached: one packed pass of the base, then batches
of as many labels from its states. Captured: the states are there, for distillation computed them anyway.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_ray.medusa import base
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.loss import cross_entropy_for, labels_for, medusa_loss, num_losses
from medusa_ray.medusa.states import PackedBase

SHIPPED = Path(__file__).parents[1] / "medusa_ray/demo/base"
SHAPES = {  # hidden, layers, heads, key-value heads, feed-forward, vocabulary
    "tiny": (64, 2, 4, 2, 128, 512),
    "llama-8b": (4096, 32, 32, 8, 14336, 128256),
}


@dataclass
class Row:
    token_ids: list[int]
    num_prompt: int

    @property
    def positions(self) -> range:
        return range(self.num_prompt - 1, len(self.token_ids) - 2)


@dataclass
class Setting:
    model: Any
    heads: MedusaHeads
    rows: list[Row]
    rows_per_batch: int
    labels_per_batch: int
    pass_tokens: int

    def fresh(self) -> "Trainer":
        self.heads.init_from(self.model.get_output_embeddings().weight)
        for head in range(self.heads.num_heads):
            for layer in range(self.heads.num_layers):
                for parameter in self.heads.block(head, layer).parameters():
                    torch.nn.init.zeros_(parameter)
        return Trainer(self.heads, self.labels_per_batch)


class Trainer:
    """One optimizer step after the other."""

    def __init__(self, heads: MedusaHeads, labels_per_batch: int) -> None:
        self.heads, self.cross_entropy = heads, cross_entropy_for(heads, labels_per_batch)
        self.optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
        self.losses: list[Tensor] = []

    def step(self, hidden_NC: Tensor, labels_NH: Tensor) -> None:
        weight_H = 1 / num_losses(self.heads, labels_NH).clamp(min=1)
        loss = medusa_loss(
            self.heads, hidden_NC, labels_NH, weight_H, self.cross_entropy, with_hits=False
        ).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())


def labels_of(row: Row, num_heads: int) -> Tensor:
    token_ids = torch.tensor(row.token_ids)
    return labels_for(
        token_ids, torch.arange(len(token_ids)) >= row.num_prompt, torch.tensor(row.positions), num_heads
    )


def online(setting: Setting, epochs: int) -> Trainer:
    trainer, body = setting.fresh(), setting.model.base_model
    device = setting.model.device
    for epoch in range(epochs):
        order = random.Random(epoch).sample(setting.rows, len(setting.rows))
        for first in range(0, len(order), setting.rows_per_batch):
            rows = order[first : first + setting.rows_per_batch]
            longest = max(len(row.token_ids) for row in rows)
            # Padding stands on the right, where causal attention never looks.
            token_BT = torch.tensor([row.token_ids + [0] * (longest - len(row.token_ids)) for row in rows])
            with torch.inference_mode():
                hidden_BTC = body(input_ids=token_BT.to(device), use_cache=False).last_hidden_state
                states = [own_TC[row.positions] for row, own_TC in zip(rows, hidden_BTC, strict=True)]
                hidden_NC = torch.cat(states)
            labels = [labels_of(row, setting.heads.num_heads) for row in rows]
            trainer.step(hidden_NC.clone(), torch.cat(labels).to(device))
    return trainer


def run_base(setting: Setting) -> Tensor:
    packed = PackedBase(setting.model, setting.pass_tokens)
    return torch.cat(
        packed.states([row.token_ids for row in setting.rows], [row.positions for row in setting.rows])
    )


def from_states(setting: Setting, hidden_NC: Tensor, epochs: int) -> Trainer:
    trainer, device = setting.fresh(), setting.model.device
    labels_NH = torch.cat([labels_of(row, setting.heads.num_heads) for row in setting.rows])
    for epoch in range(epochs):
        order_N = torch.randperm(len(labels_NH), generator=torch.Generator().manual_seed(epoch))
        for own_N in order_N.split(setting.labels_per_batch):
            trainer.step(hidden_NC[own_N.to(hidden_NC.device)].to(device), labels_NH[own_N].to(device))
    return trainer


# ---------------------------------------------------------------------------------------------------- inputs


def distilled(folder: str, num_rows: int) -> Iterator[Row]:
    from medusa_ray import parts

    for name in parts.names(folder):
        for row in parts.read(folder, name).to_pylist():
            if row["error"] is None and len(row["reply_ids"]) > 2 and num_rows:
                num_rows -= 1
                yield Row(row["prompt_ids"] + row["reply_ids"], len(row["prompt_ids"]))


def made_up(num_rows: int, num_tokens: int, num_prompt: int, vocab_size: int) -> Iterator[Row]:
    numbers = random.Random(0)
    for _ in range(num_rows):
        yield Row([numbers.randrange(vocab_size) for _ in range(num_tokens)], num_prompt)


def random_model(shape: str, dtype: torch.dtype, device: str) -> Any:
    hidden, layers, heads, kv_heads, ffn, vocab = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=ffn, vocab_size=vocab, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # or an 8 B model would first be there in float32
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------- measuring


def flops_per_label(setting: Setting) -> float:
    """Of the heads, forward and backward, as mathematics has them."""
    heads = setting.heads
    square, output = heads.hidden_size**2, heads.hidden_size * heads.draft_vocab_size
    return heads.num_heads * (
        6 * heads.num_layers * square - 2 * square + (6 if heads.layout == "own" else 4) * output
    )


def flops_per_token(setting: Setting) -> float:
    """Of the base's layers, attention to other tokens left out."""
    model = setting.model
    outside = model.get_output_embeddings().weight.numel() + model.get_input_embeddings().weight.numel()
    return 2 * (model.num_parameters() - outside)


def timed(work: Any, device: torch.device) -> tuple[float, Any]:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    started_s = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - started_s, result


def measure(setting: Setting, epochs: int, rounds: int) -> dict[str, Any]:
    """Seconds of each arm, the median of rounds."""
    device = setting.model.device
    seconds: dict[str, list[float]] = {name: [] for name in ("online", "pass", "captured")}
    for number in range(rounds + 1):
        found: dict[str, float] = {}
        pass_s, hidden_NC = timed(lambda: run_base(setting), device)
        found["pass"] = pass_s
        # The first round warms up, in one epoch.
        turns = {
            "online": lambda n=epochs if number else 1: online(setting, n),
            "captured": lambda n=epochs if number else 1, states=hidden_NC: from_states(setting, states, n),
        }
        for name in list(turns) if number % 2 else reversed(list(turns)):
            found[name], trainer = timed(turns[name], device)
            assert torch.stack(trainer.losses).isfinite().all()
        for name, taken_s in found.items():
            if number:
                seconds[name].append(taken_s)
        print(json.dumps({"round": number, **found}), flush=True)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    num_labels = sum(len(row.positions) for row in setting.rows)
    num_tokens = sum(len(row.token_ids) for row in setting.rows)
    cached_s = median["pass"] + median["captured"]
    work = epochs * num_labels * flops_per_label(setting)
    passes = epochs * num_tokens * flops_per_token(setting)
    result = {
        "rows": len(setting.rows), "tokens": num_tokens, "labels": num_labels, "epochs": epochs, "rounds": rounds,
        "online_s": median["online"], "pass_s": median["pass"], "captured_s": median["captured"],
        "cached_over_online": cached_s / median["online"],
        "captured_over_online": median["captured"] / median["online"],
        "online_tokens_per_s": epochs * num_tokens / median["online"],
        "cached_labels_per_s": epochs * num_labels / median["captured"],
        "online_tflops": (work + passes) / median["online"] / 1e12,
        "captured_tflops": work / median["captured"] / 1e12,
    }  # fmt: skip
    if device.type == "cuda":
        result |= {
            "gpu": torch.cuda.get_device_name(),
            "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--distilled", help="distilled/ of a run of the demo's base; rows are made up without it"
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny", help="of a base with random weights")
    parser.add_argument("--layout", choices=["own", "shared", "lowrank"], default=None)
    parser.add_argument("--num-rows", type=int, default=256)
    parser.add_argument("--num-tokens", type=int, default=2048, help="of a row that is made up")
    parser.add_argument("--num-prompt", type=int, default=1, help="of these, tokens of the prompt")
    parser.add_argument("--rows-per-batch", type=int, default=16)
    parser.add_argument("--labels-per-batch", type=int, default=512)
    parser.add_argument("--pass-tokens", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    if arguments.distilled:
        model = base.load(str(SHIPPED), dtype, arguments.device)
        rows = list(distilled(arguments.distilled, arguments.num_rows))
    else:
        model = random_model(arguments.shape, dtype, arguments.device)
        sizes = arguments.num_rows, arguments.num_tokens, arguments.num_prompt
        rows = list(made_up(*sizes, model.config.vocab_size))
    layout = arguments.layout or ("own" if arguments.distilled else "shared")
    vocab_size, hidden_size = model.get_output_embeddings().weight.shape
    heads = MedusaHeads(
        num_heads=3, hidden_size=hidden_size, vocab_size=vocab_size, layout=layout, dtype=dtype
    ).to(arguments.device)
    setting = Setting(
        model, heads, rows, arguments.rows_per_batch, arguments.labels_per_batch, arguments.pass_tokens
    )
    result = measure(setting, arguments.epochs, arguments.rounds)
    print(
        json.dumps(
            {"torch": torch.__version__, "layout": layout, "dtype": arguments.dtype, **result}, indent=2
        )
    )


if __name__ == "__main__":
    main()
