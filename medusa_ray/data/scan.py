"""The first pass: a unit of pieces -> a few numbers for each of its rows, and no row itself.

A unit is what one worker reads at a time: a large piece, or several small ones one after the other.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from medusa_ray.config import DataConfig, UserError
from medusa_ray.data import filters
from medusa_ray.data.chats import Refusal, Row, prompt_text_of, text_of
from medusa_ray.data.reading import Piece, rows

# What the driver keeps of a row: 33 bytes. The high half of the content's digest orders and names chats.
ROW = np.dtype([("content", "<u8", 2), ("id", "<u8", 2), ("reason", "u1")])
# And of a row whose own id looks like one of those that repeated chats get.
ALIAS = np.dtype([("row", "<u4"), ("stem", "<u8", 2), ("number", "<u8")])

Unit = list[Piece]


def deal(pieces: list[Piece], unit_bytes: int) -> list[Unit]:
    """Pieces one after the other, as many as make a unit: the same ones every time."""
    units: list[Unit] = []
    left = 0
    for piece in pieces:
        if not units or left < piece.size:
            units.append([])
            left = max(unit_bytes, piece.size)
        units[-1].append(piece)
        left -= piece.size
    return units


def shard_of(index: int, unit: Unit, **arrays: np.ndarray) -> dict[str, Any]:
    """What a worker is sent: the pieces of a unit, and numbers of its rows by name."""
    return {
        "unit": index,
        "pieces": json.dumps([asdict(piece) for piece in unit]),
        **{name: array.tobytes() for name, array in arrays.items()},
    }


def pieces_of(shard: dict[str, Any]) -> Unit:
    values = json.loads(shard["pieces"])
    return [Piece(**{**value, "columns": tuple(map(tuple, value["columns"]))}) for value in values]


def packed(array: np.ndarray) -> str:
    """An array for a result, which is JSON."""
    return base64.b64encode(array.tobytes()).decode()


def unpacked(text: str, dtype: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def changed(shard: dict[str, Any]) -> str:
    """The message about a unit whose rows are not those of the first pass."""
    files = sorted({piece.file for piece in pieces_of(shard)})
    return f"{', '.join(files)} changed while it was read. Run the stage again when nothing writes there."


class Seal:
    """Digest of a unit's rows, by which the second pass knows that it reads what the first one read."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, row: Row) -> None:
        self._hash.update(row.content + row.id.encode() + b"\0")

    @property
    def value(self) -> str:
        return self._hash.hexdigest()


class Scanner:
    """A unit -> numbers of its rows, and the refusal of its first row that is no chat, where there is one."""

    def __init__(self, data: DataConfig) -> None:
        self.filters = filters.Filters(data.filters)
        self.is_filtered = data.filters != type(data.filters)()
        self.is_near = data.filters.dedup == "near"

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        found: list[bytes] = []
        aliases: list[tuple[int, Any, int]] = []
        near: list[np.ndarray] = []
        counts, seal, refusal = [], Seal(), None
        for place, piece in enumerate(pieces_of(shard)):
            before, num_lines = len(found), 0
            try:
                for row in rows(piece):
                    num_lines += 1
                    if row is None:
                        continue
                    seal.add(row)
                    id_hash = _hash(row.id)
                    if row.given_id and (match := re.fullmatch(r"(.+)#([1-9]\d{0,17})", row.given_id, re.S)):
                        aliases.append((len(found), np.frombuffer(_hash(match[1]), "<u8"), int(match[2])))
                    reason = filters.KEPT
                    if self.is_filtered and row.error is None:
                        text = text_of(json.loads(row.text))
                        reason = self.filters.reason(text)
                        if self.is_near:
                            near.append(filters.bands(text))
                    elif self.is_near:
                        near.append(_alone(row))
                    # Big-endian digests compare as their hexadecimal text does.
                    found.append(row.content[7::-1] + row.content[15:7:-1] + id_hash + bytes([reason]))
            except Refusal as error:
                refusal = (place, error.before, error.number, error.after)
            counts.append((num_lines, len(found) - before))
            if refusal:
                break
        return {
            "unit": shard["unit"],
            "counts": counts,
            "refusal": refusal,
            "seal": seal.value,
            "rows": base64.b64encode(b"".join(found)).decode(),
            "aliases": packed(np.array(aliases, ALIAS)),
            "near": packed(np.array(near, np.uint64)),
        }


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def _alone(row: Row) -> np.ndarray:
    """Bands of a faulty row, which only an equal one shares."""
    return np.repeat(np.frombuffer(row.content[:8], "<u8"), filters.NUM_BANDS)


class Grams:
    """Some rows of a unit -> the word runs of their users, or which rows have one that is known."""

    def __init__(self, known: np.ndarray | None) -> None:
        self.known = known

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        wanted = np.frombuffer(shard["rows"], "<u4")
        found: list[np.ndarray] = []
        try:
            for row in _wanted(pieces_of(shard), wanted):
                said = filters.grams(prompt_text_of(json.loads(row.text))) if row.error is None else []
                found.append(np.array(said, np.uint64))
        except Refusal as error:
            raise UserError(changed(shard)) from error
        if len(found) != len(wanted):
            raise UserError(changed(shard))
        if self.known is None:
            everything = np.unique(np.concatenate([np.empty(0, np.uint64), *found]))
            return {"unit": shard["unit"], "grams": packed(everything)}
        is_known = [bool(np.isin(said, self.known).any()) for said in found]
        return {"unit": shard["unit"], "rows": packed(wanted[np.array(is_known, bool)])}


def _wanted(unit: Unit, wanted: np.ndarray) -> Iterator[Row]:
    """Rows of a unit by their places among those that are not blank."""
    places = iter(wanted.tolist())
    next_place, place = next(places, None), 0
    for piece in unit:
        for row in rows(piece):
            if next_place is None:
                return
            if row is None:
                continue
            if place == next_place:
                yield row
                next_place = next(places, None)
            place += 1
