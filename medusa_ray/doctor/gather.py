"""A running Ray -> what is known of it. Asks every node at once, and waits for none longer than it was told."""

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from medusa_ray.doctor import probe
from medusa_ray.doctor.facts import (
    LOOPBACK,
    Base,
    Clock,
    Cluster,
    Collective,
    Disk,
    Gpu,
    Input,
    Needs,
    Node,
    Storage,
)

EXPECTED_DEATHS = {1, 4}  # DeathReason in Ray's gcs.proto: ended on purpose, or idle; 3 is preempted
NUM_CLOCK_TRIPS = 8
CONNECT_S = 3.0
CALLS_AT_A_TIME = 32  # of one node, those that hang among them

T = TypeVar("T")
Answers = dict[str, Any]  # by node


def has_gpu() -> bool:
    return bool(ray.cluster_resources().get("GPU"))


def within(timeout_s: float, function: Callable[[], T]) -> T:
    """Its value. Raises what it raises, or TimeoutError, and then leaves it behind."""
    done: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def body() -> None:
        try:
            done.put((function(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=body, daemon=True).start()
    try:
        value, error = done.get(timeout=timeout_s)
    except Empty:
        raise TimeoutError(f"no answer within {timeout_s:g} s") from None
    if error:
        raise error
    return value  # type: ignore[return-value]  # T may have None among its values


class Probes:
    """An actor on each node, and which of them are still worth asking."""

    def __init__(self, nodes: Mapping[str, str], timeout_s: float) -> None:
        """nodes: id of each by name."""
        cloudpickle.register_pickle_by_value(probe)
        self.timeout_s = timeout_s
        self.failed: dict[str, list[str]] = {}
        self.late: dict[str, list[str]] = {}
        actor: Any = ray.remote(probe.Probe)
        self.actors: dict[str, Any] = {
            name: actor.options(
                num_cpus=0,
                max_concurrency=CALLS_AT_A_TIME,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            ).remote(name)
            for name, node_id in nodes.items()
        }

    def ask(self, what: str, method: str, *args: Any, of: set[str] | None = None) -> Answers:
        """By node, what this method of the probes tells, of all nodes or of those named."""
        return self.ask_together({what: (method, *args)}, of)[what]

    def ask_together(
        self, questions: dict[str, tuple[Any, ...]], of: set[str] | None = None
    ) -> dict[str, Answers]:
        """method and arguments by what they are about -> the answers to each, all within one timeout.

        Those that are late or fail are noted.
        """
        refs = {
            (what, name): getattr(actor, method).remote(*args)
            for what, (method, *args) in questions.items()
            for name, actor in self.actors.items()
            if of is None or name in of
        }
        if refs:
            ray.wait(list(refs.values()), num_returns=len(refs), timeout=self.timeout_s)
        found: dict[str, Answers] = {what: {} for what in questions}
        for (what, name), ref in refs.items():
            try:
                found[what][name] = ray.get(ref, timeout=0)
            except ray.exceptions.GetTimeoutError:
                self.late.setdefault(name, []).append(what)
            except Exception as error:
                why = probe.told(getattr(error, "cause", None) or error)
                self.failed.setdefault(name, []).append(f"{what}: {why}")
        return found

    def drop(self, names: set[str]) -> None:
        for name in names & self.actors.keys():
            ray.kill(self.actors.pop(name))

    def end(self) -> None:
        self.drop(set(self.actors))


def cluster(needs: Needs, asks_for_token: bool | None, timeout_s: float) -> Cluster:
    """What is known of the cluster that Ray is initialised on. Each of some ten rounds takes `timeout_s` at most."""
    table = _names(ray.nodes())
    internals: Any = ray._private  # where Ray keeps what it tells nobody
    session = internals.worker._global_node.get_session_dir_path()
    gcs, dashboard = ray.get_runtime_context().gcs_address, internals.worker.get_dashboard_url()
    alive = {name: row for name, row in table.items() if row["Alive"]}
    is_head = {name: "node:__internal_head__" in row["Resources"] for name, row in alive.items()}
    probes = Probes({name: row["NodeID"] for name, row in alive.items()}, timeout_s)
    try:
        about = probes.ask("starting", "about", list(needs.local_writes), session)
        probes.drop(alive.keys() - about.keys())
        ports = {what: _port(at) for what, at in (("GCS", gcs), ("dashboard", dashboard)) if at}
        asked = {
            "listening": probes.ask("ports", "listening", [port for port in ports.values() if port]),
            "serve_port": _serve_port(probes, needs, is_head),
            "unreachable": _unreachable(probes, about, alive),
            "clock": _clocks(probes),
        }
        storage = _storage(probes, needs, uuid.uuid4().hex[:12])
        files = probes.ask_together({f"reading {file}": ("size", file) for file in needs.inputs})
        bases = probes.ask_together(
            {f"the base {base}": ("base", base, revision) for base, revision in needs.bases}
        )
    finally:
        probes.end()
    nodes = []
    for name, row in table.items():
        node = Node(
            name=name,
            address=row["NodeManagerAddress"],
            is_head=is_head.get(name, False),
            is_alive=row["Alive"],
            death=str(row.get("DeathReasonMessage") or ""),
            is_death_expected=row.get("DeathReason") in EXPECTED_DEATHS,
            resources=row["Resources"],
        )
        if not row["Alive"]:
            nodes.append(node)
            continue
        if name not in about:
            error = probes.failed.get(name, [f"nothing within {timeout_s:g} s"])[0]
            nodes.append(replace(node, error=error))
            continue
        nodes.append(
            replace(
                _described(node, about[name]),
                clock=asked["clock"].get(name),
                unreachable=asked["unreachable"].get(name, {}),
                serve_port=asked["serve_port"].get(name),
                storage={folder: found[name] for folder, found in storage.items() if name in found},
                inputs={
                    file: Input(*told[name])
                    for file in needs.inputs
                    if name in (told := files[f"reading {file}"])
                },
                bases={
                    base: Base(**told[name])
                    for base, _ in needs.bases
                    if name in (told := bases[f"the base {base}"])
                },
                late=tuple(probes.late.get(name, ())),
                failed=tuple(probes.failed.get(name, ())),
            )
        )
    return Cluster(
        nodes=tuple(nodes),
        listening=_listening(ports, asked["listening"], is_head),
        asks_for_token=asks_for_token,
        available=ray.available_resources(),
        most=internals.state.state.get_max_resources_from_cluster_config(),
        session=session,
        driver_versions=probe.versions(),
        driver_token_exposure=probe.token_exposure(),
        has_serve=_has_serve(),
        timeout_s=timeout_s,
    )


def _names(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows of `ray.nodes()` by address, with some of the id where several have it."""
    addresses = [row["NodeManagerAddress"] for row in rows]
    return {
        address if addresses.count(address) == 1 else f"{address}/{row['NodeID'][:6]}": row
        for address, row in zip(addresses, rows, strict=True)
    }


def _described(node: Node, about: dict[str, Any]) -> Node:
    values = {key: value for key, value in about.items() if key in Node.__dataclass_fields__}
    return replace(
        node,
        **values
        | {
            "gpus": tuple(Gpu(**gpu) for gpu in about["gpus"]),
            "disks": {folder: Disk(**disk) for folder, disk in about["disks"].items()},
            "collective": Collective(**about["collective"]) if about["collective"] else None,
        },
    )


def _serve_port(probes: Probes, needs: Needs, is_head: dict[str, bool]) -> Answers:
    if needs.http is None:
        return {}
    wanted = {name for name in is_head if needs.proxies == "EveryNode" or is_head[name]}
    return probes.ask("the port of Serve", "port", *needs.http, of=wanted)


def _unreachable(probes: Probes, about: Answers, alive: dict[str, Any]) -> dict[str, dict[str, str]]:
    """By node, those that it could not connect to, at the address that gloo would tell if that is no loopback."""
    ports = probes.ask("listening", "listen")
    targets = []
    for name, port in ports.items():
        at = (about[name]["collective"] or {}).get("address")
        is_far = at is not None and not at.startswith(LOOPBACK)
        targets.append((name, at if is_far else alive[name]["NodeManagerAddress"], port))
    reached = probes.ask("connecting", "connect", targets, CONNECT_S)
    return {me: {other: why for other, why in others.items() if why} for me, others in reached.items()}


def _clocks(probes: Probes) -> dict[str, Clock]:
    """By round trips, of which the shortest says most: the node's clock was read at some moment of it."""
    best: dict[str, Clock] = {}
    deadline_s = time.monotonic() + probes.timeout_s
    for name, actor in probes.actors.items():
        if name in probes.late:
            continue
        for _ in range(NUM_CLOCK_TRIPS):
            before = time.time()
            try:
                there = ray.get(actor.clock.remote(), timeout=min(2, max(0, deadline_s - time.monotonic())))
            except Exception:
                break
            after = time.time()
            clock = Clock(there - (before + after) / 2, (after - before) / 2)
            if name not in best or clock.uncertainty_s < best[name].uncertainty_s:
                best[name] = clock
    return best


def _storage(probes: Probes, needs: Needs, run: str) -> dict[str, dict[str, Storage]]:
    """By folder and node. What was written is gone when this returns, but for what a node that hangs holds."""
    found: dict[str, dict[str, Storage]] = {}
    for folder in needs.writes:
        parents = probes.ask(f"looking for {folder}", "existing", folder)
        # What some nodes have and others lack is what tells a mount that is missing.
        place = max(parents.values(), key=len, default=folder)
        try:
            written = probes.ask(f"writing to {folder}", "write", place, run)
            wanted = [name for name, error in written.items() if error is None]
            seen = probes.ask(f"reading in {folder}", "seen", place, run, wanted)
        finally:
            probes.ask(f"cleaning {folder}", "clean", place, run)
        found[folder] = {
            name: Storage(error, frozenset(seen[name]["nodes"]), seen[name]["error"])
            for name, error in written.items()
            if name in seen
        }
    return found


def _listening(
    ports: dict[str, int], listening: Answers, is_head: dict[str, bool]
) -> dict[str, tuple[str, ...]]:
    """Where the head itself listens: it is there that GCS and dashboard are."""
    heads = [found for name, found in listening.items() if is_head[name]]
    return {
        what: tuple(f"{address}:{port}" for found in heads for address in found.get(port, ()))
        for what, port in ports.items()
    }


def _port(address: str) -> int:
    port = address.rpartition(":")[2].rstrip("/")
    return int(port) if port.isdecimal() else 0


def _has_serve() -> bool:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True
