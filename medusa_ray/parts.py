"""Tables of an artifact -> Parquet parts that are whole or absent, so that the parts there are the progress.

A part's name says which input rows it holds. Whoever writes it, however often, writes the same rows under the
same name, so killing a writer neither loses nor repeats one.
"""

import os
import uuid
from contextlib import suppress

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from medusa_ray import provenance
from medusa_ray.config import UserError

MARK = "_parts.json"  # which config and inputs the parts in a folder come from
UNFINISHED = ".unfinished"


def absolute(uri: str) -> str:
    """The same place for a process that runs in another working directory."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    return str(filesystem.unstrip_protocol(path))


def part_name(index: int) -> str:
    """Names sort as their rows do."""
    return f"part-{index:06}"


def begin(folder: str, key: str) -> set[str]:
    """Makes the folder ready for parts of this key, and names those that are already there.

    Parts of another key, and the provenance that declared them finished, are removed. Raises UserError when
    the folder cannot be written.
    """
    filesystem, path = fsspec.core.url_to_fs(folder)
    try:
        if filesystem.exists(f"{path}/{MARK}") and provenance.read_json(f"{folder}/{MARK}")["key"] == key:
            return set(names(folder))
        clear(folder)
        provenance.write_json(f"{folder}/{MARK}", {"key": key})
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}. Set output to a place that can be.") from error
    return set()


def clear(folder: str) -> None:
    """Removes what stages write into an artifact folder, and nothing else."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    filesystem.invalidate_cache()
    # The declaration goes first: a folder half cleared must not look finished.
    for file in (f"{path}/{provenance.FILE}", f"{path}/{MARK}"):
        if filesystem.exists(file):
            filesystem.rm_file(file)
    for file in filesystem.find(path):
        if file.endswith((".parquet", UNFINISHED)):
            filesystem.rm_file(file)


def write(folder: str, name: str, table: pa.Table) -> None:
    """Writes one part, which appears at once or not at all."""
    filesystem, path = fsspec.core.url_to_fs(f"{folder}/{name}.parquet")
    filesystem.makedirs(os.path.dirname(path), exist_ok=True)
    # A writer that was given up for dead may still be at it, hence a name of its own.
    unfinished = f"{path}.{uuid.uuid4().hex}{UNFINISHED}"
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
    if not filesystem.isdir(path):
        return []
    files = [os.path.basename(file) for file in filesystem.ls(path, detail=False)]
    return sorted(file.removesuffix(".parquet") for file in files if file.endswith(".parquet"))


def read(folder: str, name: str, columns: list[str] | None = None) -> pa.Table:
    """One part, schema metadata included."""
    with fsspec.open(f"{folder}/{name}.parquet", "rb") as file:
        return pq.read_table(file, columns=columns)


def num_rows(folder: str, name: str) -> int:
    with fsspec.open(f"{folder}/{name}.parquet", "rb") as file:
        return pq.read_metadata(file).num_rows
