"""Tables of hidden/ -> states and labels: what the heads are trained on.

# N positions   H heads   C hidden   M draft vocabulary   R rows
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from medusa_ray.medusa.loss import IGNORED, labels_for

SKELETON = ["id", "input_ids", "position", "label_mask"]  # the columns of hidden/ without the states


class Batch(NamedTuple):
    hidden_NC: Tensor  # in the base's dtype
    labels_NH: Tensor
    ids: list[str]  # of the row that each position is of


class Places(NamedTuple):
    """The positions of a table at which some head has a label."""

    row_N: Tensor
    place_N: Tensor  # among all positions of the table
    labels_NH: Tensor


def places_of(table: pa.Table, num_heads: int) -> Places:
    """table: with the columns `input_ids`, `position` and `label_mask`."""
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
    labels_NH = labels_for(input_ids, label_mask, torch.from_numpy(position_N), num_heads)
    place_N = (labels_NH != IGNORED).any(dim=1).nonzero()[:, 0]
    row_N = torch.from_numpy(np.repeat(np.arange(len(table)), num_positions_R))
    return Places(row_N[place_N], place_N, labels_NH[place_N])


def lengths_of(lists: Any) -> np.ndarray:
    return lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)


def batch_of(table: pa.Table, hidden_size: int, dtype: str, num_heads: int) -> Batch:
    """All positions of a table of hidden/ that have a label, in its order.

    Raises ValueError when a row's bytes are not the states of its positions.
    """
    raw = table["hidden"].combine_chunks()
    width = np.dtype(np.int16 if dtype == "bfloat16" else np.int32)  # NumPy has no bfloat16, so bits are moved
    found_R = pc.binary_length(raw).to_numpy(zero_copy_only=False)
    needed_R = lengths_of(table["position"].combine_chunks()) * hidden_size * width.itemsize
    if len(wrong := np.flatnonzero(found_R != needed_R)):
        row = int(wrong[0])
        raise ValueError(
            f"row {table['id'][row]} of hidden/ has {found_R[row]} bytes of states, but its positions need "
            f"{needed_R[row]} ({hidden_size} {dtype} each). Run the hidden stage again."
        )
    places = places_of(table, num_heads)
    if not len(places.row_N):
        return Batch(torch.zeros(0, hidden_size, dtype=getattr(torch, dtype)), places.labels_NH, [])
    offsets = np.frombuffer(raw.buffers()[1], np.int64)[raw.offset : raw.offset + len(raw) + 1]
    bits_NC = np.frombuffer(raw.buffers()[2], np.uint8)[offsets[0] : offsets[-1]].view(width)
    # Indexing by an array copies, so that Arrow's memory is given back.
    hidden_NC = torch.from_numpy(bits_NC.reshape(-1, hidden_size)[places.place_N.numpy()])
    names = table["id"].to_pylist()
    ids = [names[row] for row in places.row_N.tolist()]
    return Batch(hidden_NC.view(getattr(torch, dtype)), places.labels_NH, ids)


def joined(batches: list[Batch]) -> Batch:
    ids = [name for batch in batches for name in batch.ids]
    return Batch(torch.cat([b.hidden_NC for b in batches]), torch.cat([b.labels_NH for b in batches]), ids)


def part_of(batch: Batch, first: int, last: int) -> Batch:
    return Batch(batch.hidden_NC[first:last], batch.labels_NH[first:last], batch.ids[first:last])
