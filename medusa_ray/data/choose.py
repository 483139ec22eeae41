"""Numbers of all rows -> which chats are kept, in which split, in which part and under which id.

The driver decides here, over arrays of some dozen bytes a row; of the chats themselves it sees none.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from medusa_ray.config import DataConfig, UserError
from medusa_ray.data import filters, scan
from medusa_ray.data.chats import EXPECTED, Row
from medusa_ray.data.reading import Piece, cut, rows, whole_files
from medusa_ray.data.scan import Unit
from medusa_ray.data.sources import Source, named

MAX_TEST_SHARE = 0.1  # of train, when there is no test file
MIN_UNIT_BYTES, MAX_UNIT_BYTES = (
    2**20,
    2**26,
)  # a unit is a task of its own, and its numbers have to fit in memory
NUM_UNITS = 2000  # of large inputs, so that there is something to show progress by

# A chat that is kept: its place among the unit's rows, and n where its id ends in #n, else 0.
KEEP = np.dtype([("row", "<u4"), ("suffix", "<u4")])

MakeWorker = Callable[[], Callable[[dict[str, Any]], dict[str, Any]]]
# What workers make of shards that name so many bytes in all, in any order.
RunPass = Callable[[list[dict[str, Any]], MakeWorker, int], Iterable[dict[str, Any]]]


def here(shards: list[dict[str, Any]], make_worker: MakeWorker, num_bytes: int) -> Iterator[dict[str, Any]]:
    """A RunPass without any other process."""
    return map(make_worker(), shards)


@dataclass(frozen=True)
class Plan:
    """What the second pass has to do, by unit."""

    units: list[Unit]
    line_offsets: list[list[int]]  # by unit and piece, the lines of its file that come before it
    seals: list[str]
    keeps: dict[str, list[np.ndarray]]  # by split and unit, KEEP
    left_out: dict[str, dict[str, Counter[str]]]  # by split and source, chats by reason


@dataclass
class Table:
    """The numbers of all rows of one split's files."""

    sources: list[Source]
    units: range  # which of all units
    rows: np.ndarray  # ROW
    reason: np.ndarray  # what leaves a row out, filters.KEPT for none
    source: np.ndarray  # which of its sources a row is from
    unit_starts: np.ndarray  # first row of each unit, and the number of rows
    copy_row: np.ndarray  # the row of each copy: with no weight over 1, every row once
    suffix: np.ndarray  # of each copy's id
    is_test: np.ndarray  # rows held out


def make_plan(sources: dict[str, list[Source]], data: DataConfig, run_pass: RunPass = here) -> Plan:
    """Reads every chat once. Raises UserError at a row that is no chat or has another one's id."""
    wholes = {split: whole_files(sources[split]) for split in sources}
    total = sum(whole.size for split in wholes for whole in wholes[split])
    unit_bytes = min(max(total // NUM_UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units: list[Unit] = []
    unit_ranges: dict[str, range] = {}
    for split in sources:
        dealt = scan.deal(cut(wholes[split], unit_bytes), unit_bytes)
        unit_ranges[split] = range(len(units), len(units) + len(dealt))
        units += dealt

    scans: list[dict[str, Any]] = [{}] * len(units)
    shards = [scan.shard_of(index, unit) for index, unit in enumerate(units)]
    for result in run_pass(shards, lambda: scan.Scanner(data), total):
        # As arrays at once: the text of all of them together would weigh more.
        result["rows"] = scan.unpacked(result["rows"], scan.ROW)
        result["aliases"] = scan.unpacked(result["aliases"], scan.ALIAS)
        result["near"] = scan.unpacked(result["near"], np.uint64)
        scans[result["unit"]] = result
    line_offsets = _line_offsets(units, scans)
    _check_refusals(scans, line_offsets)
    seals = [scanned["seal"] for scanned in scans]

    tables = {}
    for split in sources:
        table = _table(sources[split], unit_ranges[split], units, scans, data)
        if not len(table.rows):
            raise UserError(f"{named(sources[split])} is empty. {EXPECTED}")
        try:
            _number_copies(table, _aliases(table, scans))
        except _IdTwice as error:
            raise UserError(_about_id(table, units, line_offsets, error.row)) from None
        tables[split] = table
        for index in table.units:
            scans[index] = {}
    if "test" not in sources:
        _hold_out(tables["train"], data.num_test)
    if data.filters.decontaminate:
        _decontaminate(tables, units, run_pass, total)
    return _planned(tables, data, units, line_offsets, seals)


def _line_offsets(units: list[Unit], scans: list[dict[str, Any]]) -> list[list[int]]:
    offsets, offset = [], 0
    for unit, scanned in zip(units, scans, strict=True):
        offsets.append([0] * len(unit))
        for place, (piece, (num_lines, _)) in enumerate(zip(unit, scanned["counts"], strict=False)):
            offset = offset if piece.start else 0
            offsets[-1][place] = offset
            offset += num_lines
    return offsets


def _check_refusals(scans: list[dict[str, Any]], line_offsets: list[list[int]]) -> None:
    """Raises UserError for the first row that is no chat; all before it have been read, so its place is known."""
    for scanned, offsets in zip(scans, line_offsets, strict=True):
        if scanned["refusal"]:
            place, before, number, after = scanned["refusal"]
            raise UserError(f"{before}{'' if number is None else number + offsets[place]}{after}")


def _table(
    sources: list[Source], mine: range, units: list[Unit], scans: list[dict[str, Any]], data: DataConfig
) -> Table:
    rows_ = np.concatenate([np.empty(0, scan.ROW), *(scans[index]["rows"] for index in mine)])
    places = {source.name: place for place, source in enumerate(sources)}
    pieces = [
        (places[piece.source], num_rows)
        for index in mine
        for piece, (_, num_rows) in zip(units[index], scans[index]["counts"], strict=True)
    ]
    source = np.repeat(
        np.array([place for place, _ in pieces], np.int16), [num_rows for _, num_rows in pieces]
    )
    reason = rows_["reason"].copy()
    weights = np.array([each.weight for each in sources])[source]
    # The low half of the digest: the high one decides who is held out.
    share = rows_["content"][:, 1] / 2.0**64
    reason[(reason == filters.KEPT) & (weights < 1) & (share >= weights)] = filters.WEIGHT
    if data.filters.dedup != "none":
        _drop_repeated(reason, [rows_["content"][:, 0]], filters.EQUAL)
    if data.filters.dedup == "near":
        near = np.concatenate([scans[index]["near"] for index in mine]).reshape(-1, filters.NUM_BANDS)
        _drop_repeated(reason, list(near.T), filters.NEARLY)
    repeats = np.where(reason == filters.KEPT, np.maximum(weights, 1), 1).astype(np.int64)
    return Table(
        sources,
        mine,
        rows_,
        reason,
        source,
        np.cumsum([0, *(len(scans[index]["rows"]) for index in mine)]),
        np.repeat(np.arange(len(rows_), dtype=np.uint32), repeats),
        np.zeros(0, np.uint32),
        np.zeros(len(rows_), bool),
    )


def _drop_repeated(reason: np.ndarray, keys: list[np.ndarray], why: int) -> None:
    """Leaves out each kept row that has any key in common with a kept one before it."""
    kept = np.flatnonzero(reason == filters.KEPT)
    is_repeated = np.zeros(len(kept), bool)
    for key in keys:
        _, first, inverse = np.unique(key[kept], return_index=True, return_inverse=True)
        is_repeated |= first[inverse] < np.arange(len(kept))
    reason[kept[is_repeated]] = why


# ------------------------------------------------------------------------------------------- ids


class _IdTwice(Exception):
    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row


def _aliases(table: Table, scans: list[dict[str, Any]]) -> np.ndarray:
    """ALIAS of the whole table. Rows of it count from its start, which takes more than 32 bits of no known table."""
    found = [scans[index]["aliases"].copy() for index in table.units]
    for aliases, start in zip(found, table.unit_starts[:-1], strict=True):
        aliases["row"] += np.uint32(start)
    return np.concatenate([np.empty(0, scan.ALIAS), *found])


def _number_copies(table: Table, aliases: np.ndarray) -> None:
    """Sets the suffix of each copy: the second of an id gets #2, and so on.

    Raises _IdTwice at the first row that has the id of another chat.
    """
    ids, content = table.rows["id"][table.copy_row], table.rows["content"][table.copy_row]
    order = np.lexsort((ids[:, 1], ids[:, 0]))  # stable: copies of an id stay in order
    is_first = np.ones(len(order), bool)
    is_first[1:] = (ids[order[1:]] != ids[order[:-1]]).any(axis=1)
    group_start = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    is_other = (content[order] != content[order[group_start]]).any(axis=1)
    if is_other.any():
        raise _IdTwice(int(table.copy_row[order[is_other].min()]))
    rank = np.arange(len(order)) - group_start
    table.suffix = np.empty(len(order), np.uint32)
    table.suffix[order] = np.where(rank > 0, rank + 1, 0)
    if len(aliases):
        repeated = ids[order[rank == 1]]
        wanted = aliases[np.isin(aliases["stem"][:, 0], repeated[:, 0])]
        if len(wanted):
            _number_beside_aliases(table, ids, content, wanted)


def _number_beside_aliases(table: Table, ids: np.ndarray, content: np.ndarray, aliases: np.ndarray) -> None:
    """The same one by one, for ids that are repeated while other rows already have such an id with a #n."""
    own_ids = table.rows["id"][aliases["row"]]
    involved = np.isin(ids[:, 0], np.concatenate([aliases["stem"][:, 0], own_ids[:, 0]]))
    taken_by: dict[
        tuple[int, ...], tuple[int, ...]
    ] = {}  # content by id: an id's hash, or a hash with a number
    named_so = {
        (*stem, number): tuple(own)
        for stem, number, own in zip(
            aliases["stem"].tolist(), aliases["number"].tolist(), own_ids.tolist(), strict=True
        )
    }
    repeats: Counter[tuple[int, ...]] = Counter()
    for copy in np.flatnonzero(involved).tolist():
        own, said = tuple(ids[copy].tolist()), tuple(content[copy].tolist())
        if taken_by.get(own, said) != said:
            raise _IdTwice(int(table.copy_row[copy]))
        key, suffix = own, 0
        while key in taken_by:
            repeats[own] += 1
            suffix = repeats[own] + 1
            key = named_so.get((*own, suffix), (*own, suffix))
        taken_by[key] = said
        table.suffix[copy] = suffix


def _about_id(table: Table, units: list[Unit], line_offsets: list[list[int]], row: int) -> str:
    unit = int(np.searchsorted(table.unit_starts, row, "right")) - 1
    index = table.units[unit]
    piece, number, found = _row_at(units[index], line_offsets[index], row - int(table.unit_starts[unit]))
    return (
        f"{piece.file} row {number} has the id {found.id!r}, and so has another chat. "
        "Make ids unique, or leave them out."
    )


def _row_at(unit: Unit, line_offsets: list[int], place: int) -> tuple[Piece, int, Row]:
    """A row of a unit by its place, read again, with its number in its file."""
    for piece, offset in zip(unit, line_offsets, strict=True):
        for row in rows(piece):
            if row is not None and place == 0:
                return piece, offset + row.number, row
            place -= row is not None
    raise UserError(
        f"{unit[0].file} changed while it was read. Run the stage again when nothing writes there."
    )


# ------------------------------------------------------------------------------------------- splits


def _hold_out(table: Table, num_test: int | None) -> None:
    """Marks the rows of test: those of the lowest digests. Equal chats have equal ones, so they stay on one side.

    Raises UserError when there are too few.
    """
    kept = table.copy_row[table.reason[table.copy_row] == filters.KEPT]
    content = table.rows["content"][kept]
    if not len(kept):
        return  # whoever counts says why none is left
    order = np.lexsort((content[:, 1], content[:, 0]))
    most = max(1, int(len(order) * MAX_TEST_SHARE))
    last, highest = content[order[min(num_test or most, most) - 1]], content[order[-1]]
    if (last == highest).all():
        raise UserError(
            f"{named(table.sources)} has {len(np.unique(content, axis=0))} different chats, too few to hold some out "
            "as test. Add chats, or set data.test."
        )
    high, low = table.rows["content"].T
    is_low = (high < last[0]) | ((high == last[0]) & (low <= last[1]))
    table.is_test = is_low & (table.reason == filters.KEPT)


def _decontaminate(tables: dict[str, Table], units: list[Unit], run_pass: RunPass, num_bytes: int) -> None:
    """Leaves out training rows whose user says what users of the other splits say; two more passes."""
    train = tables["train"]
    in_train = (train.reason == filters.KEPT) & ~train.is_test
    shards = []
    for split, table in tables.items():
        wanted = (table.reason == filters.KEPT) & (table.is_test if split == "train" else True)
        shards += _shards_of_rows(table, wanted, units)
    results = run_pass(shards, lambda: scan.Grams(None), num_bytes)
    found = [scan.unpacked(result["grams"], np.uint64) for result in results]
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *found]))
    shards = _shards_of_rows(train, in_train, units)
    for result in run_pass(shards, lambda: scan.Grams(known), num_bytes):
        start = train.unit_starts[result["unit"] - train.units.start]
        train.reason[start + scan.unpacked(result["rows"], np.uint32)] = filters.CONTAMINATED


def _shards_of_rows(table: Table, wanted: np.ndarray, units: list[Unit]) -> list[dict[str, Any]]:
    shards = []
    for place, index in enumerate(table.units):
        start, stop = table.unit_starts[place : place + 2]
        places = np.flatnonzero(wanted[start:stop]).astype(np.uint32)
        if len(places):
            shards.append(scan.shard_of(index, units[index], rows=places))
    return shards


def _planned(
    tables: dict[str, Table],
    data: DataConfig,
    units: list[Unit],
    line_offsets: list[list[int]],
    seals: list[str],
) -> Plan:
    keeps: dict[str, list[np.ndarray]] = {}
    left_out: dict[str, dict[str, Counter[str]]] = {}
    for file_split, table in tables.items():
        splits = ["train", "test"] if file_split == "train" and "test" not in tables else [file_split]
        for split in splits:
            is_mine = table.is_test if split == "test" and file_split == "train" else ~table.is_test
            is_kept = (is_mine & (table.reason == filters.KEPT))[table.copy_row]
            limit = data.num_train if split == "train" else data.num_test
            kept = np.flatnonzero(is_kept)
            kept, over = kept[:limit], kept[limit:] if limit else kept[:0]
            keep = np.empty(len(kept), KEEP)
            unit_of = np.searchsorted(table.unit_starts, table.copy_row[kept], "right") - 1
            keep["row"] = table.copy_row[kept] - table.unit_starts[unit_of]
            keep["suffix"] = table.suffix[kept]
            bounds = np.searchsorted(unit_of, np.arange(len(table.units) + 1))
            keeps[split] = [np.empty(0, KEEP)] * len(units)
            for place, index in enumerate(table.units):
                keeps[split][index] = keep[bounds[place] : bounds[place + 1]]
            counts = left_out.setdefault(split, {source.name: Counter() for source in table.sources})
            is_out = is_mine & (table.reason != filters.KEPT)
            for rows_, reason in (
                *(
                    (np.flatnonzero(is_out & (table.reason == why)), why)
                    for why in np.unique(table.reason[is_out])
                ),
                (table.copy_row[over], filters.LIMIT),
            ):
                for place, number in enumerate(
                    np.bincount(table.source[rows_], minlength=len(table.sources)).tolist()
                ):
                    if number:
                        counts[table.sources[place].name][filters.REASONS[reason]] += number
    return Plan(units, line_offsets, seals, keeps, left_out)
