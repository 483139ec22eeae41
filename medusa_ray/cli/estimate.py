"""A run's config -> what it will take: parameters, memory, disk, rows, steps. Starts nothing, loads no torch.

Bounds assume that every reply is as long as distill.max_new_tokens allows.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from medusa_ray.config import HeadsConfig, RunConfig, TrainConfig

BYTES = {"float32": 4, "bfloat16": 2}
# A parameter in training: weight and gradient; and what ZeRO shards, AdamW's moments and bf16's fp32 weight.
WEIGHT_BYTES = {"float32": 8, "bfloat16": 4}
OPTIMIZER_BYTES = {"float32": 8, "bfloat16": 12}


@dataclass(frozen=True)
class Base:
    """The sizes of a Llama-shaped base, by the names of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool

    @property
    def num_parameters(self) -> int:
        attention = (
            2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        )
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_hidden_layers * layer + embeddings + self.hidden_size

    @property
    def cache_per_token(self) -> int:
        """Numbers that attention keeps of one token."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


def estimate(run: RunConfig) -> list[tuple[str, str]]:
    """Names and values, in the order in which they are shown; what cannot be known says why."""
    train, base = run.train, read_base(run.model.base, run.model.revision)
    num_rows = min(filter(None, (count_rows(run.data.train), run.data.num_train)), default=None)
    per_step = train.batch_size * train.gradient_accumulation_steps * train.num_workers
    rows = f"{num_rows:,}" if num_rows else f"unknown: {run.data.train} cannot be counted cheaply"
    lines = [("training rows", rows), ("positions in a training step", f"{per_step:,}")]
    # A reply of R tokens trains the heads at R - 1 positions (records.HIDDEN).
    num_positions = (num_rows or 0) * (run.distill.max_new_tokens - 1)
    if num_positions:
        lines.append(("optimizer steps", f"at most {train.epochs * math.ceil(num_positions / per_step):,}"))
    if base is None:
        reason = f"unknown: no Llama-shaped config.json of {run.model.base} is on disk or on a hub in reach"
        return [*lines, ("parameters, memory and disk", reason)]

    base_bytes, heads = BYTES[run.model.dtype], num_head_parameters(base, run.heads)
    num_tokens = run.distill.batch_size * (run.data.max_prompt_tokens + run.distill.max_new_tokens)
    weights = shown(base.num_parameters * base_bytes)
    cache = shown(num_tokens * base.cache_per_token * base_bytes)
    lines += [
        ("parameters of the base", f"{base.num_parameters / 1e6:,.1f} M"),
        ("parameters of the heads", f"{heads / 1e6:,.1f} M"),
        ("memory of a distill actor", f"{weights} of weights, at most {cache} of cache"),
        ("memory of a train worker", shown(train_worker_bytes(base, run.heads, train))),
        ("heads/ on disk", shown(heads * BYTES[train.dtype])),
    ]
    if num_positions:
        lines.append(("hidden/ on disk", f"at most {shown(num_positions * base.hidden_size * base_bytes)}"))
    return lines


def num_head_parameters(base: Base, heads: HeadsConfig) -> int:
    """Of all heads: residual blocks, square layers with a bias, and what of the output layers is a head's own."""
    blocks = heads.num_layers * base.hidden_size * (base.hidden_size + 1)
    draft_vocab_size = heads.draft_vocab_size or base.vocab_size
    output = {
        "own": draft_vocab_size * base.hidden_size,
        "shared": 0,
        "lowrank": heads.rank * (draft_vocab_size + base.hidden_size),
    }
    return heads.num_heads * (blocks + output[heads.layout])


def train_worker_bytes(base: Base, heads: HeadsConfig, train: TrainConfig) -> float:
    """Heads, gradients and optimizer, and the logits of a micro-batch with their gradient, in fp32."""
    sharded = OPTIMIZER_BYTES[train.dtype] / (train.num_workers if train.zero_stage else 1)
    draft_vocab_size = heads.draft_vocab_size or base.vocab_size
    output_layer = 0 if heads.layout == "own" else draft_vocab_size * base.hidden_size * BYTES[train.dtype]
    logits = 2 * 4 * train.batch_size * heads.num_heads * draft_vocab_size
    return num_head_parameters(base, heads) * (WEIGHT_BYTES[train.dtype] + sharded) + output_layer + logits


def shown(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def read_base(name: str, revision: str | None) -> Base | None:
    """From config.json in the base's folder or on the hub; None when out of reach or not Llama-shaped."""
    path = Path(name) / "config.json"
    if not path.exists():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(name, "config.json", revision=revision))
        except (OSError, ValueError):  # no such repository, no network, no valid name
            return None
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    raw = raw.get("text_config", raw)
    try:
        num_heads = raw["num_attention_heads"]
        defaults = {
            "num_key_value_heads": num_heads,
            "head_dim": raw["hidden_size"] // num_heads,
            "tie_word_embeddings": False,
        }
        values = {**defaults, **{key: value for key, value in raw.items() if value is not None}}
        return Base(**{key: values[key] for key in Base.__dataclass_fields__})
    except KeyError:
        return None


def count_rows(uri: str) -> int | None:
    """Chats in a local file or a folder's train file; None where counting means to fetch them all."""
    path = Path(uri)
    if path.is_dir():
        path = next(iter(sorted(path.glob("train.*"))), path)
    if not path.is_file():
        return None
    if path.suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    with path.open("rb") as file:
        if path.suffix == ".json":
            return len(json.load(file))
        return sum(bool(line.strip()) for line in file)
