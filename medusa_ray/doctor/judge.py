"""What is known of a cluster, and what a file needs -> findings. Asks nobody: each check is a function of facts."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from medusa_ray.doctor.facts import LOOPBACK, Bundle, Cluster, Needs

Level = Literal["fault", "warning", "ok"]
LEVELS: tuple[Level, ...] = ("fault", "warning", "ok")  # the worst first

SPILL_STOPS_AT = 0.95  # share of a disk in use, beyond which Ray writes nothing more to it
LITTLE_DISK_BYTES = 10 * 2**30
NAMED = 4  # nodes in one finding
OPEN_FILES = 8192  # below it Ray itself warns
CLOCK_WARNING_S, CLOCK_FAULT_S = 1.0, 60.0  # logs in order; signatures and tokens of storage and hubs
DRIVER = "this machine"


@dataclass(frozen=True)
class Finding:
    """What was found, what was expected, what to do. node is empty where it is the cluster's."""

    check: str
    level: Level
    found: str
    expected: str = ""
    do: str = ""
    node: str = ""


def judge(cluster: Cluster, needs: Needs) -> list[Finding]:
    """Findings of all checks, the worst first; a check without one says in a word what is well."""
    found: dict[Finding, list[str]] = {}
    for finding in (finding for check in CHECKS for finding in check(cluster, needs)):
        found.setdefault(replace(finding, node=""), []).append(finding.node)
    findings = [replace(finding, node=_together(names, cluster)) for finding, names in found.items()]
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def _together(names: list[str], cluster: Cluster) -> str:
    """Nodes that have the same finding."""
    if len(names) > 1 and set(names) >= {node.name for node in cluster.answering}:
        return "all nodes"
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} others" if len(names) > NAMED else "")


def nodes(cluster: Cluster, needs: Needs) -> Iterable[Finding]:
    for node in cluster.nodes:
        if not node.is_alive and not node.is_death_expected:
            # A cluster that grows and shrinks by itself replaces what it lost, and somebody may have done so.
            is_replaced = cluster.most is not None or node.address in {
                other.address for other in cluster.alive
            }
            yield Finding(
                "nodes", "warning" if is_replaced else "fault", f"is dead: {node.death or 'no reason known'}",
                "all nodes that joined alive", "start it again, or restart the head to forget it", node.name,
            )  # fmt: skip
        elif node.is_alive and node.error:
            yield Finding(
                "nodes", "fault", f"does not answer: {node.error}", f"an answer within {cluster.timeout_s:g} s",
                "see its raylet.out and the worker logs under its session folder, or take it out of the cluster",
                node.name,
            )  # fmt: skip
        for what in node.failed if node.answers else ():
            yield Finding(
                "nodes", "fault", f"fails at {what}", "an answer", "try it by hand on that node", node.name
            )
        for what in node.late if node.answers else ():
            yield Finding(
                "nodes", "fault", f"hangs on {what}", f"an answer within {cluster.timeout_s:g} s",
                "try it by hand on that node; raise --timeout if it is only slow", node.name,
            )  # fmt: skip
    if cluster.answering:
        yield Finding("nodes", "ok", f"{len(cluster.answering)} of {len(cluster.alive)} answer")


def versions(cluster: Cluster, needs: Needs) -> Iterable[Finding]:
    found = False
    told = {node.name: node.versions for node in cluster.answering}
    if told and cluster.driver_versions:
        told[DRIVER] = cluster.driver_versions
    for package in dict.fromkeys(package for versions in told.values() for package in versions):
        here = {name: versions.get(package) for name, versions in told.items()}
        usual = _usual(here)
        for name, version in here.items():
            if version != usual or version is None:
                found = True
                others = f"{usual}, as {sum(v == usual for v in here.values())} of {len(here)} have"
                yield Finding(
                    "versions", "fault", f"{package} {version or 'is missing'}",
                    others if usual else f"{package} installed", "install the same packages on all nodes", name,
                )  # fmt: skip
    if told and not found:
        versions = next(iter(told.values()))
        listed = ", ".join(
            f"{package} {versions[package]}" for package in ("python", "ray", "torch", "transformers")
        )
        yield Finding("versions", "ok", f"the same on all nodes: {listed}")


def authentication(cluster: Cluster, needs: Needs) -> Iterable[Finding]:
    """Who reaches Ray's ports without a token runs code as the cluster's user."""
    is_open = {
        what: [at for at in addresses if not at.startswith(LOOPBACK)]
        for what, addresses in cluster.listening.items()
    }
    do = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH on all nodes, or bind to 127.0.0.1 (--dashboard-host)"
    if cluster.asks_for_token is False:
        for what, addresses in is_open.items():
            if addresses:
                yield Finding(
                    "authentication", "fault" if what == "dashboard" else "warning",
                    f"no token is asked for, and the {what} listens at {', '.join(addresses)}: "
                    "whoever reaches it runs code here",
                    "a token, or loopback alone", do,
                )  # fmt: skip
        if not any(is_open.values()):
            yield Finding(
                "authentication", "ok", "no token is asked for, and Ray's ports are on loopback alone"
            )
    elif cluster.asks_for_token:
        yield Finding("authentication", "ok", "Ray asks for a token")
    exposures = {node.name: node.token_exposure for node in cluster.answering}
    if cluster.driver_token_exposure not in exposures.values():
        exposures[DRIVER] = cluster.driver_token_exposure
    for name, exposure in exposures.items():
        if exposure:
            yield Finding(
                "token file", "fault", f"{exposure}: every account there can read the token", "mode 0600",
                f"chmod 600 {exposure.split(' has mode')[0]}", name,
            )  # fmt: skip


def network(cluster: Cluster, needs: Needs) -> Iterable[Finding]:
    found = False
    answering = cluster.answering
    if len(answering) < 2:
        return
    for node in answering:
        at = node.collective
        if at is None:
            continue
        if at.address is None or at.address.startswith(LOOPBACK):
            found = True
            address = (
                "no address of this node" if at.address is None else f"{at.address}, where no other node is"
            )
            yield Finding(
                "network", "fault", f"gloo would take {address} (by {at.by})",
                f"an address like {node.address}, which other nodes reach",
                f"unset GLOO_SOCKET_IFNAME, or name the interface that has {node.address}", node.name,
            )  # fmt: skip
    for name, others in _cut_off(cluster).items():
        found = True
        listed = ", ".join(list(others)[:NAMED]) + ("" if len(others) <= NAMED else " and others")
        reason = Counter(others.values()).most_common(1)[0][0]
        yield Finding(
            "network", "fault", f"no connection with {listed} at a free port: {reason}",
            "all TCP ports open between nodes: gloo, NCCL and Ray take whichever are free",
            "open the ports of /proc/sys/net/ipv4/ip_local_port_range between the nodes", name,
        )  # fmt: skip
    if not found:
        yield Finding("network", "ok", "every node connects to every other one")


def _cut_off(cluster: Cluster) -> dict[str, dict[str, str]]:
    """Nodes that explain all connections that failed, and with which others theirs did, and why.

    A firewall on one node fails those of all others with it: it is told, and they are not.
    """
    failed = {
        (node.name, other): why for node in cluster.answering for other, why in node.unreachable.items()
    }
    found: dict[str, dict[str, str]] = {}
    while failed:
        # Of two nodes with as many failures, the one that could not connect comes first.
        ends = Counter(end for pair in failed for end in pair)
        worst = max(ends, key=lambda name: (ends[name], sum(a == name for a, _ in failed)))
        of_it = {pair: why for pair, why in failed.items() if worst in pair}
        found[worst] = {b if a == worst else a: why for (a, b), why in of_it.items()}
        failed = {pair: why for pair, why in failed.items() if pair not in of_it}
    return found


def clocks(cluster: Cluster, needs: Needs) -> Iterable[Finding]:
    clocks = {node.name: node.clock for node in cluster.answering if node.clock}
    found = False
    for name, clock in clocks.items():
        least = abs(clock.offset_s) - clock.uncertainty_s  # surely as wrong as that
        if least > CLOCK_WARNING_S:
            found = True
            yield Finding(
                "clocks", "fault" if least > CLOCK_FAULT_S else "warning",
                f"is {abs(clock.offset_s):.3g} s {'ahead of' if clock.offset_s > 0 else 'behind'} this machine "
                f"(within {clock.uncertainty_s:.2g} s)",
                f"at most {CLOCK_WARNING_S:g} s apart; beyond some minutes storage refuses signatures",
                "have chrony or systemd-timesyncd keep its clock", name,
            )  # fmt: skip
    if clocks and not found:
        most = max(clocks.values(), key=lambda clock: abs(clock.offset_s))
        yield Finding(
            "clocks",
            "ok",
            f"at most {abs(most.offset_s):.2g} s (within {most.uncertainty_s:.2g} s) from this machine's",
        )


def storage(cluster: Cluster, needs: Needs) -> Iterable[Finding]:
    """Each node has written a file into each folder, and has read those of the others."""
    for folder in needs.writes:
        found = False
        there = {node.name: node.storage[folder] for node in cluster.answering if folder in node.storage}
        written = {name for name, storage in there.items() if storage.write_error is None}
        for name, storage in there.items():
            if storage.write_error:
                found = True
                yield Finding(
                    "storage", "fault", f"{folder} cannot be written: {storage.write_error}",
                    f"a folder that all nodes write; {len(written)} of {len(there)} do", _remedy(storage.write_error),
                    name,
                )  # fmt: skip
        # Those who see each other's files are on one storage; where there are several, the largest is told as the rule.
        groups = Counter(storage.seen & written for storage in there.values() if storage.write_error is None)
        usual = groups.most_common(1)[0][0] if groups else frozenset()
        for name in sorted(written):
            storage = there[name]
            missing = sorted(written - storage.seen)
            if (storage.seen & written != usual or len(groups) == 1) and missing:
                found = True
                why = f" ({storage.read_error})" if storage.read_error else ""
                yield Finding(
                    "storage", "fault", f"{folder} here does not show what {', '.join(missing)} wrote there{why}",
                    "one storage for all nodes", "mount the same storage there on all nodes, or set output to a URI "
                    "such as s3://", name,
                )  # fmt: skip
        if there and not found:
            yield Finding("storage", "ok", f"{folder}: written and read by {len(there)} node(s)")


def inputs(cluster: Cluster, needs: Needs) -> Iterable[Finding]:
    for file in needs.inputs:
        here = {node.name: node.inputs[file] for node in cluster.answering if file in node.inputs}
        usual = _usual({name: found.num_bytes for name, found in here.items() if found.error is None})
        found = False
        for name, read in here.items():
            if read.error or read.num_bytes != usual:
                found = True
                yield Finding(
                    "inputs", "fault",
                    f"{file} cannot be read: {read.error}" if read.error else f"{file} has {read.num_bytes} bytes",
                    f"the file of {usual} bytes that other nodes have" if usual is not None else "a file to read",
                    _remedy(read.error or ""), name,
                )  # fmt: skip
        if here and not found:
            yield Finding("inputs", "ok", f"{file}: read by {len(here)} node(s)")


def bases(cluster: Cluster, needs: Needs) -> Iterable[Finding]:
    for name, _ in needs.bases:
        here = {node.name: node.bases[name] for node in cluster.answering if name in node.bases}
        have = [base.how for base in here.values() if base.how]
        for node, base in here.items():
            if base.how is None:
                others = f"; {len(have)} of {len(here)} nodes have it" if have else ""
                yield Finding(
                    "base", "fault", f"{name}: {base.error}", f"a base that each node reads{others}",
                    "put the folder on shared storage, or give the hub's name, and HF_TOKEN to each node if it is "
                    "gated", node,
                )  # fmt: skip
        if here and len(have) == len(here):
            yield Finding("base", "ok", f"{name}: read from {', '.join(sorted(set(filter(None, have))))}")


def disk(cluster: Cluster, needs: Needs) -> Iterable[Finding]:
    found = False
    for node in cluster.answering:
        for folder, disk in node.disks.items():
            free, share = disk.free_bytes, 1 - disk.free_bytes / max(1, disk.total_bytes)
            where = f"{folder} has {size(free)} of {size(disk.total_bytes)} left"
            if folder == cluster.session and share > SPILL_STOPS_AT:
                found = True
                yield Finding(
                    "disk", "fault", where, f"{1 - SPILL_STOPS_AT:.0%} free, without which Ray spills nothing",
                    "free some, or start Ray with --temp-dir on another disk", node.name,
                )  # fmt: skip
            elif folder in needs.writes and needs.disk_bytes is not None and free < needs.disk_bytes:
                found = True
                bound = "at most " if needs.is_disk_bound else ""
                yield Finding(
                    "disk", "warning" if needs.is_disk_bound else "fault", where,
                    f"{bound}{size(needs.disk_bytes)} for what the run writes",
                    "free some, set output to another disk, or hidden.mode to stream", node.name,
                )  # fmt: skip
            elif free < LITTLE_DISK_BYTES and folder in (cluster.session, *needs.writes):
                found = True
                yield Finding(
                    "disk", "fault" if free < LITTLE_DISK_BYTES / 100 else "warning", where,
                    f"{size(LITTLE_DISK_BYTES)} or more for Ray's logs, spilling and artifacts", "free some", node.name,
                )  # fmt: skip
    frees = [disk.free_bytes for node in cluster.answering for disk in node.disks.values()]
    if frees and not found:
        yield Finding("disk", "ok", f"{size(min(frees))} free or more on all nodes")


def memory(cluster: Cluster, needs: Needs) -> Iterable[Finding]:
    found = False
    for node in cluster.answering:
        for process in needs.processes:
            sizes = [gpu.memory_bytes for gpu in node.gpus if gpu.memory_bytes]
            there = max(sizes, default=0) if process.on_gpu else node.memory_bytes
            if process.on_gpu and not sizes:
                continue
            if process.num_bytes > there or (not process.on_gpu and process.num_bytes > node.available_bytes):
                found = True
                is_fault = process.num_bytes > there
                of = "its largest GPU" if process.on_gpu else "this node"
                left = f"{size(there)} in {of}" + (
                    "" if is_fault else f", of which {size(node.available_bytes)} are free"
                )
                yield Finding(
                    "memory", "fault" if is_fault else "warning", left,
                    f"{size(process.num_bytes)} for {process.what}",
                    "take larger nodes, fewer tokens at a time, or model.quantization" if is_fault else "end what "
                    "else runs there", node.name,
                )  # fmt: skip
        store = node.resources.get("object_store_memory", 0)
        if 0 < node.shm_bytes < store:
            found = True
            yield Finding(
                "memory", "warning", f"/dev/shm has {size(node.shm_bytes)}, the object store {size(store)}: Ray puts "
                "it on disk, and NCCL and gloo may find no room", f"{size(store)} or more",
                "give the container more (docker --shm-size; an emptyDir of medium Memory)", node.name,
            )  # fmt: skip
    if cluster.answering and not found:
        least = min(node.available_bytes for node in cluster.answering)
        yield Finding("memory", "ok", f"{size(least)} free or more on all nodes")


def gpus(cluster: Cluster, needs: Needs) -> Iterable[Finding]:
    found = False
    for node in cluster.answering:
        torch = node.versions.get("torch") or ""
        if node.gpus and not node.resources.get("GPU"):
            found = True
            yield Finding(
                "GPUs", "warning", f"has {len(node.gpus)}, of which Ray knows none", "as many as are there",
                "start Ray where it sees them (CUDA_VISIBLE_DEVICES), or with --num-gpus", node.name,
            )  # fmt: skip
        if node.resources.get("GPU") and torch.endswith("+cpu"):
            found = True
            yield Finding(
                "GPUs",
                "fault",
                f"torch {torch} is a build for CPUs",
                "one for CUDA",
                "install it there",
                node.name,
            )
        if node.resources.get("GPU") and not node.gpus:
            found = True
            yield Finding(
                "GPUs", "fault", f"Ray counts {node.resources['GPU']:g}, and nvidia-smi shows none", "the same number",
                "see whether the driver is loaded there, and start Ray without --num-gpus", node.name,
            )  # fmt: skip
    for what, of in (("driver", lambda gpu: gpu.driver), ("type", lambda gpu: gpu.name)):
        kinds = Counter(of(gpu) for node in cluster.answering for gpu in node.gpus)
        if len(kinds) > 1:
            found = True
            listed = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common())
            yield Finding(
                "GPUs", "warning", f"differ in {what}: {listed}", f"one {what}: the slowest sets the pace of training",
                "choose nodes by accelerator_type or a label" if what == "type" else "install one driver on all nodes",
            )  # fmt: skip
    if (num := cluster.resource("GPU")) and not found:
        yield Finding("GPUs", "ok", f"{num:g}, all of one type and driver")
    elif needs.wants_gpu and not num:
        yield Finding(
            "GPUs", "fault", "no node of Ray has a GPU", "GPUs, since the file sets device to cuda",
            "add nodes with GPUs, or set device to auto or cpu",
        )  # fmt: skip


def compiler(cluster: Cluster, needs: Needs) -> Iterable[Finding]:
    if not needs.compiles:
        return
    lacking = [node.name for node in cluster.answering if node.compiler is None]
    for name in lacking:
        yield Finding(
            "compiler", "warning", "has no C++ compiler: engines run uncompiled there, which is slower",
            "g++, or the one that CXX names", "install g++ there", name,
        )  # fmt: skip
    if not lacking and cluster.answering:
        yield Finding("compiler", "ok", "all nodes have one")


def open_files(cluster: Cluster, needs: Needs) -> Iterable[Finding]:
    lacking = [node for node in cluster.answering if node.open_files < OPEN_FILES]
    for node in lacking:
        yield Finding(
            "open files", "warning", f"at most {node.open_files} in a process", f"{OPEN_FILES} or more",
            "ulimit -n 65536 before `ray start`", node.name,
        )  # fmt: skip
    if not lacking and cluster.answering:
        yield Finding(
            "open files", "ok", f"{min(node.open_files for node in cluster.answering):,} or more on all nodes"
        )


def serve_port(cluster: Cluster, needs: Needs) -> Iterable[Finding]:
    if needs.http is None:
        return
    host, port = needs.http
    found = False
    for node in cluster.answering:
        ours = node.serve_port == "serve" and cluster.has_serve
        if node.serve_port and not ours:
            found = True
            who = "another cluster's Ray Serve holds it" if node.serve_port == "serve" else node.serve_port
            yield Finding(
                "port of Serve", "fault", f"{host}:{port} cannot be used: {who}", "a free port",
                "set http_options.port to another one", node.name,
            )  # fmt: skip
    if not found and cluster.answering:
        state = "held by this cluster's Ray Serve" if cluster.has_serve else "free"
        yield Finding("port of Serve", "ok", f"{host}:{port} is {state}")


def resources(cluster: Cluster, needs: Needs) -> Iterable[Finding]:
    """Whether what the file asks for fits the nodes there are, those there could be, and what is free now."""
    found = False
    for stage, bundles in needs.bundles.items():
        left = unplaced(bundles, [node.resources for node in cluster.alive])
        for bundle in left:
            found = True
            kinds = [
                kind for kind in bundle.resources if kind in ("CPU", "GPU") or not cluster.resource(kind)
            ]
            there = ", ".join(f"{cluster.resource(kind):g} {kind}" for kind in kinds)
            can_grow = cluster.most is not None and all(
                cluster.most.get(kind, 0) >= sum(b.resources.get(kind, 0) * b.count for b in bundles)
                for kind in bundle.resources
            )
            yield Finding(
                "resources", "warning" if can_grow else "fault",
                f"{stage}: {bundle.count} of {bundle.what} find no node with {_listed(bundle.resources)}; all nodes "
                f"have {there} together" + (", and the autoscaler has to add some" if can_grow else ""),
                _expected(bundles), f"lower {bundle.what}, or add nodes", "",
            )  # fmt: skip
        asked = Counter[str]()
        for bundle in bundles:
            asked.update({kind: amount * bundle.count for kind, amount in bundle.resources.items()})
        short = {
            k: cluster.available.get(k, 0)
            for k, amount in asked.items()
            if amount > cluster.available.get(k, 0)
        }
        if short and not left:
            found = True
            yield Finding(
                "resources", "warning", f"{stage}: only {_listed(short)} free now, the rest is held by others",
                _expected(bundles), "wait, or end what else runs (`ray list actors`)",
            )  # fmt: skip
    if needs.bundles and not found:
        yield Finding("resources", "ok", f"all that {', '.join(needs.bundles)} ask(s) for fits")


def unknown(cluster: Cluster, needs: Needs) -> Iterable[Finding]:
    for what in needs.unknown:
        yield Finding("file", "warning", what, "a file whose needs can be known", "see `medusa-ray plan`")


CHECKS: tuple[Callable[[Cluster, Needs], Iterable[Finding]], ...] = (
    nodes, versions, authentication, network, clocks, storage, inputs, bases, disk, memory, gpus, compiler,
    open_files, serve_port, resources, unknown,
)  # fmt: skip


def unplaced(bundles: Iterable[Bundle], nodes: Iterable[Mapping[str, float]]) -> list[Bundle]:
    """Those that find no node once the others have theirs: the largest are placed first, each on the fullest node that
    still has room, so that whole GPUs stay together."""
    room = [dict(node) for node in nodes]
    left = []
    for bundle in sorted(bundles, key=lambda b: (-b.resources.get("GPU", 0), -b.resources.get("CPU", 0))):
        missing = 0
        for _ in range(bundle.count):
            fitting = [
                node
                for node in room
                if all(node.get(kind, 0) + 1e-6 >= n for kind, n in bundle.resources.items() if n)
            ]
            if not fitting:
                missing += 1
                continue
            best = min(fitting, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)))
            for kind, amount in bundle.resources.items():
                best[kind] = best.get(kind, 0) - amount
        if missing:
            left.append(Bundle(bundle.what, bundle.resources, missing))
    return left


def size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def _usual(values: Mapping[str, object]) -> object:
    """What most nodes have; of as many, what the first one has."""
    return Counter(values.values()).most_common(1)[0][0] if values else None


def _remedy(error: str) -> str:
    if "No space" in error or "Errno 28" in error or "quota" in error.lower():
        return "free some of the disk, or set output to another one"
    if "redential" in error or "Forbidden" in error or "AccessDenied" in error or "403" in error:
        return "give this node the credentials that the others have, before `ray start` (AWS_..., or a role)"
    return (
        "put it where all nodes see it, as the user that Ray runs as: on one mount, or at a URI such as s3://"
    )


def _listed(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items() if amount) or "nothing"


def _expected(bundles: Iterable[Bundle]) -> str:
    return "; ".join(
        f"{bundle.count} of {bundle.what} with {_listed(bundle.resources)} each" for bundle in bundles
    )
