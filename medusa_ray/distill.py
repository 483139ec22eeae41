"""Prompts -> what the base itself answers to them, token by token, and the hidden states it passed through.

Ray Data deals shards of prompts to a pool of engines that have no heads. A shard becomes one part of
distilled/ (and of hidden/, when it is captured) that is whole or absent, and a row draws its noise from the
seed and its own id alone: a run that was killed anywhere goes on with the missing parts and ends with the
same rows.
"""

import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from medusa_ray import parts, provenance, records, shards
from medusa_ray.config import RunConfig, UserError

BATCHES_PER_SHARD = 4  # so that the continuous batch is full most of the time
PARTS_PER_PROCESS = 64  # of replies that only have to be copied

TEMPLATE = "template hides the reply"  # the error of a row

Row = dict[str, Any]
LoadEngine = Callable[..., Any]


def run(config: RunConfig, load_engine: LoadEngine | None = None) -> str:
    """Writes distilled/*.parquet, a row for each training prompt in their order, and returns its URI.

    With hidden.mode `capture` the parts of hidden/ are written too; the hidden stage declares them finished.
    load_engine: stands in for Engine.load. Raises UserError when prompts/ is not finished.
    """
    prompts, distilled, hidden = (
        parts.absolute(config.artifact(name)) for name in ("prompts", "distilled", "hidden")
    )
    settings, inputs = identity(config)
    if provenance.is_complete(distilled, settings, inputs):
        return config.artifact("distilled")
    made = provenance.read(prompts)
    if made is None:
        raise UserError(f"{prompts} is not finished. Run the data stage first.")

    key = provenance.key(settings, inputs)
    done = parts.begin(distilled, key)
    captured = hidden if config.hidden.mode == "capture" and config.distill.replies == "generate" else None
    if captured:
        from medusa_ray.states import settings_of  # here and not above: it loads torch

        done &= parts.begin(captured, provenance.key(settings_of(config), {"distilled": key}))
    refs = [
        shards.put(shard)
        for shard in plan(f"{prompts}/train", BATCHES_PER_SHARD * config.distill.batch_size)
        if shard["part"] not in done
    ]
    base = shards.base_of(config.model)
    if config.distill.replies == "given":
        make_worker: Callable[[], shards.Worker] = functools.partial(Copier, config, base, prompts, distilled)
        resources = shards.tasks(len(refs), PARTS_PER_PROCESS)
    else:
        device = shards.device_of(config.model)
        longest = made["splits"]["train"]["longest_prompt_tokens"]
        make_worker = functools.partial(
            Generator, config, base, device, longest, prompts, distilled, captured, load_engine
        )
        resources = shards.actors(config.distill.num_actors, len(refs), device)
    for _ in shards.run("distill", refs, make_worker, **resources):
        pass
    facts = _facts(distilled)
    if not facts["rows"]["good"]:
        raise UserError(_why_none(config, base, facts["rows"]))
    provenance.write(distilled, settings, inputs, **facts)
    return config.artifact("distilled")


def identity(config: RunConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings and inputs that the rows depend on."""
    settings = {
        "model": config.model.model_dump(include={"revision", "dtype", "quantization"}),
        "distill": config.distill.model_dump(exclude={"num_actors"}),
        "over_long": config.data.over_long,
    }
    prompts, base = config.artifact("prompts"), config.model.base
    return settings, {"prompts": provenance.digest(prompts), "base": provenance.digest(base)}


def plan(prompts: str, most_rows: int) -> Iterator[shards.Shard]:
    """Runs of at most so many consecutive prompts, none across two files: the same ones every time."""
    index = itertools.count()
    for name in parts.names(prompts):
        num_rows = parts.num_rows(prompts, name)
        for start in range(0, num_rows, most_rows):
            length = min(most_rows, num_rows - start)
            yield {"part": parts.part_name(next(index)), "source": name, "start": start, "length": length}


def seed_of(seed: int, row_id: str) -> int:
    """The seed of one row, wherever and whenever it is generated; 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{row_id}".encode()).digest()[:8]) >> 1


def _facts(distilled: str) -> dict[str, Any]:
    """Counts of what was written, by this run or by the killed ones before it."""
    errors: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    num_rows = num_reply_tokens = 0
    for name in parts.names(distilled):
        table = parts.read(distilled, name, ["reply_ids", "finish_reason", "error"])
        num_rows += len(table)
        num_reply_tokens += sum(len(chunk.flatten()) for chunk in table["reply_ids"].chunks)
        errors.update(error.split(":")[0] for error in table["error"].to_pylist() if error)
        reasons.update(reason for reason in table["finish_reason"].to_pylist() if reason)
    counts = {"in": num_rows, "good": num_rows - errors.total(), "errors": dict(errors)}
    return {"rows": counts, "finish_reasons": dict(reasons), "num_reply_tokens": num_reply_tokens}


def _why_none(config: RunConfig, base: str, counts: dict[str, Any]) -> str:
    """No row is good, so that no token is a label."""
    why = f"none of {counts['in']} training rows leaves a label: {counts['errors']}. "
    if TEMPLATE in counts["errors"]:
        from medusa_ray.chat import Chat

        start = Chat.load(base, config.model.revision).template_start
        return (
            f"{why}The chat template of {config.model.base}, {start!r}..., renders a chat differently once it is "
            "answered, and has no {% generation %} marks. Set distill.replies to generate, or mark what the assistant "
            "says in the template."
        )
    return f"{why}The error of each row is in {config.artifact('distilled')}."


def _prompts_of(folder: str, shard: shards.Shard) -> list[Row]:
    columns = ["id", "prompt_ids", "reference", "reference_ids", "error"]
    table = parts.read(f"{folder}/train", shard["source"], columns)
    return table.slice(shard["start"], shard["length"]).to_pylist()


def _reply(
    prompt: Row,
    reply_ids: list[int] | None = None,
    finish_reason: str | None = None,
    error: str | None = None,
) -> Row:
    """A row of DISTILLED."""
    return {
        "id": f"{prompt['id']}/0",
        "prompt_ids": prompt["prompt_ids"],
        "reply_ids": reply_ids or [],
        "finish_reason": finish_reason,
        "error": error,
    }


class Generator:
    """A shard of prompts -> the base's replies, and the hidden states that produced them."""

    def __init__(
        self,
        config: RunConfig,
        base: str,
        device: str,
        longest_prompt_tokens: int,
        prompts: str,
        distilled: str,
        hidden: str | None,
        load_engine: LoadEngine | None,
    ) -> None:
        import torch  # here and not above: the driver deals shards and needs no model

        from medusa_ray.medusa.engine import Engine, Request

        load_engine = load_engine or Engine.load
        if device == "cpu":
            torch.set_num_threads(1)  # an actor has one CPU
        self.make_request, self.settings = Request, config.distill
        self.dtype, self.loss_on, self.top_k = config.model.dtype, config.data.loss_on, config.hidden.top_k
        self.prompts, self.distilled, self.hidden = prompts, distilled, hidden
        try:
            self.engine = load_engine(
                base,
                device=device,
                dtype=config.model.dtype,
                max_batch_size=self.settings.batch_size,
                max_total_tokens=longest_prompt_tokens + self.settings.max_new_tokens,
                revision=config.model.revision,
                quantization=config.model.quantization,
            )
        except (OSError, ValueError) as error:
            message = f"the base {base} cannot be loaded: {error}. Set model.base to a model that can."
            raise UserError(message) from error

    def __call__(self, shard: shards.Shard) -> dict[str, Any]:
        prompts = _prompts_of(self.prompts, shard)
        completions = iter(self._generate([prompt for prompt in prompts if prompt["error"] is None]))
        rows: list[Row] = []
        captured = []
        for prompt in prompts:
            completion = prompt["error"] or next(completions)
            if isinstance(completion, str):
                rows.append(_reply(prompt, error=completion))
                continue
            rows.append(_reply(prompt, completion.token_ids, completion.finish_reason))
            captured.append((rows[-1], completion.hidden_TC))
        if self.hidden:
            parts.write(self.hidden, shard["part"], self._hidden_table(captured))
        parts.write(self.distilled, shard["part"], pa.Table.from_pylist(rows, records.DISTILLED))
        return {"part": shard["part"]}

    def _hidden_table(self, captured: list[tuple[Row, Any]]) -> pa.Table:
        """captured: each good row, and the state that produced each token of its reply."""
        from medusa_ray.medusa.states import teacher
        from medusa_ray.states import leaves_labels, table_of

        kept = [(row, hidden_TC) for row, hidden_TC in captured if leaves_labels(row, self.loss_on)]
        return table_of(
            [row for row, _ in kept],
            [hidden_TC for _, hidden_TC in kept],
            self.dtype,
            self.engine.hidden_size,
            self.loss_on,
            self.top_k,
            lambda hidden_NC, k: teacher(self.engine.model, hidden_NC, k),
        )

    def _generate(self, prompts: list[Row]) -> list[Any]:
        """A completion for each prompt, or the reason why there is none."""
        faults = [self._fault(prompt) for prompt in prompts]
        good = [prompt for prompt, fault in zip(prompts, faults, strict=True) if fault is None]
        completions = iter(
            self.engine.generate(
                [prompt["prompt_ids"] for prompt in good],
                max_new_tokens=self.settings.max_new_tokens,
                temperature=self.settings.temperature,
                top_p=self.settings.top_p,
                seed=[seed_of(self.settings.seed, prompt["id"]) for prompt in good],
                capture_hidden=self.hidden is not None,
            )
        )
        return [fault or next(completions) for fault in faults]

    def _fault(self, prompt: Row) -> str | None:
        try:
            self.engine.check(self.make_request(prompt["prompt_ids"], self.settings.max_new_tokens))
        except ValueError as error:
            return f"refused by the engine: {error}"
        return None


class Copier:
    """A shard of prompts -> the chats' own replies, for distill.replies: given."""

    def __init__(self, config: RunConfig, base: str, prompts: str, distilled: str) -> None:
        from medusa_ray.medusa.base import text_config

        self.prompts, self.distilled = prompts, distilled
        self.over_long, self.most = config.data.over_long, config.distill.max_new_tokens
        base_config = text_config(base, config.model.revision)
        self.max_positions = getattr(base_config, "max_position_embeddings", None) or 2**31

    def __call__(self, shard: shards.Shard) -> dict[str, Any]:
        rows = [self._copy(prompt) for prompt in _prompts_of(self.prompts, shard)]
        parts.write(self.distilled, shard["part"], pa.Table.from_pylist(rows, records.DISTILLED))
        return {"part": shard["part"]}

    def _copy(self, prompt: Row) -> Row:
        reply_ids = prompt["reference_ids"]
        if prompt["error"] is not None:
            return _reply(prompt, error=prompt["error"])
        if not reply_ids and prompt["reference"] is not None:
            return _reply(prompt, error=f"{TEMPLATE}: it renders a chat differently once it is answered")
        if not reply_ids:
            return _reply(prompt, error="no reply: the chat has no answer")
        room = min(self.most, self.max_positions - len(prompt["prompt_ids"]))
        if len(reply_ids) <= room:
            return _reply(prompt, reply_ids, "stop")
        fault = (
            f"too long: a prompt of {len(prompt['prompt_ids'])} tokens and a reply of {len(reply_ids)}, over "
            f"distill.max_new_tokens = {self.most} or the base's {self.max_positions} positions"
        )
        if self.over_long == "error":
            raise UserError(
                f"the chat {prompt['id']} is {fault}. Set data.over_long to truncate or skip, or allow more."
            )
        if self.over_long == "truncate" and room > 0:
            return _reply(prompt, reply_ids[:room], "length")
        return _reply(prompt, error=fault)
