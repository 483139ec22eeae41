"""Tables of hidden/ -> states and labels: what the heads are trained on.

# N positions   H heads   C hidden   R rows   K tokens that the teacher names
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from medusa_ray.medusa.loss import IGNORED, Teacher, labels_for, teacher_for

SKELETON = ["id", "input_ids", "position", "label_mask"]  # the columns of hidden/ without what the base says
TEACHER = ["teacher_ids", "teacher_logprobs"]


@dataclass(frozen=True)
class Batch:
    hidden_NC: Tensor  # in the base's dtype
    labels_NH: Tensor
    teacher: Teacher | None
    id_N: np.ndarray  # of the row that each position is of

    def __len__(self) -> int:
        return len(self.id_N)

    def __getitem__(self, where: Any) -> "Batch":
        """Some of the positions, by a slice or by their numbers."""
        teacher = self.teacher and Teacher(*(tensor[where] for tensor in self.teacher))
        return Batch(self.hidden_NC[where], self.labels_NH[where], teacher, self.id_N[where])

    def to(self, device: torch.device) -> "Batch":
        teacher = self.teacher and Teacher(*(tensor.to(device) for tensor in self.teacher))
        return Batch(self.hidden_NC.to(device), self.labels_NH.to(device), teacher, self.id_N)

    @property
    def num_positions(self) -> int:
        return len(self)

    def suspects(self) -> list[str]:
        """Rows with states that are not finite, or all when there is none."""
        broken_N = ~self.hidden_NC.isfinite().all(dim=1).cpu().numpy()
        return sorted(set(self.id_N[broken_N] if broken_N.any() else self.id_N))


class Places(NamedTuple):
    """The positions of a table at which some head has a label."""

    row_N: Tensor
    place_N: Tensor  # among all positions of the table
    labels_NH: Tensor
    teacher: Teacher | None


def places_of(table: pa.Table, num_heads: int, top_k: int = 0) -> Places:
    """table: with the columns of SKELETON, and the teacher's with top_k, its number of tokens."""
    ids, position, mask = (table[name].combine_chunks() for name in ("input_ids", "position", "label_mask"))
    num_tokens_R, num_positions_R = lengths_of(ids), lengths_of(position)
    # One sequence of all rows, with room between them for what the last heads of a row ask for in vain.
    start_R = np.cumsum(num_tokens_R + num_heads + 1) - (num_tokens_R + num_heads + 1)
    token_T = np.repeat(start_R - (np.cumsum(num_tokens_R) - num_tokens_R), num_tokens_R)
    token_T = token_T + np.arange(len(token_T))
    length = int((num_tokens_R + num_heads + 1).sum())
    input_ids, label_mask = torch.zeros(length, dtype=torch.int32), torch.zeros(length, dtype=torch.bool)
    input_ids[token_T] = torch.from_numpy(ids.flatten().to_numpy(zero_copy_only=False).copy())
    label_mask[token_T] = torch.from_numpy(mask.flatten().to_numpy(zero_copy_only=False).copy())
    position_N = position.flatten().to_numpy(zero_copy_only=False) + np.repeat(start_R, num_positions_R)
    position_N = torch.from_numpy(position_N)
    labels_NH = labels_for(input_ids, label_mask, position_N, num_heads)
    place_N = (labels_NH != IGNORED).any(dim=1).nonzero()[:, 0]
    row_N = torch.from_numpy(np.repeat(np.arange(len(table)), num_positions_R))
    teacher = None
    if top_k:
        said = (table[name].combine_chunks().flatten().to_numpy() for name in TEACHER)
        ids_LK, logprobs_LK = (torch.from_numpy(values.copy()).view(-1, top_k) for values in said)
        teacher = teacher_for(ids_LK, logprobs_LK, label_mask, position_N[place_N], num_heads)
    return Places(row_N[place_N], place_N, labels_NH[place_N], teacher)


def lengths_of(lists: Any) -> np.ndarray:
    return lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)


@dataclass(frozen=True)
class Form:
    """What the tables of a hidden/ are like, and how many heads ask."""

    num_heads: int
    hidden_size: int
    dtype: str  # float32 | bfloat16
    top_k: int = 0  # tokens that the teacher names for a label

    def batch(self, table: pa.Table) -> Batch:
        """All positions of a table that have a label, in its order.

        Raises ValueError when a row's bytes are not the states of its positions.
        """
        raw = table["hidden"].combine_chunks()
        width = np.dtype(
            np.int16 if self.dtype == "bfloat16" else np.int32
        )  # NumPy has no bfloat16: bits are moved
        found_R = pc.binary_length(raw).to_numpy(zero_copy_only=False)
        needed_R = lengths_of(table["position"].combine_chunks()) * self.hidden_size * width.itemsize
        if len(wrong := np.flatnonzero(found_R != needed_R)):
            row = int(wrong[0])
            raise ValueError(
                f"row {table['id'][row]} of hidden/ has {found_R[row]} bytes of states, but its positions need "
                f"{needed_R[row]}, {self.hidden_size} {self.dtype} each. Run the hidden stage again."
            )
        places = places_of(table, self.num_heads, self.top_k)
        offsets = np.frombuffer(raw.buffers()[1], np.int64)[raw.offset : raw.offset + len(raw) + 1]
        bits_NC = np.frombuffer(raw.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]].view(width)
        # Indexing by an array copies, so that Arrow's memory is given back.
        hidden_NC = torch.from_numpy(bits_NC.reshape(-1, self.hidden_size)[places.place_N.numpy()])
        id_N = table["id"].to_numpy()[places.row_N.numpy()]
        return Batch(hidden_NC.view(getattr(torch, self.dtype)), places.labels_NH, places.teacher, id_N)

    def joined(self, batches: list[Batch]) -> Batch:
        """The positions of all, in their order."""
        return joined(batches)

    def nothing(self) -> Batch:
        """One position without a label."""
        said = torch.zeros(1, self.num_heads, self.top_k)
        return Batch(
            torch.zeros(1, self.hidden_size, dtype=getattr(torch, self.dtype)),
            torch.full((1, self.num_heads), IGNORED),
            Teacher(said.int(), said) if self.top_k else None,
            np.array([""], dtype=object),
        )


def joined(batches: list[Batch]) -> Batch:
    """The positions of all, in their order."""
    hidden_NC = torch.cat([batch.hidden_NC for batch in batches])
    labels_NH = torch.cat([batch.labels_NH for batch in batches])
    teachers = [batch.teacher for batch in batches if batch.teacher is not None]
    teacher = Teacher(*map(torch.cat, zip(*teachers, strict=True))) if teachers else None
    return Batch(hidden_NC, labels_NH, teacher, np.concatenate([batch.id_N for batch in batches]))
