"""What is known of a cluster, before anybody judges it."""

from dataclasses import dataclass, field
from typing import Any

LOOPBACK = ("127.", "::1")  # how its addresses begin


@dataclass(frozen=True)
class Clock:
    """A node's clock less the driver's, in seconds; the truth is within `uncertainty_s` of it."""

    offset_s: float
    uncertainty_s: float


@dataclass(frozen=True)
class Storage:
    """One folder as one node found it."""

    write_error: str | None = None
    seen: frozenset[str] = frozenset()  # nodes whose files were read there
    read_error: str | None = None


@dataclass(frozen=True)
class Input:
    """One file as one node found it."""

    num_bytes: int | None
    error: str | None = None


@dataclass(frozen=True)
class Base:
    """A base as one node found it: how is folder, URI, cache or hub."""

    how: str | None
    error: str | None = None


@dataclass(frozen=True)
class Gpu:
    name: str
    driver: str
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Disk:
    """The disk under a folder; the same device may hold several."""

    device: int
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Collective:
    """The address that gloo tells other nodes, and what it was chosen by."""

    address: str | None
    by: str


@dataclass(frozen=True)
class Node:
    """One node. `error` says why it did not answer; the facts behind it are then missing."""

    name: str
    address: str
    is_head: bool = False
    is_alive: bool = True
    death: str = ""  # why it is not
    is_death_expected: bool = False  # the cluster was made smaller
    error: str | None = None
    resources: dict[str, float] = field(default_factory=dict)  # in Ray's names
    versions: dict[str, str | None] = field(default_factory=dict)  # by package; None where there is none
    gpus: tuple[Gpu, ...] = ()
    disks: dict[str, Disk] = field(default_factory=dict)  # by folder
    memory_bytes: int = 0
    available_bytes: int = 0
    shm_bytes: int = 0
    open_files: int = 0
    compiler: str | None = None
    token_exposure: str | None = None
    collective: Collective | None = None
    clock: Clock | None = None
    unreachable: dict[str, str] = field(default_factory=dict)  # nodes that it could not connect to, and why
    storage: dict[str, Storage] = field(default_factory=dict)  # by folder
    inputs: dict[str, Input] = field(default_factory=dict)  # by file
    bases: dict[str, Base] = field(default_factory=dict)  # by name
    serve_port: str | None = None  # why Serve's port is not free; `serve` where Serve holds it
    late: tuple[str, ...] = ()  # what it had not told when time was up
    failed: tuple[str, ...] = ()  # errors in telling

    @property
    def answers(self) -> bool:
        return self.is_alive and self.error is None


@dataclass(frozen=True)
class Cluster:
    """All nodes, and what is one for all."""

    nodes: tuple[Node, ...]
    listening: dict[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # `GCS` and `dashboard` -> address:port
    asks_for_token: bool | None = None
    available: dict[str, float] = field(default_factory=dict)  # resources that nobody holds now
    most: dict[str, float] | None = (
        None  # resources of the largest cluster that the autoscaler makes; None without one
    )
    session: str = ""  # folder of Ray's own files on each node
    driver_versions: dict[str, str | None] = field(default_factory=dict)
    driver_token_exposure: str | None = None
    has_serve: bool = False
    timeout_s: float = 20.0  # that a node had for each answer

    @property
    def alive(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.is_alive)

    @property
    def answering(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.answers)

    def resource(self, name: str) -> float:
        return sum(node.resources.get(name, 0) for node in self.alive)


@dataclass(frozen=True)
class Bundle:
    """Resources that have to be on one node, `count` times."""

    what: str  # the key of the file that asks for it
    resources: dict[str, float]
    count: int = 1


@dataclass(frozen=True)
class Process:
    """What one process holds in memory, of the node or of its GPU."""

    what: str
    num_bytes: float
    on_gpu: bool = False


@dataclass(frozen=True)
class Needs:
    """What a file asks of a cluster; the default is that of no file."""

    file: str | None = None
    writes: tuple[str, ...] = ()  # folders or URIs
    inputs: tuple[str, ...] = ()  # files
    bases: tuple[tuple[str, str | None], ...] = ()  # name and revision
    # Bundles that are held at the same time, by the stage that holds them; stages run one after another.
    bundles: dict[str, tuple[Bundle, ...]] = field(default_factory=dict)
    processes: tuple[Process, ...] = ()
    disk_bytes: float | None = None  # that the run writes; None where that cannot be known
    is_disk_bound: bool = False  # it is the most that it can be, and may be far less
    wants_gpu: bool = False  # the file names cuda
    compiles: bool = False  # a base on a CPU
    http: tuple[str, int] | None = None  # where Serve listens
    proxies: str = "HeadOnly"  # on which nodes
    unknown: tuple[str, ...] = ()  # what could not be found out of the file, and why

    @property
    def local_writes(self) -> tuple[str, ...]:
        return tuple(folder for folder in self.writes if "://" not in folder)


def plain(value: Any) -> Any:
    """Dataclasses, tuples and sets as JSON has them."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return plain(vars(value)) if hasattr(value, "__dataclass_fields__") else value
