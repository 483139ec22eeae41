"""Which positions each worker takes at which step: a function of (seed, epoch) and of the number of workers.

An epoch is one line of positions: parts shuffled, rows shuffled within windows of parts, the positions of a row side by
side. The line is cut into stretches of equal length, one for each worker, who takes so many positions of its own at
each step. Whoever reads a stretch reads few parts, and each of them once; and since a plan says what is left of an
epoch, other workers can go on with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WINDOW_POSITIONS = (
    2**16
)  # rows are shuffled among at least so many positions: 512 MiB of bf16 states of 4,096

Spans = tuple[tuple[int, int], ...]  # stretches of a line, start and end
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """How workers share what is left of an epoch."""

    epoch: int
    spans: Spans
    num_workers: int
    per_step: int  # positions that a worker takes in a step

    @property
    def num_steps(self) -> int:
        """Until every position was taken; the last step of the last workers may find less, or none."""
        return -(-self._stretch // self.per_step)

    def share(self, rank: int) -> Spans:
        return cut(self.spans, rank * self._stretch, (rank + 1) * self._stretch)

    def left(self, rank: int, num_steps: int) -> Spans:
        """What a worker has not taken after so many steps."""
        return cut(self.share(rank), num_steps * self.per_step, self._stretch)

    def rest(self, num_steps: int) -> Spans:
        """What no worker has taken after so many steps."""
        return tuple(span for rank in range(self.num_workers) for span in self.left(rank, num_steps))

    @property
    def _stretch(self) -> int:
        return -(-sum(end - start for start, end in self.spans) // self.num_workers)


def cut(spans: Spans, first: int, last: int) -> Spans:
    """The positions first ... last - 1 of those that the spans hold, laid end to end."""
    found, before = [], 0
    for start, end in spans:
        low, high = max(start, start + first - before), min(end, start + last - before)
        if low < high:
            found.append((low, high))
        before += end - start
    return tuple(found)


class Piece(NamedTuple):
    """Positions low ... high - 1 of a window, whose rows stand in this order."""

    part_R: Ints  # of each row: its part
    row_R: Ints  # its place there
    count_R: Ints  # and how many positions it has
    low: int
    high: int


class Line:
    """The order of an epoch."""

    def __init__(self, counts: list[Ints], seed: int, epoch: int) -> None:
        """counts: of each part, the positions of each of its rows that are trained on; often 0."""
        self.counts, self.seed, self.epoch = counts, seed, epoch
        self.windows: list[list[int]] = [[]]
        self.starts = [0]  # of the windows, in the line
        size = 0
        for part in np.random.default_rng([seed, epoch]).permutation(len(counts)).tolist():
            if size >= WINDOW_POSITIONS:
                self.starts.append(self.starts[-1] + size)
                self.windows.append([])
                size = 0
            self.windows[-1].append(part)
            size += int(counts[part].sum())
        self.length = self.starts[-1] + size

    def pieces(self, spans: Spans) -> Iterator[Piece]:
        """What spans of the line are made of, one window at a time."""
        ends = [*self.starts[1:], self.length]
        for start, end in spans:
            for number, (first, last) in enumerate(zip(self.starts, ends, strict=True)):
                if max(start, first) < min(end, last):
                    yield self._piece(number, max(start, first) - first, min(end, last) - first)

    def _piece(self, number: int, low: int, high: int) -> Piece:
        parts = self.windows[number]
        sizes = [len(self.counts[part]) for part in parts]
        part_R = np.repeat(np.array(parts), sizes)
        row_R = np.concatenate([np.arange(size) for size in sizes])
        order_R = np.random.default_rng([self.seed, self.epoch, number]).permutation(len(row_R))
        part_R, row_R = part_R[order_R], row_R[order_R]
        # Only rows that have a position of the piece: nobody needs the others' states.
        count_R = np.concatenate([self.counts[part] for part in parts])[order_R]
        end_R = count_R.cumsum()
        needed_R = (end_R > low) & (end_R - count_R < high) & (count_R > 0)
        skipped = int((end_R - count_R)[needed_R][0])
        return Piece(part_R[needed_R], row_R[needed_R], count_R[needed_R], low - skipped, high - skipped)
