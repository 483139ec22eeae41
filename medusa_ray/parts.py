"""Tables of an artifact -> Parquet parts that are whole or absent, so that the parts there are the progress.

A part's name says which input rows it holds. Whoever writes it, however often, writes the same rows under the
same name, so killing a writer neither loses nor repeats one.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from medusa_ray import provenance
from medusa_ray.config import UserError

MARK = "_parts.json"  # which config and inputs the parts in a folder come from
FOREIGN = ("botocore", "aiohttp", "gcsfs", "azure")  # packages of storage whose errors are their own
MOST = 999_999  # whose names sort as their rows do
READERS = 16  # requests under way at a bucket, each of which takes tens of milliseconds
ATTEMPT = ".attempt"  # what a worker announced that has not written its part

T = TypeVar("T")
Made = TypeVar("Made")


class StorageError(UserError):
    """Storage that is full, gone or not allowed, which is no bug; what is finished stays."""


def storage_error(error: BaseException) -> StorageError | None:
    """What the user is told of an error that a filesystem raised; None of any other.

    Of those that fsspec reaches, some have errors that are no OSErrors.
    """
    if isinstance(error, StorageError):
        return error
    if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in FOREIGN:
        return None
    return StorageError(
        f"storage failed: {type(error).__name__}: {error}. What is finished is kept: once there is room, and the "
        "storage answers, the same command goes on."
    )


def absolute(uri: str) -> str:
    """The same place for a process that runs in another working directory."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    return str(filesystem.unstrip_protocol(path))


def part_name(index: int) -> str:
    """Names of up to MOST parts sort as their rows do."""
    return f"part-{index:06}"


def begin(folder: str, key: str, of: dict[str, Any] | None = None, is_dear: bool = False) -> set[str]:
    """Makes the folder ready for parts of this key, and names those that are already there.

    of: what the key digests, to tell later what has changed. is_dear: parts of another key are refused; else they are
    removed, with the provenance that declared them finished. Raises UserError when the folder holds what it must not,
    or cannot be written.
    """
    filesystem, path = fsspec.core.url_to_fs(folder)
    try:
        is_marked = provenance.kind_of(filesystem, f"{path}/{MARK}") is not None
        found = provenance.read_json(f"{folder}/{MARK}") if is_marked else {}
        if found.get("key") == key:
            return set(names(folder))
        if is_dear and (there := names(folder)):
            _refuse(folder, len(there), found.get("of") or {}, of or {})
        clear(folder)
        provenance.write_json(f"{folder}/{MARK}", {"key": key, "of": of})
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}. Set output to a place that can be.") from error
    return set()


def _refuse(folder: str, num_parts: int, old: dict[str, Any], new: dict[str, Any]) -> NoReturn:
    changes = provenance.differences(old, new) if old else ()
    apart = "; ".join(f"{key} was {was}, and is {now}" for key, was, now in changes)
    raise UserError(
        f"{folder} holds {num_parts} parts of another run: {apart or 'it does not say of which'}. Set these back to go "
        "on with it, or remove the folder, or set output to another place."
    )


def clear(folder: str) -> None:
    """Removes what stages write into an artifact folder, and nothing else."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    filesystem.invalidate_cache()
    # The declaration goes first: a folder half cleared must not look finished.
    for file in (f"{path}/{provenance.FILE}", f"{path}/{MARK}"):
        if provenance.kind_of(filesystem, file):
            filesystem.rm_file(file)
    for file in filesystem.find(path):
        if file.endswith((".parquet", provenance.UNFINISHED, ATTEMPT)):
            filesystem.rm_file(file)


def write(folder: str, name: str, table: pa.Table) -> None:
    """Writes one part, which appears at once or not at all."""
    filesystem, path = fsspec.core.url_to_fs(f"{folder}/{name}.parquet")
    filesystem.makedirs(os.path.dirname(path), exist_ok=True)
    unfinished = provenance.unfinished_name(path)
    try:
        with filesystem.open(unfinished, "wb") as file:
            pq.write_table(table, file)
        filesystem.mv(unfinished, path)
    except BaseException:
        with suppress(Exception):  # where nothing can be written, nothing may be removable either
            filesystem.rm_file(unfinished)  # a full disk is to stay no fuller for another try
        raise


def names(folder: str) -> list[str]:
    """Names of the parts in a folder, in the order of their rows."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    filesystem.invalidate_cache()
    if provenance.kind_of(filesystem, path) != "directory":
        return []
    files = [os.path.basename(file) for file in filesystem.ls(path, detail=False)]
    return sorted(file.removesuffix(".parquet") for file in files if file.endswith(".parquet"))


def read(folder: str, name: str, columns: list[str] | None = None) -> pa.Table:
    """One part, schema metadata included."""
    with fsspec.open(f"{folder}/{name}.parquet", "rb") as file:
        return pq.read_table(file, columns=columns)


def schema(folder: str, name: str) -> pa.Schema:
    """Of one part, metadata included, none of its rows read."""
    with fsspec.open(f"{folder}/{name}.parquet", "rb") as file:
        return pq.read_schema(file)


def num_rows(folder: str, name: str) -> int:
    with fsspec.open(f"{folder}/{name}.parquet", "rb") as file:
        return pq.read_metadata(file).num_rows


def sizes(folder: str) -> Iterator[tuple[str, int]]:
    """All parts, in the order of their rows, and how many these are."""
    there = names(folder)
    yield from zip(there, ahead(lambda name: num_rows(folder, name), there), strict=True)


def ahead(read: Callable[[T], Made], items: Iterable[T]) -> Iterator[Made]:
    """What is read of each item, in their order, by threads that read the next ones meanwhile."""
    coming: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for item in items:
            coming.append(pool.submit(read, item))
            if len(coming) > READERS:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
