"""What a verb needs around it: a Ray cluster, an output folder that can be written, a free port."""

import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from medusa_ray.cli.progress import step
from medusa_ray.config import UserError


def prepare_ray() -> None:
    """Settings that Ray reads when it is first imported.

    A local cluster gets a token of its own: with none, any user of this machine could run code in it; with
    Ray's default the token would stay in the home folder and surprise the user's next `ray start`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's own 15 lets whatever else runs here go first, a benchmark's client before the servers it measures.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if not os.environ.get("RAY_ADDRESS") and "RAY_AUTH_MODE" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


@contextmanager
def cluster(object_store_bytes: int | None = None) -> Iterator[None]:
    """One Ray cluster for all that runs inside: RAY_ADDRESS's, else a local one that ends with this process.

    Raises UserError when the cluster of RAY_ADDRESS does not answer.
    """
    prepare_ray()
    with step("ray", quiet=True):
        import ray

        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if address := os.environ.get("RAY_ADDRESS"):
            try:
                if ":" in address:  # Ray would wait for minutes before it found nobody there
                    host, _, port = address.rpartition("//")[2].rpartition(":")
                    socket.create_connection((host, int(port)), timeout=10).close()
                ray.init(address, **quiet)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"no Ray cluster answers at RAY_ADDRESS={address!r}: {error}. Start it, or unset "
                    "RAY_ADDRESS to run on this machine alone."
                ) from error
        else:
            # "local", since without it Ray would join whatever cluster it finds on this machine. Stages ask
            # for a CPU per actor whatever the machine has, so a small one pretends to have four.
            ray.init(
                "local",
                num_cpus=max(4, os.cpu_count() or 1),
                object_store_memory=object_store_bytes,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
    try:
        yield
    finally:
        ray.shutdown()


def check_writable(folder: str) -> None:
    """Raises UserError unless files can be made in the folder. Leaves nothing behind, not even the folder."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    try:
        if "file" in filesystem.protocol:
            existing = next(parent for parent in (Path(path), *Path(path).parents) if parent.exists())
            tempfile.TemporaryDirectory(dir=existing).cleanup()
        else:
            filesystem.pipe_file(f"{path}/.writable", b"")
            filesystem.rm_file(f"{path}/.writable")
    except Exception as error:  # every filesystem has errors of its own
        raise UserError(
            f"the output folder {folder} cannot be written: {error}. Choose a folder that you may write to."
        ) from error


def check_port(host: str, port: int) -> None:
    """Raises UserError when something listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port} of {host} cannot be used: {error.strerror}. Choose another one."
            ) from error
