"""Nodes of a Ray cluster on one host that share as little as nodes do: each has its own address, mounts and name.

Needs root and Linux: network namespaces on one bridge, and a mount and a UTS namespace for each node.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

WHY_NOT = (
    "needs root, ip and unshare"
    if os.name != "posix" or os.getuid() != 0 or not (shutil.which("ip") and shutil.which("unshare"))
    else ""
)
# Beside the ports that the kernel gives out, as behind a firewall that knows of Ray's alone.
PORTS = {
    "--node-manager-port": 7001,
    "--object-manager-port": 7002,
    "--runtime-env-agent-port": 7003,
    "--dashboard-agent-grpc-port": 7004,
    "--dashboard-agent-listen-port": 7005,
    "--metrics-export-port": 7006,
    "--min-worker-port": 7100,
    "--max-worker-port": 7200,
}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _merged(*environments: Mapping[str, str]) -> dict[str, str]:
    """Later ones win; what is empty is not set."""
    merged = dict(os.environ)
    for environment in environments:
        merged |= environment
    return {name: value for name, value in merged.items() if value}


@dataclass
class Host:
    """One node: a network namespace, and `ray start` in it once it is told so."""

    index: int
    network: str
    folder: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"{self.network}.{self.index}"

    @property
    def namespace(self) -> str:
        return f"medusa-{self.network}.{self.index}"

    def command(self, words: Sequence[str], before: str = "") -> list[str]:
        """Of a process there. before: lines of shell that prepare its mounts."""
        hosts, own = self.folder / f"hosts{self.index}", self.folder / f"ray{self.index}"
        names = "".join(f"{self.network}.{i} node{i}\n" for i in range(1, 9))
        hosts.write_text(f"127.0.0.1 localhost\n{names}")
        own.mkdir(exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        lines = [
            f"mount --bind {hosts} /etc/hosts",
            f"mount --bind {own} /tmp/ray",
            f"hostname node{self.index}",
            before,
            f"exec {shlex.join(words)}",
        ]
        # `ip netns exec` gives a mount namespace of its own too.
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
        return [*inside, "sh", "-ec", "\n".join(lines)]

    def start(self, options: Mapping[str, object], environment: Mapping[str, str], before: str = "") -> None:
        words = [str(word) for option in {**PORTS, **options}.items() for word in option if word != ""]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *words]
        with open(self.folder / f"ray{self.index}.log", "wb") as log:
            self.process = subprocess.Popen(
                self.command([*ray, "--node-ip-address", self.address], before),
                env=_merged(self.environment, environment),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """As when the power fails: all that runs in its namespace ends at once."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        for pid in map(int, listed.stdout.split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process:
            self.process.wait()
            self.process = None


@dataclass
class Cluster:
    """Hosts on one bridge, the first of which is Ray's head. network: the first three numbers of their addresses."""

    network: str
    folder: Path
    environment: Mapping[str, str]
    hosts: list[Host] = field(default_factory=list)

    @property
    def bridge(self) -> str:
        return f"medusa{self.network.rpartition('.')[2]}"

    @property
    def address(self) -> str:
        return f"{self.network}.1:6399"

    def __enter__(self) -> "Cluster":
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{self.network}.254/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.kill()
        for host in self.hosts:
            ip(
                "link", "del", f"{self.bridge}v{host.index}"
            )  # the namespace lives as long as its last process
            ip("netns", "del", host.namespace)
        ip("link", "del", self.bridge)

    def add(self, options: Mapping[str, object] = {}, before: str = "", **environment: str) -> Host:
        """A further host, whose Ray is waited for."""
        host = Host(len(self.hosts) + 1, self.network, self.folder, self.environment)
        self.hosts.append(host)
        ip("netns", "add", host.namespace)
        outside = f"{self.bridge}v{host.index}"
        ip("link", "add", outside, "type", "veth", "peer", "eth0", "netns", host.namespace)
        ip("link", "set", outside, "master", self.bridge, "up")
        ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            ip("-n", host.namespace, "link", "set", device, "up")
        role: dict[str, object] = {"--address": self.address}
        if host.index == 1:
            role = {"--head": "", "--port": 6399, "--dashboard-port": 8299}
        size = {"--num-cpus": 2, "--object-store-memory": 80 * 2**20}
        host.start({**role, **size, **options}, environment, before)
        self.wait_for(sum(host.process is not None for host in self.hosts))
        return host

    def run(
        self, words: Sequence[str], timeout_s: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """A driver on the head, in the folder."""
        return subprocess.run(
            self.hosts[0].command(words),
            env=_merged(self.environment, {"RAY_ADDRESS": self.address}, environment),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def wait_for(self, num: int, timeout_s: float = 90) -> None:
        """Until so many nodes are alive."""
        code = (
            "import ray; ray.init(logging_level='ERROR'); print(sum(node['Alive'] for node in ray.nodes()))"
        )
        deadline_s = time.monotonic() + timeout_s
        while (done := self.run([sys.executable, "-c", code])).stdout.strip() != str(num):
            assert time.monotonic() < deadline_s, f"{done.stdout[-300:]} nodes; {done.stderr[-2000:]}"
            time.sleep(1)
