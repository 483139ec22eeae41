"""Plans and the tables of hidden/ -> one worker's batches, step by step.

# R rows   N positions
"""

import functools
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from medusa_ray import parts, shards
from medusa_ray.config import HiddenConfig, ModelConfig
from medusa_ray.states import Body, leaves_labels
from medusa_ray.train.order import Ints, Line, Piece, Plan, Spans

Wanted = tuple[str, Ints]  # a part, and some of its rows, ascending
# A table of hidden/ for each that is wanted, in the same order.
Source = Callable[[Iterable[Wanted]], Iterator[pa.Table]]
T = TypeVar("T")


def from_disk(hidden: str) -> Source:
    """The parts of a finished hidden/."""

    def read(wanted: Iterable[Wanted]) -> Iterator[pa.Table]:
        for name, row_R in wanted:
            table = parts.read(hidden, name)
            yield table if len(row_R) == len(table) else table.take(row_R)

    return read


@dataclass(frozen=True)
class Streamed:
    """What the base is asked for, and what room its actors have."""

    model: ModelConfig
    hidden: HiddenConfig
    loss_on: str
    room: shards.Room


def from_base(distilled: str, base: str, device: str, streamed: Streamed) -> Source:
    """The frozen base, on the fly: Ray Data deals the rows of distilled/ to its actors, a share of them to each worker.

    Each call of the source loads the base anew. base, device: model.base and model.device as actors find them.
    """

    def stream(wanted: Iterable[Wanted]) -> Iterator[pa.Table]:
        asked = streamed.model, base, device, streamed.hidden, streamed.loss_on
        make_worker = functools.partial(Streamer, distilled, *asked)
        shares = list(wanted)
        blocks = [shards.block({"part": name, "rows": row_R.tolist()}) for name, row_R in shares]
        resources = shards.actors(
            streamed.room.num_actors,
            len(blocks),
            device,
            streamed.room.actor,
            accelerator_type=streamed.hidden.accelerator_type,
            section="hidden",
        )
        yield from shards.tables(blocks, [len(row_R) for _, row_R in shares], make_worker, **resources)

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

    def open(
        self, held_out: list[Wanted], plans: list[Plan], done: int, batch_size: int
    ) -> tuple[list[Any], Iterator[list[Any]]]:
        """All positions of held-out rows, a batch for each part; and the micro-batches of each step of the plans, but
        for the first `done` of the first.

        One reading of the source serves them all, since each loads the base anew. A position without a label stands
        where nothing of a plan is left: no worker can sit out a step of the others.
        """
        shares = [plan.left(self.rank, 0 if number else done) for number, plan in enumerate(plans)]
        # Windows are drawn up as they are read. Who streams wants to know all at once, and then holds row numbers.
        pieces, again = itertools.tee(
            (piece, self._wanted(piece))
            for plan, spans in zip(plans, shares, strict=True)
            for piece in Line(self.counts, self.seed, plan.epoch).pieces(spans)
        )
        wanted = (one for _, group in again for one in group)
        found = map(self.form.batch, self.source(itertools.chain(held_out, wanted)))
        judged = [next(found) for _ in held_out]
        coming = ahead(self._batches(pieces, found))
        return judged, self._steps(plans, shares, done, batch_size, coming)

    def _steps(
        self, plans: list[Plan], shares: list[Spans], done: int, batch_size: int, coming: Iterator[Any]
    ) -> Iterator[list[Any]]:
        for plan, spans in zip(plans, shares, strict=True):
            num_coming = sum(end - start for start, end in spans)
            left = self.form.nothing()[:0]
            for _ in range(done, plan.num_steps):
                while len(left) < plan.per_step and num_coming:
                    batch = next(coming)
                    num_coming -= len(batch)
                    left = self.form.joined([left, batch]) if len(left) else batch
                now, left = left[: plan.per_step], left[plan.per_step :]
                micro = [now[first : first + batch_size] for first in range(0, plan.per_step, batch_size)]
                yield [batch if len(batch) else self.form.nothing() for batch in micro]
            done = 0

    def _wanted(self, piece: Piece) -> list[Wanted]:
        return [
            (self.names[part], np.sort(piece.row_R[piece.part_R == part])) for part in np.unique(piece.part_R)
        ]

    def _batches(self, pieces: Iterable[tuple[Piece, list[Wanted]]], found: Iterator[Any]) -> Iterator[Any]:
        """The positions of each piece. found: all positions of all rows that they want."""
        for piece, group in pieces:
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
    """The same items, each made by a thread while the caller is busy with the one before it.

    The thread ends with the iterator: one that is still at work when Python ends would take the process down.
    """
    ready: queue.Queue[Any] = queue.Queue(maxsize=1)
    is_left = threading.Event()

    def make() -> None:
        try:
            for item in items:
                ready.put((item, None))
                if is_left.is_set():
                    return
            ready.put((None, StopIteration()))
        except BaseException as error:
            ready.put((None, error))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        is_left.set()
        while thread.is_alive():  # it may wait for room
            with suppress(queue.Empty):
                ready.get(timeout=0.01)
