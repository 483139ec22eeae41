"""A plan and the tables of hidden/ -> one worker's batches, step by step.

# R rows   N positions
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from medusa_ray import parts
from medusa_ray.train.order import Ints, Line, Piece, Plan, cut
from medusa_ray.train.rows import Batch, Form, joined

Wanted = tuple[str, Ints]  # a part, and some of its rows, ascending
Source = Callable[[list[Wanted]], Iterator[pa.Table]]  # a table of hidden/ for each that is wanted, in the same order
T = TypeVar("T")


def from_disk(hidden: str) -> Source:
    """The parts of a finished hidden/."""

    def read(wanted: list[Wanted]) -> Iterator[pa.Table]:
        for name, row_R in wanted:
            table = parts.read(hidden, name)
            yield table if len(row_R) == len(table) else table.take(row_R)

    return read


class Feed:
    """Feeds one worker."""

    def __init__(
        self, counts: list[Ints], names: list[str], seed: int, source: Source, form: Form, rank: int
    ) -> None:
        """counts: of each part, the positions of each of its rows that are trained on. names: of the parts."""
        self.counts, self.names, self.seed = counts, names, seed
        self.source, self.form, self.rank = source, form, rank

    def steps(self, plan: Plan, done: int, batch_size: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step of a plan but the first `done`.

        A position without a label stands where nothing is left: no worker can sit out a step of the others.
        """
        line = Line(self.counts, self.seed, plan.epoch)
        spans = cut(plan.share(self.rank), done * plan.per_step, line.length)
        coming = ahead(self._batches(list(line.pieces(spans))))
        left = self.form.nothing()[:0]
        for _ in range(done, plan.num_steps):
            while len(left) < plan.per_step and (batch := next(coming, None)) is not None:
                left = joined([left, batch]) if len(left) else batch
            now, left = left[: plan.per_step], left[plan.per_step :]
            micro = [now[first : first + batch_size] for first in range(0, plan.per_step, batch_size)]
            yield [batch if len(batch) else self.form.nothing() for batch in micro]

    def _batches(self, pieces: list[Piece]) -> Iterator[Batch]:
        """The positions of each piece."""
        wanted = [
            [(part, np.sort(piece.row_R[piece.part_R == part])) for part in np.unique(piece.part_R)]
            for piece in pieces
        ]
        tables = self.source([(self.names[part], row_R) for group in wanted for part, row_R in group])
        for piece, group in zip(pieces, wanted, strict=True):
            whole = joined([self.form.batch(next(tables)) for _ in group])
            # Where each row begins in what was read: by part, and by place in it.
            read_R = np.lexsort((piece.row_R, piece.part_R))
            start_R = np.empty_like(read_R)
            start_R[read_R] = starts(piece.count_R[read_R])
            place_N = np.repeat(start_R - starts(piece.count_R), piece.count_R) + np.arange(len(whole))
            yield whole[torch.from_numpy(place_N[piece.low : piece.high])]


def starts(count_R: Ints) -> Ints:
    return count_R.cumsum() - count_R


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each made by a thread while the caller is busy with the one before it."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=1)

    def make() -> None:
        try:
            for item in items:
                ready.put((item, None))
            ready.put((None, StopIteration()))
        except BaseException as error:
            ready.put((None, error))

    threading.Thread(target=make, daemon=True).start()
    while True:
        item, error = ready.get()
        if isinstance(error, StopIteration):
            return
        if error is not None:
            raise error
        yield item
