"""One node of a cluster -> plain facts about it. Changes nothing; what it writes to try storage, it removes.

The class travels to the nodes by value, and needs no package there but fsspec, so that a node on which medusa_ray is
missing or another one is still told so.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import stat
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "transformers", "deepspeed", "safetensors", "pyarrow")
FOLDER = ".medusa-ray-doctor-"  # begins the name of the folder that tries storage, for as long as that takes
SETTLE_S = 5.0  # what a network filesystem may take to show one node what another has written
WEIGHTS = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
NVIDIA = "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"


class Probe:
    """Runs on a node, several calls at a time, so that one that hangs holds no other up."""

    def __init__(self, me: str) -> None:
        self._me = me

    def about(self, folders: list[str], session: str) -> dict[str, Any]:
        """What can be told at once. folders: local ones whose disks matter beside those of Ray's own files."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        total, available = memory()
        shared = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
        return {
            "hostname": socket.gethostname(),
            "versions": versions(),
            "gpus": gpus(),
            "disks": {folder: disk(folder) for folder in (session, *folders)},
            "memory_bytes": total,
            "available_bytes": available,
            "shm_bytes": shared.total if shared else 0,
            "open_files": soft,
            "compiler": shutil.which(os.environ.get("CXX", "g++")),
            "token_exposure": token_exposure(),
            "collective": collective_address(),
        }

    def clock(self) -> float:
        return time.time()

    def listening(self, ports: list[int]) -> dict[int, list[str]]:
        return listening(ports)

    def port(self, host: str, port: int) -> str | None:
        """Why nobody could serve there, or None; `serve` when Ray Serve does already."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return None
            except OSError as error:
                reason = error.strerror or str(error)
        with suppress(OSError):
            here = "127.0.0.1" if host == "0.0.0.0" else host
            with urllib.request.urlopen(f"http://{here}:{port}/-/healthz", timeout=3) as reply:
                if reply.read(7) == b"success":
                    return "serve"
        return reason

    def base(self, name: str, revision: str | None) -> dict[str, str | None]:
        """Where a base is found: `how` is folder, URI, cache or hub, with None as error; else why it is not."""
        try:
            return base(name, revision)
        except Exception as error:  # the hub's client has errors of many kinds
            return {"how": None, "error": told(error)}

    def size(self, uri: str) -> tuple[int | None, str | None]:
        """Bytes of a file that can be read, and None; or None, and why it cannot."""
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(uri)
            with filesystem.open(path, "rb") as file:
                file.read(1)
            return int(filesystem.size(path)), None
        except Exception as error:  # every filesystem has errors of its own
            return None, told(error)

    # Storage: each node writes a file into one new folder, then says whose files it sees there, then all is removed.

    def existing(self, folder: str) -> str:
        """The folder, or of those above it the nearest that is there; a URI of remote storage as it is."""
        filesystem, path = _opened(folder)
        if "file" not in filesystem.protocol:
            return folder
        return next(str(parent) for parent in (Path(path), *Path(path).parents) if parent.is_dir())

    def write(self, folder: str, run: str) -> str | None:
        """Why a file cannot be written there, or None."""
        try:
            filesystem, path = _opened(folder)
            if "file" in filesystem.protocol and not os.path.isdir(path):
                return f"{path} is not there"
            filesystem.makedirs(f"{path}/{FOLDER}{run}", exist_ok=True)
            filesystem.pipe_file(_file(path, run, self._me), _text(self._me))
            return None
        except Exception as error:
            return told(error)

    def seen(self, folder: str, run: str, wanted: list[str]) -> dict[str, Any]:
        """Which of the nodes' files are there, whole: {"nodes": [...], "error": why the others are not}."""
        found: set[str] = set()
        error: str | None = None
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            try:
                filesystem, path = _opened(folder)
                for node in set(wanted) - found:
                    with suppress(FileNotFoundError):
                        if filesystem.cat_file(_file(path, run, node)) == _text(node):
                            found.add(node)
                error = None
            except Exception as failure:
                error = told(failure)
            if found >= set(wanted) or time.monotonic() > deadline_s:
                return {"nodes": sorted(found), "error": error}
            time.sleep(0.25)

    def clean(self, folder: str, run: str) -> None:
        with suppress(Exception):  # another node may have done it
            filesystem, path = _opened(folder)
            filesystem.rm(f"{path}/{FOLDER}{run}", recursive=True)

    # Ports: each node listens at one of those that the kernel gives out, which gloo and NCCL take too.

    def listen(self) -> int:
        """The port; open for as long as this process lives."""
        self._listener = socket.create_server(("", 0), backlog=1024)
        threading.Thread(target=self._answer, daemon=True).start()
        return int(self._listener.getsockname()[1])

    def _answer(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                connection.sendall(b"medusa")

    def connect(self, targets: list[tuple[str, str, int]], timeout_s: float) -> dict[str, str | None]:
        """(node, address, port) of all -> by other node, why it cannot be reached, or None."""

        def attempt(target: tuple[str, str, int]) -> str | None:
            _, host, port = target
            try:
                with socket.create_connection((host, port), timeout=timeout_s) as connection:
                    return None if connection.recv(6) == b"medusa" else "something else answers there"
            except OSError as error:
                return told(error)

        others = [target for target in targets if target[0] != self._me]
        with ThreadPoolExecutor(64) as pool:
            return dict(zip((node for node, _, _ in others), pool.map(attempt, others), strict=True))


def told(error: BaseException) -> str:
    """An error in one line."""
    text = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {text}"[:300]


def versions() -> dict[str, str | None]:
    """By package; None where there is none."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"medusa_ray": own_code()}


def own_code() -> str | None:
    """Digest of the code of medusa_ray, whose version does not change with each commit; None where there is none."""
    spec = importlib.util.find_spec("medusa_ray")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return f"code {digest.hexdigest()[:8]}"


def gpus() -> list[dict[str, Any]]:
    """name, driver and memory_bytes of each GPU that nvidia-smi shows."""
    try:
        done = subprocess.run(["nvidia-smi", *NVIDIA], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 2]
    return [
        {"name": name, "driver": driver, "memory_bytes": int(mib) * 2**20 if mib.isdecimal() else None}
        for name, driver, mib in rows
    ]


def disk(folder: str) -> dict[str, Any]:
    """The disk under a local folder, or under the nearest one above it that is there."""
    there = next(parent for parent in (Path(folder), *Path(folder).parents) if parent.exists())
    usage = shutil.disk_usage(there)
    return {"device": os.stat(there).st_dev, "total_bytes": usage.total, "free_bytes": usage.free}


def memory() -> tuple[int, int]:
    """Bytes that this node's processes may take, and those that are left; a container's limit counts."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    total, available = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    with suppress(OSError, ValueError):  # no cgroup v2, or no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def token_file() -> Path:
    """Where Ray finds its token when no variable holds it."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").absolute()


def token_exposure() -> str | None:
    """Ray's token file when accounts other than its owner can read it, with its mode; None when they cannot."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return None
    file = token_file()
    try:
        mode = file.stat().st_mode
        if mode & stat.S_IROTH and all(parent.stat().st_mode & stat.S_IXOTH for parent in file.parents):
            return f"{file} has mode {stat.S_IMODE(mode):04o}"
    except OSError:
        pass  # without the file Ray would not run
    return None


def collective_address() -> dict[str, str | None] | None:
    """The address that gloo tells other nodes, and `by` what, where the environment says so.

    None where it does not: workers then take the interface of the address by which Ray knows the node (interfaces.py).
    """
    if wanted := os.environ.get("GLOO_SOCKET_IFNAME"):
        return {"address": interface_address(wanted.split(",")[0]), "by": f"GLOO_SOCKET_IFNAME={wanted}"}
    return None


def interface_address(name: str) -> str | None:
    """Its IPv4 address, or None."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        packed = struct.pack("256s", name.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(probe, 0x8915, packed)[20:24])  # SIOCGIFADDR
    return None


def listening(ports: list[int]) -> dict[int, list[str]]:
    """By port, the addresses at which this node listens; `*` for all of its own."""
    found: dict[int, list[str]] = {port: [] for port in ports}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not os.path.exists(table):
            continue
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            host, _, port = local.rpartition(":")
            if state == "0A" and int(port, 16) in found:
                found[int(port, 16)].append(_address(host))
    return found


def _address(host: str) -> str:
    """As the kernel writes it: words of four bytes, each in this machine's order."""
    words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]
    packed = b"".join(words)
    if not any(packed):
        return "*"
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def base(name: str, revision: str | None) -> dict[str, str | None]:
    """As `Probe.base`; raises what the hub's client raises."""
    configs = ("config.json", "adapter_config.json")
    if os.path.isdir(name):
        if any(os.access(f"{name}/{config}", os.R_OK) for config in configs):
            return {"how": "folder", "error": None}
        return {"how": None, "error": "the folder has no config.json that can be read"}
    if os.path.isabs(name):
        return {"how": None, "error": f"{name} is not there"}
    if "://" in name:
        filesystem, path = _opened(name)
        if any(filesystem.exists(f"{path}/{config}") for config in configs):
            return {"how": "URI", "error": None}
        return {"how": None, "error": f"there is no config.json at {name}"}
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    def is_cached(*files: str) -> bool:
        return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files)

    if is_cached(*configs) and is_cached(*WEIGHTS):
        return {"how": "cache", "error": None}
    if constants.HF_HUB_OFFLINE:
        return {
            "how": None,
            "error": f"{name} is not in the cache, and HF_HUB_OFFLINE keeps from fetching it",
        }
    HfApi().model_info(name, revision=revision, timeout=10)
    return {"how": "hub", "error": None}


def _file(path: str, run: str, node: str) -> str:
    return f"{path}/{FOLDER}{run}/{node.replace('/', '_').replace(':', '_')}"


def _text(node: str) -> bytes:
    """More than a full disk takes on the side."""
    return node.encode() * 8192


def _opened(folder: str) -> tuple[Any, str]:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(folder)
    filesystem.invalidate_cache()
    return filesystem, path.rstrip("/")
