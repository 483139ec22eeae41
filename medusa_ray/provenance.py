"""A finished artifact -> provenance.json: which command, config, code and inputs it came from.

The file is written last and at once, so a folder that has it is whole. Its `key` digests the config and the
keys of the inputs; a stage whose key is unchanged has nothing to do.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec

FILE = "provenance.json"
UNFINISHED = ".unfinished"  # ends the name of a file that is being written
PACKAGES = ("medusa_ray", "torch", "transformers", "ray", "deepspeed", "datasets", "pyarrow", "guidellm")


def key(config: Any, inputs: dict[str, str]) -> str:
    """Digest of all that determines an artifact: plain config values and the digest of each input by name."""
    text = json.dumps({"config": config, "inputs": inputs}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def digest(uri: str) -> str:
    """Digest of an input: an artifact's key, the contents of a file, the names and sizes in another folder.

    A hub name, which is no path, stands for itself.
    """
    filesystem, path = fsspec.core.url_to_fs(uri)
    if record := read(uri):
        return str(record["key"])
    kind = kind_of(filesystem, path)
    if kind == "file":
        with filesystem.open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if kind == "directory":
        sizes = sorted((name, info["size"]) for name, info in filesystem.find(path, detail=True).items())
        return key([(name.removeprefix(path), size) for name, size in sizes], {})
    return uri


def kind_of(filesystem: fsspec.AbstractFileSystem, path: str) -> str | None:
    """file, directory, or None where nothing is.

    Raises what the filesystem raises when it cannot tell; its own exists, isfile and isdir say then that nothing is.
    """
    try:
        return str(filesystem.info(path)["type"])
    except (FileNotFoundError, NotADirectoryError):
        return None


def read(folder: str) -> dict[str, Any] | None:
    """The record of a finished artifact, or None."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    try:
        with filesystem.open(f"{path}/{FILE}", "r", encoding="utf-8") as file:
            return json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_complete(folder: str, config: Any, inputs: dict[str, str]) -> bool:
    """Whether the folder holds the finished artifact of just this config and these inputs."""
    record = read(folder)
    return record is not None and record["key"] == key(config, inputs)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys with their two values."""
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from differences(was, now, f"{prefix}{key}.")
        elif was != now:
            yield f"{prefix}{key}", was, now


def write(folder: str, config: Any, inputs: dict[str, str], **facts: Any) -> None:
    """Declares the folder finished. `facts` are further plain values, such as row counts.

    What writers left that were killed half-way is removed.
    """
    filesystem, path = fsspec.core.url_to_fs(folder)
    filesystem.invalidate_cache()
    for file in filesystem.find(path):
        if file.endswith(UNFINISHED):
            filesystem.rm_file(file)
    record = {
        "key": key(config, inputs),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "config": config,
        "inputs": inputs,
        "revision": revision(),
        "versions": versions(),
        **facts,
    }
    write_json(f"{folder}/{FILE}", record)


def unfinished_name(path: str) -> str:
    """What a file is called until it is whole. Another writer of the same file, or one given up for dead, may be at it
    too, hence a name of its own."""
    return f"{path}.{uuid.uuid4().hex}{UNFINISHED}"


def write_json(uri: str, value: Any) -> None:
    """Writes JSON so that a reader sees the whole file or none."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    filesystem.makedirs(os.path.dirname(path), exist_ok=True)
    unfinished = unfinished_name(path)
    with filesystem.open(unfinished, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
    filesystem.mv(unfinished, path)


def read_json(uri: str) -> Any:
    with fsspec.open(uri, "r", encoding="utf-8") as file:
        return json.load(file)


def revision() -> str | None:
    """Git revision of the code that runs, with `+` when it was edited; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if dirty.stdout.strip() else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The machine that results were measured on."""
    info: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        info["cpu"] = names[0] if names else info["cpu"]
    if hasattr(os, "sysconf"):
        info["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        info["gpu"] = sys.modules["torch"].cuda.get_device_name()
    return info
