"""What a config says of sources -> the files of each split, in order. Reads no chat."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec

from medusa_ray import parts, provenance
from medusa_ray.config import ColumnsConfig, DataConfig, SourceConfig, UserError

COMPRESSED = r"(\.(gz|bz2|xz|zst))?"
FORMATS = {
    "json": "json", "jsonl": "jsonl", "ndjson": "jsonl", "parquet": "parquet", "csv": "csv", "tsv": "csv",
    "txt": "text",
}  # fmt: skip
HUB_PARQUET = "refs%2Fconvert%2Fparquet"  # where the hub keeps any data set as Parquet
# What tells that a remote file is another one; fsspec's file systems do not agree on a name.
VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "mtime")


@dataclass(frozen=True)
class Source:
    """Files whose chats are read, counted and weighted alike."""

    name: str
    files: tuple[str, ...]
    format: str
    columns: ColumnsConfig
    weight: float


def find_sources(data: DataConfig) -> dict[str, list[Source]]:
    """Sources of each split; no entry for test when it has to be split off train.

    Raises UserError when a file is missing or a folder does not tell which it is.
    """
    found = {"train": _sources(data.train, "train", "train")}
    if data.test:
        found["test"] = _sources(data.test, "test", "test")
    else:
        found["test"] = _sources(data.train, "test", "train", or_none=True)
    if data.out_of_domain:
        found["out_of_domain"] = _sources(data.out_of_domain, "test", "out_of_domain")
    return {split: sources for split, sources in found.items() if sources}


def named(sources: list[Source]) -> str:
    """The files of a split, in a message."""
    files = [file for source in sources for file in source.files]
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def digest(file: str) -> str:
    """Digest of a file: of its contents, or, where these would have to be fetched, of its size and version."""
    filesystem, path = fsspec.core.url_to_fs(file)
    if "file" not in filesystem.protocol:
        info = filesystem.info(path)
        versions = [str(info[name]) for name in VERSIONS if info.get(name)]
        if versions:
            return provenance.key([file, info.get("size"), versions[0]], {})
    return provenance.digest(file)


def format_of(file: str) -> str | None:
    """The format that the file's name speaks of, if any."""
    match = re.search(rf"\.(\w+){COMPRESSED}$", file.partition("?")[0] if "://" in file else file)
    return FORMATS.get(match[1]) if match else None


def is_compressed(file: str) -> bool:
    return bool(re.search(r"\.(gz|bz2|xz|zst)$", file))


def _sources(configs: list[SourceConfig], split: str, field: str, or_none: bool = False) -> list[Source]:
    last_parts = Counter(_last_part(config.uri) for config in configs)
    sources = []
    for config in configs:
        if files := _files(config, split, field, or_none):
            last = _last_part(config.uri)
            name = config.name or (last if last_parts[last] == 1 else config.uri)
            sources.append(Source(name, tuple(files), config.format, config.columns, config.weight))
    names = Counter(source.name for source in sources)
    if twice := [name for name in names if names[name] > 1]:
        raise UserError(
            f"two sources of data.{field} are called {twice[0]}. Give each a `name` of its own; `weight: 2` takes the "
            "chats of one twice."
        )
    return sources


def _last_part(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]


def _files(config: SourceConfig, split: str, field: str, or_none: bool) -> list[str]:
    """The file, or a folder's files of that split. `or_none`: an empty list where a folder has none."""
    uri, split = config.uri, split if or_none else config.split or split
    try:
        if hub := re.fullmatch(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+)((?:/.*)?)", uri):
            try:
                return _hub_files(config, hub[1], hub[2], split, field, or_none)
            except UserError:
                raise
            except Exception as error:  # the hub's client lets errors of its HTTP library through
                raise OSError(f"{type(error).__name__}: {error}") from error
        filesystem, path = fsspec.core.url_to_fs(uri)
        if filesystem.isfile(path):
            return [] if or_none else [filesystem.unstrip_protocol(path)]
        if glob.has_magic(path) and not filesystem.exists(path):
            matches = sorted(file for file in filesystem.glob(path) if filesystem.isfile(file))
            if not matches:
                raise UserError(f"{uri} matches no file. Give data.{field} files of chats.")
            return [] if or_none else [filesystem.unstrip_protocol(file) for file in matches]
        if not filesystem.isdir(path):
            raise UserError(f"{uri} does not exist. Give data.{field} a file or folder of chats, or a URI.")
        return _folder_files(filesystem, path, config, split, field, or_none)
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, ImportError | ValueError) and parts.storage_error(error) is None:
            raise
        message = f"{uri} cannot be read: {error}. Give data.{field} a file or folder of chats."
        raise UserError(message) from error


def _hub_files(
    config: SourceConfig, repository: str, inside: str, split: str, field: str, or_none: bool
) -> list[str]:
    """A data set's own files, or else the Parquet that the hub has made of them."""
    revision = f"@{config.revision.replace('/', '%2F')}" if config.revision else ""
    own = config.model_copy(update={"uri": f"hf://datasets/{repository}{revision}{inside}"})
    filesystem, path = fsspec.core.url_to_fs(own.uri)
    if filesystem.isfile(path):
        return [] if or_none else [own.uri]
    if not filesystem.isdir(path):
        raise UserError(
            f"{own.uri} does not exist, or is not open to you. Give data.{field} a data set of the hub."
        )
    if files := _folder_files(filesystem, path, own, split, field, True):
        return files
    made = config.model_copy(update={"uri": f"hf://datasets/{repository}@{HUB_PARQUET}{inside}"})
    filesystem, made_path = fsspec.core.url_to_fs(made.uri)
    if not config.revision and filesystem.isdir(made_path):
        return _folder_files(filesystem, made_path, made, split, field, or_none)
    return _folder_files(filesystem, path, own, split, field, or_none)


def _folder_files(
    filesystem: Any, path: str, config: SourceConfig, split: str, field: str, or_none: bool
) -> list[str]:
    """The split's files in a folder, in its data/, or in that of the config asked for."""
    # train.jsonl, and the hub's train-00000-of-00002.parquet
    pattern = re.compile(rf"{re.escape(split)}(-.*)?\.({'|'.join(FORMATS)}){COMPRESSED}")
    folders = [f"{path}/{config.config}", f"{path}/data/{config.config}"] if config.config else [path]
    if not config.config:
        folders += [f"{path}/data", f"{path}/default"]
    for folder in folders:
        if not filesystem.isdir(folder):
            continue
        listed = [str(file) for file in sorted(filesystem.ls(folder, detail=False))]
        if kinds := {
            file: match[2] for file in listed if (match := pattern.fullmatch(os.path.basename(file)))
        }:
            if len(set(kinds.values())) > 1:
                names = sorted(map(os.path.basename, kinds))
                raise UserError(
                    f"{config.uri} has {names}: which is meant? Give data.{field} one of the files."
                )
            return [filesystem.unstrip_protocol(file) for file in kinds]
        if f"{folder}/{split}" in listed and filesystem.isdir(f"{folder}/{split}"):
            inner = [str(file) for file in sorted(filesystem.ls(f"{folder}/{split}", detail=False))]
            return [filesystem.unstrip_protocol(file) for file in inner if format_of(file)]
    if or_none:
        return []
    held = [os.path.basename(str(file)) for file in sorted(filesystem.ls(path, detail=False))]
    raise UserError(
        f"{config.uri} has no {split}.json, .jsonl or .parquet{_of(config)}; it holds {held[:8]}. Set split or config "
        f"of this source of data.{field} to what is meant."
    )


def _of(config: SourceConfig) -> str:
    return f" in {config.config}" if config.config else ""


def all_files(sources: list[Source]) -> Iterator[str]:
    return (file for source in sources for file in source.files)
