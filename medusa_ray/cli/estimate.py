"""A run's config -> what it will take: parameters, memory, disk, rows, steps. Starts nothing, loads no torch.

Where prompts/ or distilled/ is finished its lengths are counted. Bounds assume for the rest that every prompt is as
long as data.max_prompt_tokens and every reply as distill.max_new_tokens allows.
"""

import functools
import json
import math
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.compute as pc

from medusa_ray import parts, provenance, records
from medusa_ray.cli.sample import Sample, counter, take
from medusa_ray.config import HeadsConfig, RunConfig, TrainConfig, UserError
from medusa_ray.data.sources import find_sources

BYTES = {"float32": 4, "bfloat16": 2}
# A parameter in training: weight and gradient; and what ZeRO shards, bf16's fp32 weight and the moments.
WEIGHT_BYTES = {"float32": 8, "bfloat16": 4}
MASTER_BYTES = {"float32": 0, "bfloat16": 4}
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2 * (1 + 4 / 256)}  # codes, and a scale for each 256
SUSTAINED_FLOPS = (
    400e12  # per second: 40% of an H100's or H200's peak in bf16, a fair share for large products
)
MAX_LOGITS = 2**24  # as in medusa.loss, which needs torch


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
    def num_layer_parameters(self) -> int:
        """All but the embeddings, on the way in and out."""
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_parameters - embeddings

    @property
    def cache_per_token(self) -> int:
        """Numbers that attention keeps of one token."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class Amount:
    """How much there is to train on."""

    num_rows: int  # that leave labels
    num_tokens: int  # of all rows, prompts included
    num_positions: int  # where a head is asked
    is_counted: bool  # in distilled/, where nothing is left to guess

    @property
    def most(self) -> str:
        return "" if self.is_counted else "at most "


def estimate(run: RunConfig) -> list[tuple[str, str]]:
    """Names and values, in the order in which they are shown; what cannot be known says why."""
    train, base = run.train, read_base(run.model.base, run.model.revision)
    found = samples(run, base)
    num_chats = int(sum(sample.num_chats for sample in found.values())) or None
    num_rows = min(filter(None, (num_chats, run.data.num_train)), default=None)
    amount = count(run, num_rows)
    per_step = train.batch_size * train.gradient_accumulation_steps * train.most_workers
    uris = " ".join(source.uri for source in run.data.train)
    rows = f"{num_rows:,}" if num_rows else f"unknown: {uris} cannot be counted cheaply"
    if num_rows and not all(sample.is_counted for sample in found.values()):
        rows = f"about {rows}"
    lines = [("training rows", rows), ("positions in a training step", f"{per_step:,}")]
    if found:
        lines += sampled(run, found, base)
    if amount:
        steps = train.epochs * math.ceil(amount.num_positions / per_step)
        lines += [
            ("positions of hidden states", f"{amount.most}{amount.num_positions:,}"),
            ("optimizer steps", f"{amount.most}{steps:,}"),
            ("passes of the base", passes(run, amount)),
        ]
        if run.joint:
            per_step = run.joint.batch_size * run.joint.gradient_accumulation_steps * train.most_workers
            steps = run.joint.epochs * math.ceil(amount.num_rows / per_step)
            lines.append(("optimizer steps of joint training", f"{amount.most}{steps:,}"))
    if base is None:
        reason = f"unknown: no Llama-shaped config.json of {run.model.base} is on disk or on a hub in reach"
        return [*lines, ("parameters, memory and disk", reason)]

    base_bytes, heads = BYTES[run.model.dtype], num_head_parameters(base, run.heads)
    num_tokens = run.distill.batch_size * (run.data.max_prompt_tokens + run.distill.max_new_tokens)
    weights = shown(base.num_parameters * (0.5 if run.model.quantization == "4bit" else base_bytes))
    cache = shown(num_tokens * base.cache_per_token * base_bytes)
    lines += [
        ("parameters of the base", f"{base.num_parameters / 1e6:,.1f} M"),
        ("parameters of the heads", f"{heads / 1e6:,.1f} M"),
        ("memory of a distill actor", f"{weights} of weights, at most {cache} of cache"),
        ("memory of a train worker", shown(train_worker_bytes(base, run.heads, train))),
        ("heads/ on disk", shown(heads * BYTES[train.dtype])),
    ]
    if run.hidden.mode == "stream":
        lines.append(("hidden/ on disk", "nothing: hidden.mode is stream"))
    elif amount:
        num_bytes = hidden_bytes(amount, base.hidden_size * base_bytes, run.hidden.top_k)
        lines.append(("hidden/ on disk", f"{amount.most}{shown(num_bytes)}"))
    return lines + (arithmetic(run, base, amount) if amount else [])


def arithmetic(run: RunConfig, base: Base, amount: Amount) -> list[tuple[str, str]]:
    """Floating-point operations of base and heads, beside those of a trainer that runs the base in each epoch on rows
    padded to their limit, as the original script does."""
    epochs, times = (
        run.train.epochs,
        {"capture": 0, "compute": 1, "stream": run.train.epochs}[run.hidden.mode],
    )
    vocab_size = run.heads.draft_vocab_size or base.vocab_size
    head_flops = run.heads.flops_per_position(base.hidden_size, vocab_size)
    # A matrix product takes two operations per weight and token; attention to other tokens is left out.
    heads, base_pass = epochs * amount.num_positions * head_flops, 2 * base.num_layer_parameters
    states = times * amount.num_tokens * base_pass
    limit = run.data.max_prompt_tokens + run.distill.max_new_tokens
    padded = epochs * (amount.num_rows * limit * base_pass + amount.num_positions * head_flops)

    def shown(flops: float) -> str:
        return (
            f"{amount.most}{flops / 1e15:,.2f} PFLOP, {flops / SUSTAINED_FLOPS / 3600:,.2f} hours of one H100"
        )

    # Rows pass with the adapter, without it, and back through it; and with it again where activations are not kept.
    num_passes = 4 if run.joint and run.joint.gradient_checkpointing else 3
    joint = run.joint.epochs * amount.num_tokens * num_passes * base_pass if run.joint else 0
    return [
        ("arithmetic of the states", shown(states)),
        ("arithmetic of the heads", shown(heads)),
        *([("arithmetic of joint training", shown(joint))] if run.joint else []),
        (
            "with the base in each epoch, padded",
            f"{shown(padded)}: {padded / (states + heads):,.1f} times as much",
        ),
    ]


def count(run: RunConfig, num_rows: int | None) -> Amount | None:
    """From distilled/ when it is finished, else from prompts/, else from the number of chats; None without any."""
    prompts, distilled = run.artifact("prompts"), run.artifact("distilled")
    if is_counted := provenance.read(distilled) is not None:
        lengths = _lengths(distilled, "reply_ids")
    elif provenance.read(prompts) is not None:
        lengths = _lengths(f"{prompts}/train", "reference_ids")
    elif num_rows:
        lengths = [(run.data.max_prompt_tokens, run.distill.max_new_tokens)] * num_rows
    else:
        return None
    if not is_counted and run.distill.replies == "generate":
        lengths = [(num_prompt, run.distill.max_new_tokens) for num_prompt, _ in lengths] * run.distill.samples
    positions = [records.num_positions(*pair, run.data.loss_on) for pair in lengths]
    return Amount(sum(map(bool, positions)), sum(map(sum, lengths)), sum(positions), is_counted)


def _lengths(folder: str, replies: str) -> list[tuple[int, int]]:
    """Prompt and reply tokens of each good row; replies that are not there are of none."""
    lengths: list[tuple[int, int]] = []
    for name in parts.names(folder):
        table = parts.read(folder, name, ["prompt_ids", replies, "error"])
        columns = (
            pc.fill_null(pc.list_value_length(table[column]), 0).to_pylist()
            for column in ("prompt_ids", replies)
        )
        rows = zip(*columns, table["error"].to_pylist(), strict=True)
        lengths += [(num_prompt, num_reply) for num_prompt, num_reply, error in rows if error is None]
    return lengths


def passes(run: RunConfig, amount: Amount) -> str:
    """What the hidden states cost; distillation itself, where there is any, comes on top."""
    if run.hidden.mode == "capture":
        return "none: states are captured while distilling"
    times = run.train.epochs if run.hidden.mode == "stream" else 1
    num_tokens = f"{amount.most}{times * amount.num_tokens:,} tokens"
    return f"{times}, of {num_tokens} in all" if times > 1 else f"1, of {num_tokens}"


def hidden_bytes(amount: Amount, bytes_per_state: int, top_k: int) -> int:
    """States, and an id and a log-probability for each kept token of each label; token ids weigh next to nothing."""
    num_labels = amount.num_positions + amount.num_rows
    return amount.num_positions * bytes_per_state + num_labels * top_k * 8


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
    """Heads, gradients and optimizer, and the logits that are there at a time with their gradient, in fp32."""
    optimizer = MASTER_BYTES[train.dtype] + MOMENT_BYTES[train.optimizer]
    sharded = optimizer / (train.least_workers if train.zero_stage else 1)
    draft_vocab_size = heads.draft_vocab_size or base.vocab_size
    output_layer = 0 if heads.layout == "own" else draft_vocab_size * base.hidden_size * BYTES[train.dtype]
    logits = 2 * 4 * min(train.batch_size * draft_vocab_size, MAX_LOGITS) * heads.num_heads
    return num_head_parameters(base, heads) * (WEIGHT_BYTES[train.dtype] + sharded) + output_layer + logits


def shown(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def read_base(name: str, revision: str | None) -> Base | None:
    """From config.json in the base's folder or on the hub, of what an adapter adapts; None when out of reach or not
    Llama-shaped.
    """
    path = _file(name, "config.json", revision)
    if path is None:
        adapter = _file(name, "adapter_config.json", revision)
        adapts = adapter and json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        return read_base(adapts, None) if adapts else None
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


def _file(name: str, file: str, revision: str | None) -> Path | None:
    path = Path(name) / file
    if path.exists():
        return path
    if "://" in name:
        try:
            return Path(fsspec.open_local(f"filecache::{name}/{file}"))
        except FileNotFoundError:
            return None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except (OSError, ValueError):  # no such repository or file, no network, no valid name
        return None


def samples(run: RunConfig, base: Base | None) -> dict[str, Sample]:
    """What the first chats of each training source tell; none where a source is out of reach or unreadable."""
    if base is None and any(source.uri.startswith("hf://") for source in run.data.train):
        return {}  # where the hub does not answer, asking it again takes half a minute
    tokenizer = _file(run.model.base, "tokenizer.json", run.model.revision) if base else None
    try:
        only = run.data.model_copy(update={"test": run.data.train, "out_of_domain": None})
        sources = find_sources(only)["train"]
        found = {source.name: take(source, run, counter(tokenizer)) for source in sources}
    except UserError:  # the data stage tells what is wrong; a plan is made of what is known
        return {}
    return {name: sample for name, sample in found.items() if sample} if all(found.values()) else {}


def sampled(run: RunConfig, found: dict[str, Sample], base: Base | None) -> list[tuple[str, str]]:
    """Lines about the input, before filters and limits: what the sample suggests for all of it."""
    lines = [
        (f"chats of {name}", f"{'' if sample.is_counted else 'about '}{sample.num_chats:,.0f}")
        for name, sample in found.items()
    ]
    whole = functools.reduce(operator.add, found.values())
    if run.data.num_train:
        whole = whole.scaled(min(1.0, run.data.num_train / whole.num_chats))
    lines.append(("prompt tokens, by a sample", f"about {whole.prompt_tokens:,.0f}"))
    reply, bound = whole.mean_reply, ""
    if reply is None:
        reply, bound = float(run.distill.max_new_tokens), "at most "
        lines.append(("reply tokens", "unknown: the sample has no answers"))
    else:
        of = " of the chats' own answers" if run.distill.replies == "generate" else ""
        lines.append(("reply tokens, by a sample", f"about {whole.reply_tokens:,.0f}{of}"))
    num_tokens = whole.prompt_tokens + whole.num_rows * reply
    positions = max(0.0, num_tokens if run.data.loss_on == "all" else whole.num_rows * (reply - 1))
    prompt_bytes = whole.text_bytes + 4 * (whole.prompt_tokens + whole.reply_tokens)
    lines += [
        ("prompts/, by a sample", f"about {shown(prompt_bytes)}"),
        ("distilled/, by a sample", f"{bound or 'about '}{shown(4 * num_tokens)}"),
    ]
    if base and run.hidden.mode != "stream":
        amount = Amount(int(whole.num_rows), int(num_tokens), int(positions), False)
        num_bytes = hidden_bytes(amount, base.hidden_size * BYTES[run.model.dtype], run.hidden.top_k)
        lines.append(("hidden/, by a sample", f"{bound or 'about '}{shown(num_bytes)}"))
    return lines
