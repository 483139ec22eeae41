"""Files of chats -> pieces that are read by themselves, and the rows of a piece.

Lines are cut at bytes, a line belonging to the piece in which it begins, and Parquet at row groups; what cannot be
cut (a JSON list, CSV, anything compressed) is one piece, and of these only a JSON list has to fit into memory.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from medusa_ray.config import UserError
from medusa_ray.data.chats import EXPECTED, SHAPES, Fault, Refusal, Row, row_of
from medusa_ray.data.sources import Source, format_of, is_compressed

BUFFER_BYTES = 2**20
MAX_CELL_BYTES = 2**26  # of a CSV
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Piece:
    """A part of one file."""

    source: str
    file: str
    format: str
    size: int  # bytes, as far as they are known
    start: int = 0  # byte, or row group
    stop: int | None = None
    columns: tuple[tuple[str, str], ...] = ()  # our name of a column and the file's


def whole_files(sources: list[Source]) -> list[Piece]:
    """A piece for each file of the sources, in order."""
    files = [(source, file) for source in sources for file in source.files]
    with ThreadPoolExecutor(16) as pool:  # a remote file takes a request or two
        return list(pool.map(lambda pair: _whole(*pair), files))


def cut(wholes: list[Piece], piece_bytes: int) -> list[Piece]:
    """All pieces of the files, of about so many bytes each, in the order of their rows."""
    with ThreadPoolExecutor(16) as pool:
        return [
            piece for pieces in pool.map(lambda whole: _cut(whole, piece_bytes), wholes) for piece in pieces
        ]


def size_of(file: str) -> int:
    """Bytes of a file; 0 where a server does not tell."""
    filesystem, path = fsspec.core.url_to_fs(file)
    try:
        return int(filesystem.info(path).get("size") or 0)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}. {EXPECTED}") from error


def _whole(source: Source, file: str) -> Piece:
    columns = tuple((ours, theirs) for ours, theirs in source.columns if theirs)
    return Piece(source.name, file, _format(source, file), size_of(file), columns=columns)


def _cut(whole: Piece, piece_bytes: int) -> list[Piece]:
    if whole.size <= piece_bytes or is_compressed(whole.file) or whole.format in ("json", "csv"):
        return [whole]
    filesystem, path = fsspec.core.url_to_fs(whole.file)
    if not filesystem.info(path).get("partial", True):  # an HTTP server that sends whole files only
        return [whole]
    if whole.format == "parquet":
        return _row_groups(whole, piece_bytes)
    starts = [*range(0, whole.size, piece_bytes), None]
    return [
        replace(whole, size=piece_bytes, start=start or 0, stop=stop)
        for start, stop in itertools.pairwise(starts)
    ]


def _format(source: Source, file: str) -> str:
    """What the source or the file's name says; a .json may hold lines, and nameless files Parquet or lines."""
    known = source.format if source.format != "auto" else format_of(file)
    if known not in (None, "json"):
        return str(known)
    try:
        with fsspec.open(file, "rb", compression="infer") as stream:
            start = stream.read(256)
    except (OSError, EOFError) as error:
        raise UserError(f"{file} cannot be read: {error}. {EXPECTED}") from error
    if known is None and start.startswith(b"PAR1"):
        return "parquet"
    is_list = start.lstrip(BYTE_ORDER_MARK + b" \t\r\n").startswith(b"[")
    return "json" if known == "json" and is_list else "jsonl"


def _row_groups(whole: Piece, piece_bytes: int) -> list[Piece]:
    with fsspec.open(whole.file, "rb") as stream:
        try:
            metadata = pq.read_metadata(stream)
        except (OSError, pa.ArrowException):  # whoever reads it says what is wrong
            return [whole]
    pieces: list[Piece] = []
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    for i, size in enumerate(sizes):
        if pieces and pieces[-1].size + size <= piece_bytes:
            pieces[-1] = replace(pieces[-1], size=pieces[-1].size + size, stop=i + 1)
        else:
            pieces.append(replace(whole, size=size, start=i, stop=i + 1))
    return pieces


# ------------------------------------------------------------------------------------------- rows of a piece


def rows(piece: Piece) -> Iterator[Row | None]:
    """The rows of a piece, numbered from its own start; None for a blank line, which has a number too.

    Raises Refusal for what is unreadable, and for a row that is no chat.
    """
    for number, value in enumerate(values(piece), 1):
        yield None if value is BLANK else row_of(number, value, piece.file)


def values(piece: Piece) -> Iterator[Any]:
    """Each row's value, BLANK for a blank line. Raises Refusal."""
    read = {"parquet": _table, "json": _list, "csv": _cells, "jsonl": _json_lines, "text": _text_lines}[
        piece.format
    ]
    try:
        with fsspec.open(piece.file, "rb", compression="infer") as stream:
            for value in read(stream, piece):
                yield _renamed(value, piece) if piece.columns else value
    except (OSError, EOFError, pa.ArrowException) as error:
        raise Refusal(f"{piece.file} cannot be read: {error}. {EXPECTED}") from error


class _Blank:
    pass


BLANK = _Blank()


def _renamed(value: Any, piece: Piece) -> Any:
    if not isinstance(value, dict):
        return value
    return {**value, **{ours: value[theirs] for ours, theirs in piece.columns if theirs in value}}


def _lines(stream: Any, piece: Piece) -> Iterator[bytes]:
    position = piece.start
    if piece.start:
        stream.seek(piece.start - 1)
    lines = io.BufferedReader(stream, BUFFER_BYTES)
    if piece.start:  # the line that began before belongs to the piece before
        position += len(lines.readline()) - 1
    while piece.stop is None or position < piece.stop:
        if not (line := lines.readline()):
            return
        position += len(line)
        yield line.removeprefix(BYTE_ORDER_MARK).strip()


def _json_lines(stream: Any, piece: Piece) -> Iterator[Any]:
    for number, line in enumerate(_lines(stream, piece), 1):
        if not line:
            yield BLANK
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError:
            # Where only a string in it is at fault, the row keeps its id.
            try:
                yield json.loads(line.decode(errors="surrogateescape"))
            except (ValueError, RecursionError):
                yield line
            continue
        yield _parsed(text, f"{piece.file} line ", number)


def _text_lines(stream: Any, piece: Piece) -> Iterator[Any]:
    for line in _lines(stream, piece):
        try:
            yield {"text": line.decode()} if line else BLANK
        except UnicodeDecodeError:
            yield line


def _list(stream: Any, piece: Piece) -> Iterator[Any]:
    text = stream.read().removeprefix(BYTE_ORDER_MARK)
    yield from _parsed(text.decode(json.detect_encoding(text), "surrogateescape"), piece.file)


def _parsed(text: str, before: str, number: int | None = None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        after = f" is not JSON: {error}. Expected a JSON list of chats, or one chat a line."
        raise Refusal(before if number else before + after, number, after) from error


def _cells(stream: Any, piece: Piece) -> Iterator[Any]:
    """Rows of a CSV under the names of its first line; lists of messages are JSON in their cells."""
    csv.field_size_limit(MAX_CELL_BYTES)
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    reader = csv.reader(text, delimiter="\t" if re.search(r"\.tsv\b", piece.file) else ",")
    try:
        names = next(reader, [])
        _check_columns(names, piece)
        lists = {dict(piece.columns).get(name, name) for name in ("messages", "conversations")}
        for cells in reader:
            if not cells:
                yield BLANK
            elif len(cells) != len(names):
                yield Fault(f"wrong shape: {len(cells)} cells under {len(names)} names", json.dumps(cells))
            else:
                yield {
                    name: _cell(cell) if name in lists else cell
                    for name, cell in zip(names, cells, strict=True)
                }
    except csv.Error as error:
        raise Refusal(f"{piece.file} line ", reader.line_num, f" is not CSV: {error}. {EXPECTED}") from error


def _cell(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return text


def _table(stream: Any, piece: Piece) -> Iterator[Any]:
    table = pq.ParquetFile(stream)
    present = table.schema_arrow.names
    _check_columns(present, piece)
    theirs = dict(piece.columns)
    wanted = {theirs.get(name, name) for name in ("id", "completion", *SHAPES)}
    groups = range(piece.start, table.num_row_groups if piece.stop is None else piece.stop)
    columns = [name for name in present if name in wanted]
    for batch in table.iter_batches(row_groups=list(groups), columns=columns):
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:
            yield from map(_decoded, pa.Table.from_batches([batch]).cast(_as_bytes(batch.schema)).to_pylist())


def _as_bytes(schema: pa.Schema) -> pa.Schema:
    """The same with each string as bytes."""

    def of(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()
        if pa.types.is_list(kind):
            return pa.list_(pa.field(kind.value_field.name, of(kind.value_type)))
        if pa.types.is_large_list(kind):
            return pa.large_list(pa.field(kind.value_field.name, of(kind.value_type)))
        if pa.types.is_struct(kind):
            return pa.struct([pa.field(field.name, of(field.type)) for field in kind])
        return kind

    return pa.schema([pa.field(field.name, of(field.type)) for field in schema])


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    return {name: _decoded(each) for name, each in value.items()} if isinstance(value, dict) else value


def _check_columns(present: list[str], piece: Piece) -> None:
    theirs = dict(piece.columns)
    if not any(theirs.get(name, name) in present for name in SHAPES):
        raise Refusal(f"{piece.file} has no messages, but the columns {present}. {EXPECTED}")
