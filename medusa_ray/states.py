"""Distilled rows -> rows of hidden/, for whoever holds the base: the hidden stage, or training that streams.

Captured, computed or streamed, rows are made here, so that they are the same rows.

# N states   K tokens kept   C hidden   V vocabulary
"""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from medusa_ray import records
from medusa_ray.config import HiddenConfig, ModelConfig, RunConfig, UserError

# transformers is imported where it is used: workers that train hold no base, and it takes half a second.

Row = dict[str, Any]
Teach = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # as medusa.states.teacher of one base


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings that rows of hidden/ depend on; whether they are captured or computed is none of them."""
    return {
        "model": config.model.model_dump(include={"revision", "dtype", "quantization"}),
        "loss_on": config.data.loss_on,
        "top_k": config.hidden.top_k,
        "is_kept": config.hidden.mode != "stream",
    }


class Body:
    """The frozen base: a part of distilled/ -> the part of hidden/ that belongs to it."""

    def __init__(
        self, model: ModelConfig, base: str, device: str, hidden: HiddenConfig, loss_on: str
    ) -> None:
        """base, device: model.base and model.device as this process finds them.

        Raises UserError when the base cannot be loaded.
        """
        from medusa_ray.medusa.base import load
        from medusa_ray.medusa.states import PackedBase

        if device == "cpu":
            torch.set_num_threads(1)  # an actor has one CPU
        dtype = getattr(torch, model.dtype)
        try:
            loaded = load(base, dtype, device, model.revision, model.quantization)
        except (OSError, ValueError) as error:
            message = f"the base {base} cannot be loaded: {error}. Set model.base to a model that can."
            raise UserError(message) from error
        self.base = PackedBase(loaded, hidden.batch_tokens)
        self.dtype, self.top_k, self.loss_on = model.dtype, hidden.top_k, loss_on

    def hidden_table(self, distilled: pa.Table) -> pa.Table:
        """A table of HIDDEN: a row for each good one that leaves a head a label, in their order."""
        rows = [row for row in distilled.to_pylist() if leaves_labels(row, self.loss_on)]
        sequences = [row["prompt_ids"] + row["reply_ids"] for row in rows]
        positions = [
            range(records.first_position(len(row["prompt_ids"]), self.loss_on), len(sequence) - 1)
            for row, sequence in zip(rows, sequences, strict=True)
        ]
        states = self.base.states(sequences, positions)
        return table_of(
            rows, states, self.dtype, self.base.hidden_size, self.loss_on, self.top_k, self.base.teacher
        )


def leaves_labels(row: Row, loss_on: str) -> bool:
    """Whether a distilled row has a row in hidden/."""
    if row["error"] is not None:
        return False
    return records.num_positions(len(row["prompt_ids"]), len(row["reply_ids"]), loss_on) > 0


def table_of(
    rows: list[Row],
    states: list[Tensor],
    dtype: str,
    hidden_size: int,
    loss_on: str,
    top_k: int,
    teach: Teach,
) -> pa.Table:
    """A table of HIDDEN of distilled rows that leave labels.

    states: of each row [N, C], the one that says each token that may be a label: its first position ... T - 2.
    Raises UserError when the base has fewer than top_k tokens.
    """
    taught = [([], [])] * len(rows) if not (top_k and rows) else _taught(states, top_k, teach)
    return records.hidden_table(
        [
            records.hidden_row(
                row["id"], row["prompt_ids"], row["reply_ids"], _raw(own_NC[:-1]), loss_on, *teacher
            )
            for row, own_NC, teacher in zip(rows, states, taught, strict=True)
        ],
        dtype,
        hidden_size,
        top_k,
    )


def _taught(states: list[Tensor], top_k: int, teach: Teach) -> list[tuple[list[int], list[float]]]:
    try:
        ids_NK, logprobs_NK = teach(torch.cat(states), top_k)
    except ValueError as error:
        raise UserError(f"hidden.top_k is {top_k}, but {error}") from error
    lengths = list(map(len, states))
    return [
        (ids.flatten().tolist(), logprobs.flatten().tolist())
        for ids, logprobs in zip(ids_NK.split(lengths), logprobs_NK.split(lengths), strict=True)
    ]


def _raw(states_NC: Tensor) -> bytes:
    return states_NC.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def read_output_layer(model: ModelConfig) -> Tensor:
    """Weight [V, C] of the base's output layer. Raises UserError when the base does not show it."""
    from medusa_ray.medusa.base import output_weight

    try:
        return output_weight(model.base, model.revision)
    except OSError as error:
        message = f"the base {model.base} cannot be read: {error}. Set model.base to a folder or hub name."
        raise UserError(message) from error
    except ValueError as error:
        raise UserError(str(error)) from error
