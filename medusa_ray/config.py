"""YAML files -> typed configs: the contract between a user's file and every stage.

Strict: a key that does not exist is refused and the nearest right one is named. Nothing here touches the
disk beyond the YAML itself, an environment variable, torch or ray, so `medusa-ray validate` answers at once.
"""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import fsspec
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)


class UserError(ValueError):
    """A mistake that the user can mend: one message with what came, what was expected and what to do."""


class Strict(BaseModel):
    """The base of every config: frozen, and no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    refused: ClassVar[dict[str, str]] = {}  # keys that exist elsewhere, and why they are none here


# ---------------------------------------------------------------------------------------------------- one run


class ModelConfig(Strict):
    """The base model, which is never changed."""

    base: str = Field(
        description="Folder or hub name of a transformers causal language model, or of a PEFT adapter, which is merged "
        "into the model that it names (the extra `lora`)."
    )
    revision: str | None = Field(None, description="Hub revision of the base; null is its default branch.")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Compute dtype of the base.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU when there is one.")
    quantization: Literal["none", "4bit"] = Field(
        "none", description="4bit: weights in NF4 by bitsandbytes, on a GPU (the extra `quantized`)."
    )


# As the Unicode names of their letters begin.
Script = Literal[
    "arabic", "armenian", "bengali", "cjk", "cyrillic", "devanagari", "ethiopic", "georgian", "greek", "gujarati",
    "gurmukhi", "hangul", "hebrew", "hiragana", "kannada", "katakana", "khmer", "lao", "latin", "malayalam", "myanmar",
    "sinhala", "tamil", "telugu", "thai", "tibetan",
]  # fmt: skip


class ColumnsConfig(Strict):
    """What a source's columns, or the keys of its rows, are called there."""

    id: str | None = Field(None, description="Name of the chat; without one its content names it.")
    messages: str | None = Field(None, description="List of role and content.")
    conversations: str | None = Field(None, description="List of from and value, as ShareGPT has it.")
    prompt: str | None = Field(None, description="Bare text to go on from, or a list of messages.")
    completion: str | None = Field(
        None, description="What the chat itself answers to its prompt, text or messages."
    )
    text: str | None = Field(None, description="Bare text to go on from.")


class SourceConfig(Strict):
    """One place that chats come from."""

    uri: str = Field(
        description="File, folder or glob: local, `s3://`, `gs://`, `https://`, or `hf://OWNER/NAME` for a data set of "
        "the hub."
    )
    name: str | None = Field(
        None, description="What counts and rows call it; null is the last part of its URI."
    )
    weight: float = Field(
        1.0,
        gt=0,
        description="Up to 1, the share of its chats that is kept, chosen by content; a whole number above that says "
        "how often each is repeated.",
    )
    format: Literal["auto", "json", "jsonl", "parquet", "csv", "text"] = Field(
        "auto", description="auto goes by the file's name; text is one bare text a line."
    )
    columns: ColumnsConfig = ColumnsConfig()
    split: str | None = Field(
        None,
        description="Which files of a folder or data set are meant; null: train of train, test of the others.",
    )
    config: str | None = Field(
        None, description="Folder of them inside it: what the hub calls a config or subset."
    )
    revision: str | None = Field(
        None, description="Hub revision of the data set; null is its default branch."
    )

    @model_validator(mode="after")
    def _repeats_are_whole(self) -> "SourceConfig":
        if self.weight > 1 and self.weight != int(self.weight):
            raise ValueError(
                f"the weight of {self.uri} is {self.weight}: up to 1 it is a share, above that a whole number of times."
            )
        return self


def _as_sources(value: Any) -> Any:
    """A URI, or a list in which some are URIs, as the list of sources that it stands for."""
    values = [value] if isinstance(value, str | dict | SourceConfig) else value
    if not isinstance(values, list | tuple):
        return values
    return [{"uri": each} if isinstance(each, str) else each for each in values]


Sources = Annotated[list[SourceConfig], BeforeValidator(_as_sources)]


class FilterConfig(Strict):
    """Chats that are left out, and counted by reason. Their text is what all their messages say, a line each."""

    min_characters: int | None = Field(None, gt=0, description="Shorter chats are left out.")
    max_characters: int | None = Field(None, gt=0, description="Longer chats are left out.")
    scripts: list[Script] = Field(
        [], description="Scripts that its letters have to be of; an empty list allows all."
    )
    min_script_share: float = Field(0.9, gt=0, le=1, description="Share of the letters that have to be.")
    keep_pattern: str | None = Field(
        None, description="Regular expression; a chat without a match is left out."
    )
    drop_pattern: str | None = Field(None, description="Regular expression; a chat with a match is left out.")
    dedup: Literal["none", "exact", "near"] = Field(
        "none",
        description="Of chats that are equal, or nearly so (MinHash: about 85% of the runs of 8 bytes in common), the "
        "first stays. near takes another 64 bytes of the driver's memory for each chat.",
    )
    decontaminate: bool = Field(
        False,
        description="Training chats are left out whose user says 13 words in a row that a user of test or "
        "out_of_domain says too, or the same in fewer words.",
    )

    @field_validator("keep_pattern", "drop_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} in data.filters is no regular expression: {error}.") from None
        return pattern


class DataConfig(Strict):
    """Where chats come from. Each split is a URI (file, folder, glob, `s3://`, `hf://OWNER/NAME`, anything that fsspec
    opens), or a list of URIs and of sources."""

    train: Sources = Field(min_length=1, description="Training chats; a folder means its train.* files.")
    test: Sources | None = Field(
        None, min_length=1, description="Held-out chats; null takes the folder's test.* or splits train."
    )
    out_of_domain: Sources | None = Field(
        None, min_length=1, description="Chats unlike the training ones, for contrast only."
    )
    filters: FilterConfig = FilterConfig()
    num_train: int | None = Field(None, gt=0, description="Rows kept of train; null keeps all.")
    num_test: int | None = Field(500, gt=0, description="Rows kept of test and of out_of_domain.")
    loss_on: Literal["last", "assistant", "all"] = Field(
        "last",
        description="Whose tokens heads learn to guess. last: the last assistant turn's; assistant: every such turn's, "
        "each answered for itself; all: prompt's and last turn's, which needs hidden.mode compute or stream.",
    )
    max_prompt_tokens: int = Field(2048, gt=0, description="Longer prompts are treated as over_long says.")
    over_long: Literal["truncate", "skip", "error"] = Field(
        "truncate",
        description="truncate: a given reply over distill.max_new_tokens or the base's positions loses its end, and is "
        "finished by `length`; a prompt cannot be cut without becoming another, so it is skipped. skip: either is kept "
        "as a row with an error, counted in provenance. error: the run stops and names the first.",
    )


class ServerConfig(Strict):
    """An OpenAI server that is already running, asked for replies."""

    url: str = Field(description="Base URL without /v1, for example http://127.0.0.1:8000.")
    model: str = Field(description="What requests send as `model`: the name of model.base there.")
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the key; the key itself stands in no file."
    )
    concurrency: int = Field(64, gt=0, description="Requests in flight, at most.")
    timeout_s: float = Field(600, gt=0, description="Seconds without a byte before a request is tried again.")
    retries: int = Field(
        10,
        ge=0,
        description="Further tries after 429, 5xx, a timeout or a cut connection, each after a longer wait (60 s at "
        "most) or what Retry-After says.",
    )


class DistillConfig(Strict):
    """Self-distillation: what the base itself answers to the training prompts."""

    replies: Literal["generate", "given"] = Field(
        "generate", description="generate: the base's own replies; given: the chats' replies as they are."
    )
    engine: Literal["own", "http"] = Field(
        "own", description="own: engines in actors of Ray Data; http: the server that distill.server names."
    )
    server: ServerConfig | None = Field(None, description="For engine `http`.")
    num_actors: int | str = Field(
        1,
        description="Engine actors of Ray Data: a number, of which as many start as fit; auto, as many as fit; or "
        "MIN-MAX, between which Ray adds and ends actors, and nodes where the cluster grows.",
    )
    gpus_per_actor: float = Field(
        1, gt=0, le=1, description="Share of a GPU that one actor takes; nothing to actors on CPUs."
    )
    accelerator_type: str | None = Field(
        None, description="Type of GPU, in Ray's words, such as H100 or L4: its actors run on nodes of that type only."
    )
    batch_size: int = Field(32, gt=0, description="Sequences that one actor decodes at a time.")
    rows_per_part: int | None = Field(
        None,
        gt=0,
        description="Replies in one file, which is what a killed actor does again; null: 512, or fewer where that "
        "would make fewer than 64 files. Captured states are large: 512 replies of 200 tokens of Llama-3-8B take "
        "0.8 GiB.",
    )
    max_new_tokens: int = Field(
        512, gt=0, description="Longest reply, in tokens; data.over_long says what of a given one that is longer."
    )
    samples: int = Field(1, gt=0, description="Replies to each prompt, each with a seed of its own.")
    temperature: float = Field(0.0, ge=0, le=2, description="0 is greedy.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Nucleus of the sampling; 1 keeps the whole distribution."
    )
    seed: int = Field(0, ge=0, description="Each row draws from this seed and its own id.")

    @field_validator("num_actors")
    @classmethod
    def _actors_are_a_number_or_a_range(cls, num_actors: int | str) -> int | str:
        least, most = least_and_most(num_actors)
        if not 1 <= least <= most:
            raise ValueError(
                f"distill.num_actors is {num_actors!r}; expected a whole number from 1, auto, or MIN-MAX such as 2-8."
            )
        return num_actors

    @model_validator(mode="after")
    def _samples_differ(self) -> "DistillConfig":
        if self.samples > 1 and (self.temperature == 0 or self.replies == "given"):
            what = "distill.replies is 'given'" if self.replies == "given" else "distill.temperature is 0"
            raise ValueError(
                f"distill.samples is {self.samples}, but {what}: all replies to a prompt would be the same. Set "
                "distill.samples to 1, or distill.temperature above 0 with distill.replies: generate."
            )
        return self

    @model_validator(mode="after")
    def _a_server_is_named_where_one_is_asked(self) -> "DistillConfig":
        if (self.server is not None) != (self.engine == "http"):
            was = "is not set" if self.server is None else "is set"
            raise ValueError(
                f"distill.engine is {self.engine!r}, but distill.server {was}. Give both, distill.engine: http and "
                "distill.server with url and model, or neither."
            )
        if self.engine == "http" and self.replies == "given":
            raise ValueError(
                "distill.engine is 'http', but distill.replies is 'given': nothing is asked of a server. Leave one out."
            )
        return self


def least_and_most(number: int | str) -> tuple[int, float]:
    """What a number of actors or workers allows; 0 and 0 when it is none of n, auto and MIN-MAX."""
    if number == "auto":
        return 1, math.inf
    least, dash, most = str(number).partition("-")
    most = most if dash else least
    if not least.isdecimal() or not most.isdecimal():
        return 0, 0
    return int(least), int(most)


class HiddenConfig(Strict):
    """Hidden states of the frozen base, where a label needs them."""

    mode: Literal["capture", "compute", "stream"] = Field(
        "capture",
        description="capture: while distilling; compute: in a pass of their own; stream: while training, anew in each "
        "epoch and never written, where a corpus is too large to keep.",
    )
    num_actors: int = Field(
        1,
        gt=0,
        description="Base actors of Ray Data when computing or streaming. To stream, each of train.num_workers has one "
        "at least, and shares its GPU with it (0.6 and 0.4) where the cluster has fewer than two for each.",
    )
    gpus_per_actor: float = Field(
        1, gt=0, le=1, description="Share of a GPU that one actor takes when computing; streaming has its own."
    )
    accelerator_type: str | None = Field(
        None, description="Type of GPU, in Ray's words, such as H100 or L4: its actors run on nodes of that type only."
    )
    batch_tokens: int = Field(8192, gt=0, description="Tokens of one forward pass, several rows packed together.")
    top_k: int = Field(
        0, ge=0, description="Likeliest tokens of the base kept with each label, for soft labels; 0 keeps none."
    )


class HeadsConfig(Strict):
    """The shape of the Medusa heads."""

    num_heads: int = Field(
        3, gt=0, le=16, description="Head k guesses the token k + 2 places ahead (k from 0)."
    )
    num_layers: int = Field(1, gt=0, le=8, description="Residual blocks in each head.")
    layout: Literal["own", "shared", "lowrank"] = Field(
        "own",
        description="own: an output layer per head, copied from the base; shared: the base's own; lowrank: the base's "
        "own and a low-rank term per head.",
    )
    rank: int = Field(64, gt=0, description="Rank of that term; nothing to the other layouts.")
    draft_vocab_size: int | None = Field(
        None,
        gt=0,
        description="Heads guess only so many tokens, those that training labels name most often; null: all tokens.",
    )

    def flops_per_position(self, hidden_size: int, vocab_size: int) -> float:
        """Floating-point operations of training all heads at one position, nothing computed twice.

        vocab_size: of the tokens that they guess. A matrix product costs two per weight forward, two for the gradient
        of its input and two for that of its weight, where these are wanted.
        """
        square, output = hidden_size**2, hidden_size * vocab_size
        blocks = 6 * self.num_layers * square - 2 * square  # nobody wants the gradient of the base's states
        low_rank = self.rank * (hidden_size + vocab_size)
        outputs = {"own": 6 * output, "shared": 4 * output, "lowrank": 4 * output + 6 * low_rank}
        return self.num_heads * (blocks + outputs[self.layout])


class TrainConfig(Strict):
    """Training of the heads by Ray Train workers, each with a DeepSpeed engine."""

    num_workers: int | str = Field(
        1,
        description="Data-parallel workers: a number, or MIN-MAX, between which training goes on with as many as there "
        "is room for when nodes are lost or join. A step then takes as many positions as with MAX.",
    )
    placement: Literal["pack", "spread"] = Field(
        "pack", description="Workers on as few nodes as hold them, or on as many as there are."
    )
    accelerator_type: str | None = Field(
        None, description="Type of GPU, in Ray's words, such as H100 or L4: workers run on nodes of that type only."
    )
    epochs: int = Field(5, gt=0, description="Passes over the hidden states.")
    batch_size: int = Field(512, gt=0, description="Positions in one worker's micro-batch.")
    gradient_accumulation_steps: int = Field(1, gt=0, description="Micro-batches per optimizer step.")
    learning_rate: float = Field(5e-4, gt=0, description="Peak learning rate, after warm-up.")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Shape after warm-up."
    )
    warmup_steps: int = Field(40, ge=0, description="Optimizer steps of linear warm-up.")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw",
        description="adamw_8bit: moments in 8 bits by bitsandbytes (the extra `quantized`), a quarter of their memory; "
        "zero_stage 0 only, here and in joint.",
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    head_weight: float = Field(
        1.0, gt=0, le=1, description="Head k's loss counts head_weight ** k; the paper has 0.8, the blog post 1."
    )
    labels: Literal["hard", "soft"] = Field(
        "hard",
        description="hard: the tokens that came; soft: what the base said of each, its hidden.top_k likeliest tokens.",
    )
    held_out: float = Field(
        0.02, ge=0, lt=1, description="Share of the chats that judge the heads, untrained on; 512 rows at most."
    )
    eval_steps: int = Field(200, gt=0, description="Optimizer steps between two judgements; the last step has one.")
    keep: Literal["last", "best"] = Field(
        "last", description="Which checkpoint becomes heads/: the last, or that with the lowest held-out loss."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage of the heads.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Dtype of the heads while training."
    )
    tf32: bool = Field(True, description="On a GPU, float32 matrix products in TF32.")
    deepspeed: str | None = Field(
        None,
        description="A DeepSpeed file of your own, on top of what this section says; `auto` in it stands for that.",
    )
    seed: int = Field(0, ge=0, description="Order of the rows and initial weights.")
    logging_steps: int = Field(10, gt=0, description="Optimizer steps between logged lines.")
    save_steps: int = Field(
        500, gt=0, description="Optimizer steps between checkpoints; each epoch's end has one."
    )
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        ["tensorboard"], description="What is told the figures besides training.jsonl; wandb and mlflow are packages."
    )
    profile_steps: tuple[int, int] | None = Field(
        None, description="First and last step of a profiler's trace, which becomes heads/trace.json."
    )
    max_failures: int = Field(3, ge=0, description="Worker-group restarts before the run is given up.")

    @field_validator("num_workers")
    @classmethod
    def _workers_are_a_number_or_a_range(cls, num_workers: int | str) -> int | str:
        least, most = least_and_most(num_workers)
        if not 1 <= least <= most < math.inf:
            raise ValueError(
                f"train.num_workers is {num_workers!r}; expected a whole number from 1, or MIN-MAX such as 2-8."
            )
        return num_workers

    @property
    def least_workers(self) -> int:
        return least_and_most(self.num_workers)[0]

    @property
    def most_workers(self) -> int:
        return int(least_and_most(self.num_workers)[1])

    @model_validator(mode="after")
    def _moments_in_8_bits_are_not_sharded(self) -> "TrainConfig":
        if self.optimizer == "adamw_8bit" and self.zero_stage:
            raise ValueError(
                f"train.optimizer is 'adamw_8bit', but train.zero_stage is {self.zero_stage}: moments in 8 bits have a "
                "scale for each 256, which sharding would cut. Set train.zero_stage to 0."
            )
        return self


class JointConfig(Strict):
    """Medusa-2: once `train` has trained the heads alone, a LoRA adapter on the base and the heads, together.

    The base stays near itself by its divergence from itself without the adapter. What is not said here is as in
    `train`: workers, dtype, labels, seed, held-out chats, what is logged and saved.
    """

    epochs: int = Field(2, gt=0, description="Passes over the distilled rows.")
    batch_size: int = Field(8, gt=0, description="Rows in one worker's micro-batch.")
    gradient_accumulation_steps: int = Field(1, gt=0, description="Micro-batches per optimizer step.")
    learning_rate: float = Field(5e-4, gt=0, description="Peak learning rate of the adapter, after warm-up.")
    heads_learning_rate: float = Field(2e-3, gt=0, description="The same of the heads; the paper has 4 times as much.")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Shape after warm-up."
    )
    warmup_steps: int = Field(40, ge=0, description="Optimizer steps of linear warm-up.")
    heads_weight: float = Field(
        0.2, gt=0, description="What the heads' loss counts beside the base's divergence: the paper's lambda_0."
    )
    rank: int = Field(32, gt=0, description="Rank of the adapter.")
    alpha: int = Field(16, gt=0, description="The adapter counts alpha / rank.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Share of an adapter's inputs dropped while training.")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Layers that are adapted, by the ends of their names; never the output layer."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO stage of base, adapter and heads; 3 shards the base."
    )
    gradient_checkpointing: bool = Field(
        True,
        description="Keep each layer's input only, and compute the layer again on the way back. A third more "
        "arithmetic; without it 2,048 tokens of a 7 B base leave some 9 GiB behind, and the first run of most would "
        "be out of memory.",
    )


class SweepConfig(Strict):
    """Every tree with every acceptance at every temperature on every split: evaluation/sweep.parquet and its plot."""

    trees: list[str] = Field(
        ["chain", "1", "2", "4", "8", "16", "32"],
        min_length=1,
        description="chain, calibrated, or the number of guesses of a calibrated tree.",
    )
    temperatures: list[Annotated[float, Field(ge=0, le=2)]] = Field(
        [0.0], min_length=1, description="0 is greedy."
    )
    acceptance: list[str] = Field(
        ["exact"],
        min_length=1,
        description="exact, typical, or typical=EPSILON/ALPHA, which needs a temperature above 0.",
    )
    splits: list[Literal["test", "out_of_domain", "train"]] = Field(
        ["test"],
        min_length=1,
        description="Which prompts; those that shape the calibrated trees are left out.",
    )
    num_prompts: int = Field(64, gt=0, description="Prompts of each split, at most.")

    @model_validator(mode="after")
    def _names_are_known(self) -> "SweepConfig":
        for tree in self.trees:
            if tree not in ("chain", "calibrated") and not (tree.isdecimal() and 0 < int(tree) <= 64):
                raise ValueError(
                    f"evaluate.sweep.trees has {tree!r}; expected chain, calibrated, or a number of guesses to 64."
                )
        for acceptance in self.acceptance:
            if not re.fullmatch(r"exact|typical(=[\d.]+/[\d.]+)?", acceptance):
                raise ValueError(
                    f"evaluate.sweep.acceptance has {acceptance!r}; expected exact, typical, or typical=EPSILON/ALPHA "
                    "such as typical=0.09/0.3."
                )
        if self.acceptance != ["exact"] and not any(self.temperatures):
            raise ValueError(
                f"evaluate.sweep.acceptance is {self.acceptance}, but evaluate.sweep.temperatures is "
                f"{self.temperatures}: greedy replies are always exact. Add a temperature above 0."
            )
        return self


class EvaluateConfig(Strict):
    """Held-out measurements of the heads, and the calibration of the tree."""

    tree_nodes: int = Field(8, gt=0, le=64, description="Nodes of the calibrated tree, its root not counted.")
    calibration_share: float = Field(
        0.4,
        gt=0,
        lt=1,
        description="Share of the held-out prompts that shapes the tree; the others score it.",
    )
    compile: bool = Field(True, description="Measure with the base compiled, as servers run it.")
    num_parity: int = Field(200, gt=0, description="Prompts decoded by Medusa, baseline and transformers.")
    num_speed: int = Field(
        40, ge=0, description="Prompts of the interleaved in-process speed run; 0 skips it."
    )
    batch_sizes: list[Annotated[int, Field(gt=0)]] = Field(
        [1, 8], description="Batches at which that run tells predicted from measured speedup."
    )
    max_new_tokens: int = Field(128, gt=0, description="Longest reply while evaluating, in tokens.")
    sweep: SweepConfig | None = Field(None, description="Further measurements, for study; null makes none.")


class CardConfig(Strict):
    """What the model card, heads/README.md, says that no stage can find out. What is null, it says is not stated."""

    base_model: str | None = Field(
        None, description="Hub name of the base that the heads belong to, where that is a folder here."
    )
    license: str | None = Field(None, description="Licence of the heads, by the hub's name for it, e.g. apache-2.0.")
    data_license: str | None = Field(None, description="Licence of the training chats.")
    description: str | None = Field(None, description="What the heads are for: Markdown at the top of the card.")


class RunConfig(Strict):
    """One run: from chats to evaluated heads."""

    version: Literal[1] = Field(1, description="Version of this schema.")
    output: str = Field(description="Folder or URI that takes every artifact of the run.")
    model: ModelConfig
    data: DataConfig
    distill: DistillConfig = DistillConfig()
    hidden: HiddenConfig = HiddenConfig()
    heads: HeadsConfig = HeadsConfig()
    train: TrainConfig = TrainConfig()
    joint: JointConfig | None = Field(None, description="Medusa-2; null leaves the base as it is.")
    evaluate: EvaluateConfig = EvaluateConfig()
    card: CardConfig = CardConfig()

    @model_validator(mode="after")
    def _given_replies_need_a_pass_of_the_base(self) -> "RunConfig":
        if self.distill.replies == "given" and self.hidden.mode == "capture":
            raise ValueError(
                "hidden.mode is 'capture', but distill.replies is 'given': nothing is generated, so nothing "
                "can be captured. Set hidden.mode to 'compute'."
            )
        return self

    @model_validator(mode="after")
    def _replies_over_http_need_a_pass_of_the_base(self) -> "RunConfig":
        if self.distill.engine == "http" and self.hidden.mode == "capture":
            raise ValueError(
                "hidden.mode is 'capture', but distill.engine is 'http': a server sends tokens, not the states that "
                "produced them. Set hidden.mode to 'compute' or 'stream'."
            )
        return self

    @model_validator(mode="after")
    def _states_of_prompts_need_a_pass_of_the_base(self) -> "RunConfig":
        if self.data.loss_on == "all" and self.hidden.mode == "capture":
            raise ValueError(
                "data.loss_on is 'all', but hidden.mode is 'capture': distillation passes through the states of "
                "replies, not of prompts. Set hidden.mode to 'compute' or 'stream'."
            )
        return self

    @model_validator(mode="after")
    def _streams_have_room_beside_their_workers(self) -> "RunConfig":
        train, hidden = self.train, self.hidden
        if hidden.mode != "stream":
            return self
        if train.least_workers < train.most_workers:
            raise ValueError(
                f"train.num_workers is {train.num_workers!r}, but hidden.mode is 'stream', whose actors have a fixed "
                "share of the room beside each worker. Give one number, or set hidden.mode to 'compute'."
            )
        if hidden.gpus_per_actor != 1 or hidden.accelerator_type != train.accelerator_type:
            raise ValueError(
                f"hidden.mode is 'stream', whose actors run beside the workers, but hidden.gpus_per_actor is "
                f"{hidden.gpus_per_actor:g}, hidden.accelerator_type {hidden.accelerator_type!r} and "
                f"train.accelerator_type {train.accelerator_type!r}. Leave the first out, and give both the same type."
            )
        return self

    @model_validator(mode="after")
    def _soft_labels_need_a_teacher(self) -> "RunConfig":
        if self.train.labels == "soft" and not self.hidden.top_k:
            raise ValueError(
                "train.labels is 'soft', but hidden.top_k is 0: nothing of what the base says is kept. "
                "Set hidden.top_k, to 16 for one."
            )
        return self

    @model_validator(mode="after")
    def _joint_moments_in_8_bits_are_not_sharded(self) -> "RunConfig":
        if self.joint and self.train.optimizer == "adamw_8bit" and self.joint.zero_stage:
            raise ValueError(
                f"train.optimizer is 'adamw_8bit', which joint training takes over, but joint.zero_stage is "
                f"{self.joint.zero_stage}. Set joint.zero_stage to 0."
            )
        return self

    def artifact(self, name: str) -> str:
        """URI of one artifact folder: prompts, distilled, hidden, heads, evaluation, bench or report."""
        return f"{self.output.rstrip('/')}/{name}"

    @property
    def served_model(self) -> ModelConfig:
        """The base that the heads belong to: the adapted one after joint training."""
        if self.joint is None:
            return self.model
        return self.model.model_copy(update={"base": self.artifact("adapter"), "revision": None})


# ---------------------------------------------------------------------------------------------------- serving


class TrafficLogConfig(Strict):
    """Chats that a server has answered, kept to train on. Without this section nothing is kept."""

    uri: str = Field(description="Folder that takes Parquet files; as `data.train` it trains the next heads.")
    share: float = Field(
        1.0, ge=0, le=1, description="Share of the chats that is kept, chosen by the reply's id."
    )
    redact: str | None = Field(
        None,
        description="module:function, importable by the replicas. It gets each row as a dict and returns what is kept "
        "of it, or None for nothing.",
    )
    max_rows: int = Field(10_000, gt=0, description="A file is written when it has so many chats,")
    max_seconds: float = Field(
        300, gt=0, description="or so long after its first one; a replica that is killed loses as much."
    )
    max_buffer_mib: int = Field(
        64, gt=0, description="Memory for chats not yet written; what does not fit is left out and counted."
    )

    @model_validator(mode="after")
    def _redact_names_a_function(self) -> "TrafficLogConfig":
        if self.redact is not None and not re.fullmatch(r"[\w.]+:\w+", self.redact):
            raise ValueError(
                f"traffic_log.redact is {self.redact!r}; expected 'module:function', for example "
                "'privacy:without_emails'."
            )
        return self


TreeChoice = Literal["auto", "chain", "file"] | list[list[int]]


class EngineConfig(Strict):
    """`args` of an application: one engine and the protocol in front of it."""

    model_id: str = Field(description="Name that requests give in `model`.")
    aliases: list[str] = Field(default_factory=list, description="Further names that are answered.")
    base: str = Field(description="Folder or hub name of the base model.")
    heads: str | None = Field(None, description="Heads folder; null serves the baseline.")
    tree: TreeChoice = Field(
        "auto",
        description="file: tree.json beside the heads (a chain when there is none); auto: as much of it as pays at "
        "the load; or rank paths.",
    )
    shares_prefixes: bool = Field(
        True, description="Prompts that begin alike share its keys and values; off where a benchmark repeats prompts."
    )
    compile: Literal["no", "wait", "background"] = Field(
        "background",
        description="On a CPU: serve eagerly until the base is compiled, wait for that (20 s for a small base, once), "
        "or do without. On a GPU: capture CUDA graphs of it before the first request, or do without.",
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Compute dtype.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU when there is one.")
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="Processes that share the base, a part of every layer in each: TGI's NUM_SHARD. With more than one "
        "it runs eagerly. A replica needs a CPU for each, and with device cuda a GPU.",
    )
    max_batch_size: int = Field(16, gt=0, description="Sequences decoded at a time.")
    max_total_tokens: int = Field(2048, gt=1, description="Longest prompt plus reply, in tokens.")
    max_input_tokens: int | None = Field(
        None, gt=0, description="Longest prompt, in tokens; null for one less than max_total_tokens."
    )
    max_concurrent_requests: int = Field(
        128, gt=0, description="Requests that may run or wait, together; one more is answered 429."
    )
    max_stop_sequences: int = Field(4, ge=0, description="Stop sequences of a request.")
    max_client_batch_size: int = Field(4, gt=0, description="Prompts of one request to /v1/completions.")
    payload_limit: int = Field(2_000_000, gt=0, description="Bytes of a request's body.")
    api_key_env: str | None = Field(
        None,
        min_length=1,
        description="Environment variable of the replica that holds the API key, or several with commas between; null "
        "lets everybody in.",
    )
    cors_origins: list[str] = Field(
        default_factory=list, description="Origins of web pages that may call, '*' for any; none by default."
    )
    log_prompts: bool = Field(False, description="Lines of the access log have prompts and replies too.")
    threads: int | None = Field(
        None, gt=0, description="torch threads on a CPU; null leaves torch's own choice."
    )
    traffic_log: TrafficLogConfig | None = Field(
        None, description="Keeps the chats that are answered; null, the default, keeps nothing."
    )

    @model_validator(mode="after")
    def _limits_fit_together(self) -> "EngineConfig":
        if self.max_concurrent_requests < self.max_batch_size:
            raise ValueError(
                f"args.max_concurrent_requests is {self.max_concurrent_requests}, fewer than max_batch_size, "
                f"{self.max_batch_size}: rows of the batch would stay empty. Raise the first or lower the second."
            )
        if self.max_input_tokens is not None and self.max_input_tokens >= self.max_total_tokens:
            raise ValueError(
                f"args.max_input_tokens is {self.max_input_tokens}, but max_total_tokens, which counts the reply too, "
                f"is {self.max_total_tokens}. Set it to at most {self.max_total_tokens - 1}."
            )
        return self


class GuesserConfig(Strict):
    """`user_config` of an engine: what it guesses with, while it runs. A key that is left out is as in `args`."""

    heads: str | None = Field(None, description="Heads folder; null serves the baseline.")
    tree: TreeChoice = Field("auto", description="As `args.tree`.")


# Ray Serve drops a key that it does not know, on most levels of a file without a word. The classes below have the keys
# of its own schema, or say in `refused` why not; a test compares the two. What has no default here has Ray Serve's.

REQUEST_TIMEOUT_S = 600.0  # no reply takes longer: then the proxy ends it. A replica that drains waits for it as long
ENGINE = "Engine"  # the one deployment of the fast shape
ROUTER = "Router"  # in the resilient one it stands before the engines, which have the names of their models


class ResilientConfig(Strict):
    """`args` of an application with a router in front: engines of one or several models behind one URL."""

    models: list[EngineConfig] = Field(
        min_length=1, description="One engine each; `deployments` has the replicas of each under its model_id."
    )

    @model_validator(mode="after")
    def _names_differ(self) -> "ResilientConfig":
        names = [ROUTER, *(name for model in self.models for name in (model.model_id, *model.aliases))]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"the name {twice[0]!r} stands for two things; give each model and alias behind one router a name of "
                f"its own, other than {ROUTER!r}."
            )
        return self


def _shape_of(args: Any) -> str:
    names = args if isinstance(args, dict) else getattr(args, "model_fields_set", ())
    return (ResilientConfig if "models" in names else EngineConfig).__name__


class HttpOptions(Strict):
    host: str = Field("127.0.0.1", description="Ray's own default is every interface; ours is loopback.")
    port: int = Field(8000, ge=0, le=65535)
    root_path: str = ""
    request_timeout_s: float | None = Field(REQUEST_TIMEOUT_S, gt=0)
    keep_alive_timeout_s: int = Field(90, gt=0, description="Longer than clients' pools keep a connection.")
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None


class LoggingConfig(Strict):
    encoding: Literal["TEXT", "JSON"] = "TEXT"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    logs_dir: str | None = None
    enable_access_log: bool = True
    additional_log_standard_attrs: list[str] = Field(default_factory=list)


class TracingConfig(Strict):
    enabled: bool = False
    exporter_import_path: str = ""
    sampling_ratio: float = Field(0.01, ge=0, le=1)


class ControllerEnv(Strict):
    env_vars: dict[str, str] = Field(default_factory=dict)


class ControllerOptions(Strict):
    runtime_env: ControllerEnv | None = None


class RuntimeEnv(Strict):
    """Ray's own, which takes a folder or a package from storage that every node reaches."""

    working_dir: str | None = None
    py_modules: list[str] | None = None
    py_executable: str | None = None
    java_jars: list[str] | None = None
    excludes: list[str] | None = None
    pip: Any = None
    uv: Any = None
    conda: Any = None
    env_vars: dict[str, str] | None = None
    config: dict[str, Any] | None = None
    worker_process_setup_hook: str | None = None
    image_uri: str | None = None
    container: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _folders_are_where_every_node_reaches_them(self) -> "RuntimeEnv":
        for uri in [self.working_dir, *(self.py_modules or [])]:
            if uri is not None and "://" not in uri:
                raise ValueError(
                    f"runtime_env names the folder {uri!r} of this machine; Ray Serve takes URIs alone: a zip at "
                    "s3://, gs:// or file://, or local:///PATH for what already lies on every node."
                )
        return self


class RayActorOptions(Strict):
    runtime_env: RuntimeEnv | None = None
    num_cpus: float | None = Field(None, ge=0)
    num_gpus: float | None = Field(None, ge=0)
    memory: float | None = Field(None, ge=0)
    resources: dict[str, float] | None = None
    accelerator_type: str | None = None
    label_selector: dict[str, str] | None = None
    fallback_strategy: list[dict[str, Any]] | None = None


class AutoscalingPolicy(Strict):
    policy_function: str = Field(description="module:name; medusa_ray.serve.scaling has one that goes by tokens.")
    policy_kwargs: dict[str, Any] = Field(default_factory=dict)


class AutoscalingConfig(Strict):
    refused: ClassVar[dict[str, str]] = {
        "smoothing_factor": "Ray Serve has upscaling_factor and downscaling_factor in its place",
        "upscale_smoothing_factor": "Ray Serve has upscaling_factor in its place",
        "downscale_smoothing_factor": "Ray Serve has downscaling_factor in its place",
    }

    min_replicas: int = Field(1, ge=0)
    initial_replicas: int | None = Field(None, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float | None = Field(
        None, gt=0, description="Requests of a replica, waiting ones included, above which another one is started."
    )
    metrics_interval_s: float | None = Field(None, gt=0)
    look_back_period_s: float | None = Field(None, gt=0)
    upscale_delay_s: float | None = Field(None, ge=0)
    downscale_delay_s: float | None = Field(None, ge=0)
    downscale_to_zero_delay_s: float | None = Field(None, ge=0)
    upscaling_factor: float | None = Field(None, gt=0)
    downscaling_factor: float | None = Field(None, gt=0)
    aggregation_function: Literal["mean", "max", "min"] | None = None
    policy: AutoscalingPolicy | None = None

    @model_validator(mode="after")
    def _numbers_of_replicas_are_in_order(self) -> "AutoscalingConfig":
        initial = self.min_replicas if self.initial_replicas is None else self.initial_replicas
        if not self.min_replicas <= initial <= self.max_replicas:
            raise ValueError(
                f"autoscaling_config has min_replicas {self.min_replicas}, initial_replicas {initial} and max_replicas "
                f"{self.max_replicas}; expected them in this order, none above the next."
            )
        return self


class BackpressureConfig(Strict):
    status_code: Literal[429, 503] = 503
    retry_after_s: float | None = Field(None, ge=0)


class RequestRouterConfig(Strict):
    request_router_class: str | None = None
    request_router_kwargs: dict[str, Any] = Field(default_factory=dict)
    request_routing_stats_period_s: float | None = Field(None, gt=0)
    request_routing_stats_timeout_s: float | None = Field(None, gt=0)
    initial_backoff_s: float | None = Field(None, gt=0)
    backoff_multiplier: float | None = Field(None, gt=0)
    max_backoff_s: float | None = Field(None, gt=0)


class DeploymentConfig(Strict):
    """What a file overrides of one deployment; what it leaves out is set by `medusa_ray.serve.app`."""

    refused: ClassVar[dict[str, str]] = {
        "gang_scheduling_config": "replicas of an engine work alone",
        "deployment_actors": "no deployment here has any",
    }

    name: str
    num_replicas: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    autoscaling_config: AutoscalingConfig | None = None
    max_ongoing_requests: int | None = Field(None, gt=0)
    max_queued_requests: Literal[-1] | Annotated[int, Field(ge=1)] | None = None
    backpressure_config: BackpressureConfig | None = None
    ray_actor_options: RayActorOptions | None = None
    user_config: GuesserConfig | None = Field(
        None, description="Changed alone, it reaches the replicas that run; without it they go by args."
    )
    health_check_period_s: float | None = Field(None, gt=0)
    health_check_timeout_s: float | None = Field(None, gt=0)
    graceful_shutdown_wait_loop_s: float | None = Field(None, ge=0)
    graceful_shutdown_timeout_s: float | None = Field(None, ge=0)
    placement_group_bundles: list[dict[str, float]] | None = None
    placement_group_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] | None = None
    placement_group_bundle_label_selector: list[dict[str, str]] | None = None
    max_replicas_per_node: int | None = Field(None, ge=1, le=100)
    logging_config: LoggingConfig | None = None
    request_router_config: RequestRouterConfig | None = None
    rolling_update_percentage: float | None = Field(None, gt=0, le=1)
    max_surge_percent: int | None = Field(None, ge=0, le=100)

    @model_validator(mode="after")
    def _replicas_have_one_owner(self) -> "DeploymentConfig":
        if isinstance(self.num_replicas, int) and self.autoscaling_config:
            raise ValueError(
                f"deployment {self.name} has num_replicas {self.num_replicas} and autoscaling_config; leave one of "
                "them out."
            )
        return self


class ApplicationConfig(Strict):
    refused: ClassVar[dict[str, str]] = {
        "host": "all applications of a file share http_options.host",
        "port": "all applications of a file share http_options.port",
        "autoscaling_policy": "scale a deployment by its autoscaling_config.policy",
    }

    name: str = Field(min_length=1)
    route_prefix: str = "/"
    import_path: Literal["medusa_ray.serve:build_app", "medusa_ray.serve:build_resilient_app"] = (
        "medusa_ray.serve:build_app"
    )
    runtime_env: RuntimeEnv | None = None
    args: Annotated[
        Annotated[EngineConfig, Tag(EngineConfig.__name__)]
        | Annotated[ResilientConfig, Tag(ResilientConfig.__name__)],
        Discriminator(_shape_of),
    ]
    deployments: list[DeploymentConfig] = Field(default_factory=list)
    logging_config: LoggingConfig | None = None
    external_scaler_enabled: bool = False

    @model_validator(mode="after")
    def _route_is_one(self) -> "ApplicationConfig":
        route = self.route_prefix
        if not route.startswith("/") or (route.endswith("/") and route != "/") or set("{}") & set(route):
            raise ValueError(
                f"application {self.name} has the route_prefix {route!r}; expected '/' or a path that starts with one, "
                "ends with none and has no braces, for example '/medusa'."
            )
        return self

    @property
    def engines(self) -> dict[str, EngineConfig]:
        """By the name of their deployment."""
        if isinstance(self.args, ResilientConfig):
            return {model.model_id: model for model in self.args.models}
        return {ENGINE: self.args}

    @model_validator(mode="after")
    def _args_are_the_builders(self) -> "ApplicationConfig":
        is_resilient = isinstance(self.args, ResilientConfig)
        if is_resilient != self.import_path.endswith(":build_resilient_app"):
            raise ValueError(
                f"application {self.name} has the import_path {self.import_path} and args "
                f"{'with' if is_resilient else 'without'} `models`; they belong to "
                "medusa_ray.serve:build_resilient_app, and to it alone."
            )
        return self

    @model_validator(mode="after")
    def _deployments_exist(self) -> "ApplicationConfig":
        known, names = list(self.engines), [deployment.name for deployment in self.deployments]
        if isinstance(self.args, ResilientConfig):
            known = [ROUTER, *known]
        for name in names:
            if name not in known:
                raise ValueError(
                    f"application {self.name} overrides a deployment named {name!r}; it has {' and '.join(known)}."
                )
            if names.count(name) > 1:
                raise ValueError(f"application {self.name} overrides the deployment {name} twice; write it once.")
        return self

    @model_validator(mode="after")
    def _shards_have_places(self) -> "ApplicationConfig":
        for deployment in self.deployments:
            bundles, args = deployment.placement_group_bundles, self.engines.get(deployment.name)
            num_shards = args.tensor_parallel if args else 1
            options = deployment.ray_actor_options
            if num_shards > 1 and options and (options.accelerator_type or options.label_selector):
                raise ValueError(
                    f"application {self.name} has tensor_parallel {num_shards} and names nodes in ray_actor_options, "
                    "which Ray would ask of the first shard alone, and wait for ever. Name them in "
                    "placement_group_bundles, one for each shard, such as {CPU: 1, GPU: 1, 'accelerator_type:H100': "
                    "0.001}."
                )
            if bundles is None or num_shards == 1 or len(bundles) == num_shards:
                continue
            raise ValueError(
                f"application {self.name} has tensor_parallel {num_shards}, but {len(bundles)} "
                "placement_group_bundles; give one for each shard, the replica's own first, or leave them out."
            )
        return self

    @model_validator(mode="after")
    def _autoscaling_can_fire(self) -> "ApplicationConfig":
        for deployment in self.deployments:
            scaling = deployment.autoscaling_config
            if self.external_scaler_enabled and (scaling or deployment.num_replicas == "auto"):
                raise ValueError(
                    f"application {self.name} has external_scaler_enabled and autoscales {deployment.name}; leave one "
                    "of them out."
                )
            args = self.engines.get(deployment.name)
            if args is None or scaling is None or scaling.policy or not scaling.target_ongoing_requests:
                continue
            at_once = args.max_concurrent_requests
            if deployment.max_ongoing_requests and deployment.max_ongoing_requests < at_once:
                at_once = deployment.max_ongoing_requests
            if scaling.target_ongoing_requests >= at_once:
                raise ValueError(
                    f"application {self.name} would never start another replica: target_ongoing_requests is "
                    f"{scaling.target_ongoing_requests:g}, but a replica has {at_once} requests at most "
                    "(args.max_concurrent_requests and max_ongoing_requests). Leave the target out, or set it near "
                    f"args.max_batch_size ({args.max_batch_size})."
                )
        return self


class ServeConfig(Strict):
    """A file that `serve deploy` takes as it is. Ray Serve ignores a misspelt key; this schema names it."""

    refused: ClassVar[dict[str, str]] = {
        "grpc_options": "the applications answer over HTTP alone",
        "target_capacity": "KubeRay sets it while it exchanges one cluster for another",
    }

    proxy_location: Literal["EveryNode", "HeadOnly", "Disabled"] = "HeadOnly"
    http_options: HttpOptions = HttpOptions()
    logging_config: LoggingConfig | None = None
    tracing_config: TracingConfig | None = None
    controller_options: ControllerOptions | None = None
    applications: list[ApplicationConfig] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_and_routes_differ(self) -> "ServeConfig":
        for what in ("name", "route_prefix"):
            values = [getattr(app, what) for app in self.applications]
            twice = {v for v in values if values.count(v) > 1}
            if twice:
                raise ValueError(
                    f"two applications share the {what} {sorted(twice)[0]!r}; give each its own."
                )
        return self


# ---------------------------------------------------------------------------------------------------- traffic


class TargetConfig(Strict):
    """One arm of a benchmark: any OpenAI server."""

    url: str = Field(description="Base URL without /v1, for example http://127.0.0.1:8000/medusa.")
    model: str = Field(description="What requests send as `model`.")
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the key; the key itself stands in no file."
    )
    replicas_url: str | None = Field(
        None,
        description="What tells the number of replicas: Ray's http://HEAD:8265/api/serve/applications/, or JSON with a "
        "number `replicas`. Null: /info, where that has one.",
    )


class SloConfig(Strict):
    """What a request has to keep to be good; what is null is not asked. A load that a share of them keeps meets it."""

    ttft_ms: float | None = Field(None, gt=0, description="Most milliseconds to the first content.")
    tpot_ms: float | None = Field(None, gt=0, description="Most milliseconds per further token.")
    latency_s: float | None = Field(None, gt=0, description="Most seconds to the last byte.")
    share: float = Field(0.95, gt=0, le=1, description="Share of the requests that has to keep all of these.")


class RampConfig(Strict):
    """Concurrency that changes over time, on one target: what autoscaling makes of it. No comparison."""

    target: str = Field(description="Name of the target.")
    steps: list[tuple[Annotated[float, Field(gt=0)], Annotated[int, Field(gt=0)]]] = Field(
        min_length=1, description="Seconds and concurrency of each step, one after the other."
    )


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class TrafficConfig(Strict):
    """The same prompts, in the same order, to each target in turn."""

    version: Literal[1] = 1
    output: str = Field(description="Folder that takes requests.parquet and GuideLLM's own files.")
    prompts: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        min_length=1,
        description="URI, or a list of which rows are taken in turns: a prompts split written by `medusa-ray data`, or "
        "a file or folder of JSON, JSONL or Parquet. Rows with `messages` go to /v1/chat/completions; rows with `text` "
        "or `prompt`, templated already, to /v1/completions as they are.",
    )
    targets: dict[str, TargetConfig] = Field(
        min_length=1, description="Arms by name, e.g. baseline and medusa."
    )
    loads: list[str] = Field(
        default=["synchronous", "concurrency=1", "concurrency=4", "concurrency=16", "throughput"],
        description="synchronous, throughput, concurrency=N, or or open loads of R requests/s: poisson=R, constant=R.",
    )
    slo: SloConfig | None = Field(None, description="Goodput is reported under it.")
    external: str | None = Field(
        None,
        description="The target that is an engine of another make, without speculation; a baseline below 0.8 of its "
        "output tokens/s is weak, and the report says so.",
    )
    search_break_even: bool = Field(
        False,
        description="After the loads, measure further concurrency=N between the last where medusa is faster than "
        "baseline and the first where it is not, or beyond the last one.",
    )
    ramp: RampConfig | None = Field(None, description="Sent after everything else.")
    overlap_with: str | None = Field(
        None, description="The training chats, such as RUN/prompts/train, of which no prompt should be one."
    )
    num_requests: int = Field(64, gt=0, description="Requests of each arm at each load in each round.")
    num_warmup: int = Field(8, ge=0, description="Requests sent to each arm at first, at once; in no figure.")
    rounds: int = Field(2, gt=0, description="Times that every arm is measured, interleaved.")
    max_seconds: float = Field(60, gt=0, description="Longest time of one arm at one load in one round.")
    max_tokens: int = Field(128, gt=0, description="Longest reply, in tokens.")
    temperature: float = Field(0.0, ge=0, le=2, description="Sent with every request.")
    seed: int = Field(
        0,
        ge=0,
        description="Sent with every request, so that arms that sample draw alike; and what arrivals are drawn from.",
    )
    max_concurrency: int = Field(
        32,
        gt=0,
        description="Requests in flight under `throughput`, and the most that search_break_even tries.",
    )

    @model_validator(mode="after")
    def _loads_are_known(self) -> "TrafficConfig":
        for load in self.loads:
            kind, _, number = load.partition("=")
            is_known = load in ("synchronous", "throughput")
            if kind == "concurrency":
                is_known = number.isdecimal() and int(number) > 0
            elif kind in ("poisson", "constant"):
                is_known = re.fullmatch(r"\d+(\.\d+)?", number) is not None and float(number) > 0
            if not is_known:
                raise ValueError(
                    f"loads has {load!r}; expected 'synchronous', 'throughput', 'concurrency=N' with N of at least 1, "
                    "'poisson=R' or 'constant=R' with R requests per second."
                )
        return self

    @model_validator(mode="after")
    def _targets_are_there(self) -> "TrafficConfig":
        for key, name in (("external", self.external), ("ramp.target", self.ramp and self.ramp.target)):
            if name is not None and name not in self.targets:
                raise ValueError(f"{key} is {name!r}, which is none of the targets {list(self.targets)}.")
        if self.search_break_even and not {"baseline", "medusa"} <= self.targets.keys():
            raise ValueError(
                f"search_break_even compares the targets baseline and medusa, but there are {list(self.targets)}. "
                "Name them so, or leave it out."
            )
        return self


# ---------------------------------------------------------------------------------------------------- reading

Config = TypeVar("Config", bound=Strict)

# Flags of the original training script, which users will bring along.
LEGACY_FLAGS = {
    "model_name_or_path": "model.base",
    "data_path": "data.train",
    "output_dir": "output",
    "bf16": "train.dtype",
    "tf32": "train.tf32",
    "deepspeed": "train.deepspeed",
    "eval_strategy": "train.eval_steps",
    "evaluation_strategy": "train.eval_steps",
    "warmup_ratio": "train.warmup_steps",
    "lazy_preprocess": "hidden.mode",
    "optim": "train.optimizer",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "lr_scheduler_type": "train.lr_scheduler",
    "model_max_length": "data.max_prompt_tokens",
    "save_strategy": "train.save_steps",
    "medusa_num_heads": "heads.num_heads",
    "medusa_num_layers": "heads.num_layers",
}


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that gives one key twice, where YAML itself would drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {sorted(twice)[0]!r} stands here twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read(uri: str | Path) -> dict[str, Any]:
    """The plain values of one YAML file. Raises UserError when it cannot be read or holds no mapping."""
    try:
        with fsspec.open(str(uri), "r", encoding="utf-8") as file:
            text = file.read()
    except Exception as error:  # every filesystem has errors of its own
        raise UserError(f"{uri} cannot be read: {error}. Give the path of a YAML file.") from error
    return _mapping(text, str(uri))


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        raw = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{where} holds {type(raw).__name__}, but a mapping of keys to values was expected.")
    return raw


def load(kind: type[Config], uri: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads one YAML file and applies `a.b=value` overrides to it.

    Raises UserError with every problem of the file at once, each naming its dotted key.
    """
    raw = read(uri)
    for override in overrides:
        _apply(raw, override)
    return parse(kind, raw, str(uri))


def kind_of(raw: dict[str, Any]) -> type[Strict]:
    """A run, a serve file or traffic, whichever these values mean to be: it knows most of their keys."""
    kinds: list[type[Strict]] = [RunConfig, ServeConfig, TrafficConfig]
    return max(kinds, key=lambda kind: sum(bool(_close(str(key), kind.model_fields)) for key in raw))


def parse_any(raw: dict[str, Any], where: str) -> Strict:
    """The config that these values mean to be: of a run, of a server or of traffic, or the part of a KubeRay file that
    is ours, `serveConfigV2` of a RayService or `runtimeEnvYAML` of a RayJob."""
    if not str(raw.get("apiVersion", "")).startswith("ray.io/"):
        kind = kind_of(raw)
        if not any(_close(str(key), kind.model_fields) for key in raw):
            keys = ", ".join(map(str, raw)) or "none"
            raise UserError(
                f"{where} has the keys {keys}; a run has `model` and `data`, a serve file `applications`, and traffic "
                "`targets` and `prompts`."
            )
        return parse(kind, raw, where)
    ours: dict[str, tuple[str, type[Strict]]] = {
        "RayService": ("serveConfigV2", ServeConfig),
        "RayJob": ("runtimeEnvYAML", RuntimeEnv),
    }
    if raw.get("kind") not in ours:
        raise UserError(f"{where}: kind is {raw.get('kind')!r}; expected {' or '.join(ours)}.")
    key, kind_of_text = ours[raw["kind"]]
    text = (raw.get("spec") or {}).get(key)
    if not isinstance(text, str):
        raise UserError(f"{where}: spec.{key} is {text!r}; expected the text of a YAML file, after `{key}: |`.")
    return parse(kind_of_text, _mapping(text, f"{where}: spec.{key}"), f"{where}: spec.{key}")


def notes(config: ServeConfig) -> list[str]:
    """What is valid in a serve file, but hardly meant."""
    http, found = config.http_options, []
    if "host" not in http.model_fields_set:
        found.append("http_options.host is not set: `medusa-ray serve` takes 127.0.0.1, `serve deploy` every interface")
    if "request_timeout_s" not in http.model_fields_set:
        found.append(
            f"http_options.request_timeout_s is not set: `medusa-ray serve` takes {REQUEST_TIMEOUT_S:g} s, `serve "
            "deploy` has no limit"
        )
    open_apps = [
        app.name
        for app in config.applications
        if any(args.api_key_env is None for args in app.engines.values())
    ]
    if http.host not in ("127.0.0.1", "localhost", "::1") and open_apps:
        found.append(
            f"http_options.host is {http.host}, and {', '.join(open_apps)} let everybody in who reaches it; name an "
            "environment variable that holds a key in args.api_key_env"
        )
    for app in config.applications:
        if "import_path" not in app.model_fields_set:
            found.append(f"application {app.name} has no import_path, which `serve deploy` needs: {app.import_path}")
        for name, args in app.engines.items():
            options = {deployment.name: deployment for deployment in app.deployments}.get(name)
            found += _notes_on(app.name, args, options, http.request_timeout_s)
    return found


def _notes_on(
    app: str, args: EngineConfig, options: DeploymentConfig | None, request_timeout_s: float | None
) -> list[str]:
    """The same of one engine and what the file overrides of its deployment."""
    found = []
    resources = options.ray_actor_options if options else None
    if args.device == "cuda" and not (resources and resources.num_gpus):
        found.append(
            f"application {app} runs on cuda, but its ray_actor_options ask for no num_gpus, and Ray hides "
            "GPUs that nobody asked for"
        )
    scaling = options.autoscaling_config if options else None
    scales = scaling is not None or (options is not None and options.num_replicas == "auto")
    if scales and not (scaling and (scaling.target_ongoing_requests or scaling.policy)):
        found.append(
            f"application {app} autoscales without target_ongoing_requests: `medusa-ray serve` takes "
            f"args.max_batch_size ({args.max_batch_size}), `serve deploy` Ray's 2"
        )
    drain_s = (options and options.graceful_shutdown_timeout_s) or REQUEST_TIMEOUT_S
    if request_timeout_s is None or request_timeout_s > drain_s:
        found.append(
            f"a reply of application {app} may take longer than a replica that ends waits for it, {drain_s:g} "
            "s; lower http_options.request_timeout_s or raise graceful_shutdown_timeout_s"
        )
    return found


def parse(kind: type[Config], raw: dict[str, Any], where: str) -> Config:
    """A checked config from plain values; `where` opens the message of the UserError that it raises."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(kind, problem)}" for problem in error.errors())
        raise UserError(f"{where}:\n{problems}") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    name = key.lstrip("-").split(".")[-1]
    if name in LEGACY_FLAGS:
        raise UserError(f"{key} is a flag of the original script; here it is {LEGACY_FLAGS[name]}=VALUE.")
    if not equals:
        raise UserError(f"{override!r} is not an override; expected section.key=value, e.g. train.epochs=2.")
    *sections, last = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise UserError(f"{key} cannot be set: {section} holds a value, not a section.")
    try:
        raw[last] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"the value of {override!r} is not YAML: {error}") from error


def _explain(kind: type[Strict], problem: Any) -> str:
    """One line for one problem that pydantic found: the dotted key, what came, what to do."""
    path, section = _locate(kind, problem["loc"])
    if problem["type"] == "extra_forbidden":
        name = str(problem["loc"][-1])
        if name in LEGACY_FLAGS:
            return f"{path} is a flag of the original script; here it is {LEGACY_FLAGS[name]}."
        if section and name in section.refused:
            return f"{path} is a key of Ray Serve's that is not taken here: {section.refused[name]}."
        right = _nearest(kind, section, path)
        return f"{path} is not a key" + (f"; did you mean {right}?" if right else ".")
    if problem["type"] == "missing":
        return f"{path} is missing; it has no default."
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{path} is {problem['input']!r}: {problem['msg']}."


def _locate(kind: type[Strict], loc: tuple[int | str, ...]) -> tuple[str, type[Strict] | None]:
    """Dotted key of a problem, and the section that it stands in.

    pydantic puts the branch of a union into the place, `tree.list[list[int]]`; no user wrote that, so it is
    left out.
    """
    parts: list[str] = []
    section: type[Strict] | None = kind
    inner: Any = (
        kind  # where a further part is looked up: a section, a list or dict of sections, a plain type
    )
    for part in loc:
        if branch := _branches(inner).get(part):
            inner = section = branch
            continue
        if isinstance(part, str) and not _model_of(inner):
            break
        parts.append(str(part))
        if isinstance(part, int) or get_origin(inner) is dict:
            inner = _model_of(inner)
            continue
        section = _model_of(inner)
        field = section.model_fields.get(part) if section else None
        inner = field.annotation if field else None
    return ".".join(parts), section


def _nearest(kind: type[Strict], section: type[Strict] | None, path: str) -> str | None:
    """The dotted key nearest to a misspelt one: among its siblings first, then anywhere in the config."""
    prefix, _, name = path.rpartition(".")
    if section and (sibling := _close(name, section.model_fields)):
        return f"{prefix}.{sibling}" if prefix else sibling
    paths = {dotted.split(".")[-1]: dotted for dotted in reversed(_dotted(kind))}  # the first of a name is meant
    anywhere = _close(name, paths)
    return paths[anywhere] if anywhere else None


def _close(name: str, names: Iterable[str]) -> str | None:
    """The name that looks most like this one, or that has it for a part."""
    near = difflib.get_close_matches(name, names, n=1) or [
        other for other in names if name in other.split("_")
    ]
    return near[0] if near else None


def _model_of(annotation: Any) -> type[Strict] | None:
    """The config class inside `X`, `X | None`, `list[X]` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_of(inner))), None)


def _branches(annotation: Any) -> dict[int | str, type[Strict]]:
    """The config classes of a union of several, by the names that pydantic puts into places."""
    classes = [inner for inner in map(_model_of, get_args(annotation)) if inner]
    return {inner.__name__: inner for inner in classes} if len(classes) > 1 else {}


def _dotted(kind: type[Strict], prefix: str = "") -> list[str]:
    paths = []
    for name, field in kind.model_fields.items():
        inner = _model_of(field.annotation)
        if inner is not field.annotation:  # a value, or something that holds sections
            paths.append(f"{prefix}{name}")
        if inner:
            paths += _dotted(inner, f"{prefix}{name}.")
    return paths
