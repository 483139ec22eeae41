"""What a run is watched by: held-out rows, speed and memory, a trace of the profiler.

# N positions   H heads   T positions of a row
"""

import resource
import tempfile
import threading
import time
from contextlib import suppress
from typing import Any

import fsspec
import numpy as np
import torch
from torch import Tensor

from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.loss import (
    IGNORED,
    MAX_LOGITS,
    HeadLoss,
    cross_entropy_for,
    medusa_loss,
    num_losses,
    places_in,
)
from medusa_ray.medusa.ranks import NUM_RANKS, ranks_in
from medusa_ray.train.rows import Batch


def judge(heads: MedusaHeads, batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of held-out rows: loss_sum_H, num_labels_H, top1_H and top5_H, stacked; num_losses; the ranks [T, H] of each row.

    batch: whole rows, one behind the other.
    """
    dtype = heads.output_weight(0).dtype
    size = max(1, MAX_LOGITS // heads.draft_vocab_size)
    cross_entropy, one_H = (
        cross_entropy_for(heads, size),
        torch.ones(heads.num_heads, device=batch.labels_NH.device),
    )
    place_NH = places_in(heads.token_map_M, batch.labels_NH)
    sums, ranks = [], []
    for first in range(0, len(batch), size):
        chunk, places = batch[first : first + size], place_NH[first : first + size]
        hidden_NC = chunk.hidden_NC.to(dtype)
        found: HeadLoss = medusa_loss(heads, hidden_NC, chunk.labels_NH, one_H, cross_entropy, chunk.teacher)
        sums.append(sums_of(found))
        columns = []
        for head in range(heads.num_heads):
            logits_NM = heads.logits_of(head, heads.residual_of(head, hidden_NC))
            guess_NK = logits_NM.topk(min(NUM_RANKS, heads.draft_vocab_size)).indices
            columns.append(ranks_in(guess_NK, places[:, head], chunk.labels_NH[:, head] != IGNORED))
        ranks.append(torch.stack(columns, dim=1).cpu())
    ends = np.flatnonzero(batch.id_N[1:] != batch.id_N[:-1]) + 1
    rows = torch.cat(ranks).tensor_split(torch.from_numpy(ends))
    return torch.stack(sums).sum(dim=0), num_losses(heads, batch.labels_NH), list(rows)


def sums_of(found: HeadLoss) -> Tensor:
    """loss_sum_H, num_labels_H, top1_H and top5_H, stacked."""
    assert found.top1_H is not None
    assert found.top5_H is not None
    figures = found.loss_sum_H, found.num_labels_H, found.top1_H, found.top5_H
    return torch.stack([figure.float() for figure in figures])


class Meter:
    """Positions per second of all ranks, memory of this one, and the share of what its arithmetic could do."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, flops_per_position: float, num_ranks: int
    ) -> None:
        self.device, self.num_ranks = device, num_ranks
        self.flops_per_position, self.peak_flops = flops_per_position, matmul_flops(device, dtype)
        self.num_positions, self.since_s = 0, time.perf_counter()

    def count(self, num_positions: int) -> None:
        """Positions of this rank, those filled up left out."""
        self.num_positions += num_positions

    def read(self) -> dict[str, float]:
        """Since it was last read."""
        now_s = time.perf_counter()
        per_s = self.num_positions / (now_s - self.since_s)
        self.num_positions, self.since_s = 0, now_s
        if self.device.type == "cuda":
            num_bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            num_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "positions_per_s": per_s * self.num_ranks,
            "memory_gib": num_bytes / 2**30,
            "share_of_peak": per_s * self.flops_per_position / self.peak_flops,
        }


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product here: what nothing made of them can exceed."""
    size = 8192 if device.type == "cuda" else 768
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best_s = float("inf")
    for _ in range(4):
        started_s = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for it
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2 * size**3 / best_s


class Trace:
    """torch's profiler over some steps -> trace.json in heads/, for chrome://tracing or Perfetto."""

    def __init__(self, steps: tuple[int, int] | None, heads: str) -> None:
        """steps: the first and the last that are traced."""
        self.first, self.last = steps or (0, 0)
        self.filesystem, self.path = fsspec.core.url_to_fs(f"{heads}/trace.json")
        self.profile: Any = None

    def before(self, step: int) -> None:
        if step == self.first:
            self.profile = torch.profiler.profile(record_shapes=True)
            self.profile.start()

    def after(self, step: int) -> None:
        if step == self.last and self.profile is not None:
            self.profile.stop()
            with tempfile.TemporaryDirectory() as folder:  # the profiler writes to local paths only
                self.profile.export_chrome_trace(f"{folder}/trace.json")
                self.filesystem.put_file(f"{folder}/trace.json", self.path)
            self.profile = None


class StopFile:
    """Whether somebody has asked the run to save and leave; a thread looks, for it may take an object store's time."""

    def __init__(self, file: str) -> None:
        self.is_set = False
        self.filesystem, self.path = fsspec.core.url_to_fs(file)
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self.is_set:
            with suppress(OSError):
                self.filesystem.invalidate_cache()
                self.is_set = self.filesystem.exists(self.path)
            time.sleep(0.5)
