"""A plan and the tables of hidden/ -> one worker's batches, step by step.

# R rows   N positions
"""

import functools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from medusa_ray import parts, shards
from medusa_ray.config import HiddenConfig, ModelConfig
from medusa_ray.states import Body, leaves_labels
from medusa_ray.train.order import Ints, Line, Piece, Plan, cut

Wanted = tuple[str, Ints]  # a part, and some of its rows, ascending
Source = Callable[
    [list[Wanted]], Iterator[pa.Table]
]  # a table of hidden/ for each that is wanted, in the same order
T = TypeVar("T")


def from_disk(hidden: str) -> Source:
    """The parts of a finished hidden/."""

    def read(wanted: list[Wanted]) -> Iterator[pa.Table]:
        for name, row_R in wanted:
            table = parts.read(hidden, name)
            yield table if len(row_R) == len(table) else table.take(row_R)

    return read


def from_base(
    distilled: str,
    base: str,
    device: str,
    model: ModelConfig,
    hidden: HiddenConfig,
    loss_on: str,
    num_workers: int,
) -> Source:
    """The frozen base, on the fly: Ray Data deals the rows of distilled/ to its actors, a share of them to each worker.

    base, device: model.base and model.device as actors find them.
    """

    def stream(wanted: list[Wanted]) -> Iterator[pa.Table]:
        make_worker = functools.partial(Streamer, distilled, model, base, device, hidden, loss_on)
        refs = [shards.put({"part": name, "rows": row_R.tolist()}) for name, row_R in wanted]
        resources = shards.actors(max(1, hidden.num_actors // num_workers), len(refs), device)
        yield from shards.tables(refs, [len(row_R) for _, row_R in wanted], make_worker, **resources)

    return stream


class Streamer:
    """A part of distilled/, and numbers among those rows that leave labels -> their table of hidden/."""

    def __init__(
        self, distilled: str, model: ModelConfig, base: str, device: str, hidden: HiddenConfig, loss_on: str
    ) -> None:
        self.distilled, self.body = distilled, Body(model, base, device, hidden, loss_on)

    def __call__(self, shard: shards.Shard) -> pa.Table:
        table = parts.read(self.distilled, shard["part"])
        rows = [row for row in table.to_pylist() if leaves_labels(row, self.body.loss_on)]
        chosen = pa.Table.from_pylist([rows[number] for number in shard["rows"]], table.schema)
        return self.body.hidden_table(chosen)


class Feed:
    """Feeds one worker."""

    def __init__(
        self, counts: list[Ints], names: list[str], seed: int, source: Source, form: Any, rank: int
    ) -> None:
        """counts: of each part, the positions of each of its rows that are trained on. names: of the parts.

        form: a Form, or whatever else makes batches of tables.
        """
        self.counts, self.names, self.seed = counts, names, seed
        self.source, self.form, self.rank = source, form, rank

    def steps(self, plan: Plan, done: int, batch_size: int) -> Iterator[list[Any]]:
        """The micro-batches of each step of a plan but the first `done`.

        A position without a label stands where nothing is left: no worker can sit out a step of the others.
        """
        line = Line(self.counts, self.seed, plan.epoch)
        spans = cut(plan.share(self.rank), done * plan.per_step, line.length)
        coming = ahead(self._batches(list(line.pieces(spans))))
        left = self.form.nothing()[:0]
        for _ in range(done, plan.num_steps):
            while len(left) < plan.per_step and (batch := next(coming, None)) is not None:
                left = self.form.joined([left, batch]) if len(left) else batch
            now, left = left[: plan.per_step], left[plan.per_step :]
            micro = [now[first : first + batch_size] for first in range(0, plan.per_step, batch_size)]
            yield [batch if len(batch) else self.form.nothing() for batch in micro]

    def rows(self, wanted: list[Wanted]) -> Iterator[Any]:
        """All positions of rows, a batch for each part that they are of."""
        return map(self.form.batch, self.source(wanted))

    def _batches(self, pieces: list[Piece]) -> Iterator[Any]:
        """The positions of each piece."""
        wanted = [
            [(part, np.sort(piece.row_R[piece.part_R == part])) for part in np.unique(piece.part_R)]
            for piece in pieces
        ]
        found = self.rows([(self.names[part], row_R) for group in wanted for part, row_R in group])
        for piece, group in zip(pieces, wanted, strict=True):
            whole = self.form.joined([next(found) for _ in group])
            # Where each row begins in what was read: by part, and by place in it.
            read_R = np.lexsort((piece.row_R, piece.part_R))
            start_R = np.empty_like(read_R)
            start_R[read_R] = starts(piece.count_R[read_R])
            place_N = np.repeat(start_R - starts(piece.count_R), piece.count_R) + np.arange(len(whole))
            yield whole[place_N[piece.low : piece.high]]


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
