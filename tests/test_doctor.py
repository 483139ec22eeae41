"""Doctor's judgement on facts that no cluster is needed for, and its word on the tests' own cluster."""

import io
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from medusa_ray import config, doctor
from medusa_ray.doctor import probe
from medusa_ray.doctor.console import show
from medusa_ray.doctor.facts import (
    Base,
    Bundle,
    Clock,
    Cluster,
    Collective,
    Disk,
    Gpu,
    Input,
    Needs,
    Node,
    Process,
    Storage,
)
from medusa_ray.doctor.judge import Finding, judge, unplaced

GIB = 2**30
NAMES = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
VERSIONS: dict[str, str | None] = {
    "python": "3.11.7",
    "ray": "2.60.0",
    "torch": "2.13.0",
    "transformers": "5.24.0",
}
NEEDS = Needs(
    file="run.yaml",
    writes=("/mnt/runs",),
    inputs=("/mnt/chats.jsonl",),
    bases=(("/mnt/base", None),),
    bundles={"train": (Bundle("train.num_workers", {"CPU": 1, "GPU": 1}, 6),)},
    processes=(Process("a train worker", 10 * GIB, on_gpu=True),),
    disk_bytes=50 * GIB,
    compiles=True,
    http=("127.0.0.1", 8000),
)


def well(name: str) -> Node:
    return Node(
        name=name,
        address=name,
        is_head=name == NAMES[0],
        resources={"CPU": 8, "GPU": 2, "object_store_memory": 8 * GIB},
        versions=VERSIONS,
        gpus=(Gpu("H200", "570.1", 140 * GIB),) * 2,
        disks={"/tmp/ray": Disk(1, 1000 * GIB, 500 * GIB), "/mnt/runs": Disk(2, 1000 * GIB, 500 * GIB)},
        memory_bytes=64 * GIB,
        available_bytes=60 * GIB,
        shm_bytes=16 * GIB,
        open_files=65536,
        compiler="/usr/bin/g++",
        collective=Collective(name, "GLOO_SOCKET_IFNAME=eth0"),
        clock=Clock(0.01, 0.02),
        storage={"/mnt/runs": Storage(seen=frozenset(NAMES))},
        inputs={"/mnt/chats.jsonl": Input(1000)},
        bases={"/mnt/base": Base("folder")},
    )


HEALTHY = Cluster(
    nodes=tuple(map(well, NAMES)),
    listening={"GCS": ("10.0.0.1:6379",), "dashboard": ("*:8265",)},
    asks_for_token=True,
    available={"CPU": 24, "GPU": 6},
    session="/tmp/ray",
    driver_versions=VERSIONS,
)


def with_second(**changes: Any) -> Cluster:
    """The healthy cluster, but for one node."""
    first, second, third = HEALTHY.nodes
    return replace(HEALTHY, nodes=(first, replace(second, **changes), third))


def unshared() -> Cluster:
    """The second node has a folder of its own where the others have a mount."""
    seen = {NAMES[0]: {NAMES[0], NAMES[2]}, NAMES[1]: {NAMES[1]}, NAMES[2]: {NAMES[0], NAMES[2]}}
    return replace(
        HEALTHY,
        nodes=tuple(
            replace(node, storage={"/mnt/runs": Storage(seen=frozenset(seen[node.name]))})
            for node in HEALTHY.nodes
        ),
    )


def told(cluster: Cluster, needs: Needs = NEEDS) -> list[Finding]:
    return [finding for finding in judge(cluster, needs) if finding.level != "ok"]


# A cluster or needs with one thing that is the matter, and the check, level and words that tell it.
FAULTS: dict[str, tuple[Callable[[], Cluster | Needs], str, str, str]] = {
    "skew": (lambda: with_second(versions=VERSIONS | {"ray": "2.59.0"}), "versions", "fault", "ray 2.59.0"),
    "missing": (lambda: with_second(versions=VERSIONS | {"torch": None}), "versions", "fault", "torch is missing"),
    "dead": (lambda: with_second(is_alive=False, death="killed"), "nodes", "fault", "is dead: killed"),
    "mute": (lambda: with_second(error="nothing within 20 s"), "nodes", "fault", "does not answer"),
    "late": (lambda: with_second(late=("reading x",)), "nodes", "fault", "hangs on reading x"),
    "open": (lambda: replace(HEALTHY, asks_for_token=False), "authentication", "fault", "dashboard listens at *:8265"),
    "mode": (lambda: with_second(token_exposure="/t has mode 0644"), "token file", "fault", "/t has mode 0644"),
    "loopback": (lambda: with_second(collective=Collective("127.0.0.1", "x")), "network", "fault", "127.0.0.1"),
    "interface": (lambda: with_second(collective=Collective(None, "eth9")), "network", "fault", "by eth9"),
    "closed": (lambda: with_second(unreachable={NAMES[0]: "timed out"}), "network", "fault", "timed out"),
    "late clock": (lambda: with_second(clock=Clock(-2, 0.5)), "clocks", "warning", "2 s behind"),
    "wrong clock": (lambda: with_second(clock=Clock(300, 0.5)), "clocks", "fault", "300 s ahead"),
    "unshared": (unshared, "storage", "fault", "does not show what 10.0.0.1, 10.0.0.3 wrote"),
    "unwritable": (
        lambda: with_second(storage={"/mnt/runs": Storage("OSError: [Errno 28] No space left")}),
        "storage", "fault", "No space left",
    ),
    "unread": (lambda: with_second(inputs={"/mnt/chats.jsonl": Input(None, "gone")}), "inputs", "fault", "gone"),
    "another file": (lambda: with_second(inputs={"/mnt/chats.jsonl": Input(7)}), "inputs", "fault", "7 bytes"),
    "no base": (lambda: with_second(bases={"/mnt/base": Base(None, "not there")}), "base", "fault", "not there"),
    "no spilling": (
        lambda: with_second(disks={"/tmp/ray": Disk(1, 1000 * GIB, 20 * GIB)}), "disk", "fault", "20.0 GiB of",
    ),
    "full": (lambda: with_second(disks={"/mnt/runs": Disk(1, 40 * GIB, 30 * GIB)}), "disk", "fault", "30.0 GiB"),
    "shm": (lambda: with_second(shm_bytes=64 * 2**20), "memory", "warning", "/dev/shm has 64.0 MiB"),
    "small GPU": (lambda: with_second(gpus=(Gpu("H200", "570.1", 8 * GIB),)), "memory", "fault", "8.0 GiB in its"),
    "driver": (lambda: with_second(gpus=(Gpu("H200", "550.9", 140 * GIB),)), "GPUs", "warning", "differ in driver"),
    "type": (lambda: with_second(gpus=(Gpu("L4", "570.1", 24 * GIB),)), "GPUs", "warning", "differ in type"),
    "CPU torch": (
        lambda: with_second(versions=VERSIONS | {"torch": "2.13.0+cpu"}), "GPUs", "fault", "a build for CPUs",
    ),
    "hidden GPUs": (lambda: with_second(resources={"CPU": 8}), "GPUs", "warning", "of which Ray knows none"),
    "compiler": (lambda: with_second(compiler=None), "compiler", "warning", "no C++ compiler"),
    "files": (lambda: with_second(open_files=1024), "open files", "warning", "at most 1024"),
    "port": (lambda: with_second(serve_port="in use"), "port of Serve", "fault", "in use"),
    "their port": (lambda: with_second(serve_port="serve"), "port of Serve", "fault", "another cluster's"),
    "busy": (lambda: replace(HEALTHY, available={"CPU": 24, "GPU": 1}), "resources", "warning", "only 1 GPU free"),
    "too many": (
        lambda: replace(NEEDS, bundles={"train": (Bundle("train.num_workers", {"GPU": 1}, 7),)}),
        "resources", "fault", "1 of train.num_workers find no node with 1 GPU",
    ),
    "too large": (  # six in all, but no node has four
        lambda: replace(NEEDS, bundles={"serve": (Bundle("app", {"GPU": 4}),)}), "resources", "fault", "1 of app",
    ),
    "disk bound": (
        lambda: replace(NEEDS, disk_bytes=600 * GIB, is_disk_bound=True), "disk", "warning", "500.0 GiB",
    ),
    "RAM": (
        lambda: replace(NEEDS, processes=(Process("an actor", 65 * GIB),)), "memory", "fault", "64.0 GiB in this node",
    ),
}  # fmt: skip


def test_a_healthy_cluster_has_no_fault_and_says_what_was_looked_at() -> None:
    findings = judge(HEALTHY, NEEDS)
    assert {finding.level for finding in findings} == {"ok"}
    assert {finding.check for finding in findings} >= {
        "versions",
        "clocks",
        "storage",
        "resources",
        "network",
    }


def test_an_idle_laptop_needs_no_network_and_no_gpu() -> None:
    """One node on loopback, without a token: nobody else reaches it."""
    node = replace(
        well("127.0.0.1"), gpus=(), resources={"CPU": 8}, collective=Collective("127.0.0.1", "its name")
    )
    alone = Cluster((node,), {"GCS": ("127.0.0.1:6379",)}, asks_for_token=False, session="/tmp/ray")
    assert told(alone, Needs()) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_with_what_to_do(name: str) -> None:
    plant, check, level, words = FAULTS[name]
    planted = plant()
    findings = told(planted) if isinstance(planted, Cluster) else told(HEALTHY, planted)
    found = [finding for finding in findings if finding.check == check and words in finding.found]
    assert [finding.level for finding in found] == [level], findings
    assert found[0].expected
    assert found[0].do
    assert found[0].node in ("", NAMES[1], "all nodes", "10.0.0.2")


def test_a_clock_is_as_wrong_as_the_round_trip_leaves_no_doubt_of() -> None:
    """A slow round trip says little: half of it may be either way."""
    assert told(with_second(clock=Clock(5.0, 4.5))) == []


def test_a_missing_resource_is_no_fault_where_the_autoscaler_can_add_it() -> None:
    needs = replace(NEEDS, bundles={"train": (Bundle("train.num_workers", {"GPU": 1}, 8),)})
    growing = replace(HEALTHY, most={"GPU": 16, "CPU": 64})
    assert [finding.level for finding in told(growing, needs)] == ["warning"]
    assert [finding.level for finding in told(replace(HEALTHY, most={"GPU": 7}), needs)] == ["fault"]


def test_a_node_that_an_autoscaler_took_away_is_not_missed() -> None:
    gone = with_second(is_alive=False, is_death_expected=True, death="idle")
    assert not [finding for finding in told(gone, Needs()) if finding.check == "nodes"]


@pytest.mark.parametrize("lets_out", [False, True])
def test_a_node_behind_closed_ports_is_told_once(lets_out: bool) -> None:
    """Nobody reaches it, and where its firewall drops answers too, it reaches nobody; the others are well."""
    first, second, third = HEALTHY.nodes
    nodes = (
        replace(first, unreachable={second.name: "refused"}),
        replace(second, unreachable={} if lets_out else dict.fromkeys((first.name, third.name), "timed out")),
        replace(third, unreachable={second.name: "refused"}),
    )
    assert [finding.node for finding in told(replace(HEALTHY, nodes=nodes))] == [second.name]


def test_a_node_that_was_started_again_is_no_fault() -> None:
    """Ray lists a dead node for as long as its head lives."""
    before = replace(HEALTHY.nodes[1], name="10.0.0.2/1ab2c3", is_alive=False, death="killed")
    assert [finding.level for finding in told(replace(HEALTHY, nodes=(*HEALTHY.nodes, before)))] == [
        "warning"
    ]


def test_what_all_nodes_lack_is_told_once() -> None:
    cluster = replace(HEALTHY, nodes=tuple(replace(node, open_files=1024) for node in HEALTHY.nodes))
    assert [finding.node for finding in told(cluster)] == ["all nodes"]


def test_serve_on_its_own_port_is_no_fault() -> None:
    assert told(replace(with_second(serve_port="serve"), has_serve=True)) == []


def test_bundles_are_placed_so_that_whole_gpus_stay_together() -> None:
    """Small ones first would take one GPU of each node, and leave no place for the large one."""
    nodes = [{"GPU": 2.0}, {"GPU": 2.0}]
    small, large = Bundle("small", {"GPU": 1}, 2), Bundle("large", {"GPU": 2})
    assert unplaced([small, large], nodes) == []
    assert unplaced([small, replace(large, count=2)], nodes) == [replace(small, count=2)]
    assert nodes == [{"GPU": 2.0}, {"GPU": 2.0}]


def test_the_table_fits_80_columns_and_hides_nothing() -> None:
    findings = judge(with_second(versions=VERSIONS | {"ray": "2.59.0"}), NEEDS)
    shown = io.StringIO()
    show(doctor.diagnosis(findings, HEALTHY, time.monotonic()), Console(file=shown))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "ray 2.59.0" in shown.getvalue()
    assert lines[-1].startswith("not fit: 1 fault(s), 0 warning(s), 3 node(s)")


# ------------------------------------------------------------------------------------------------------ probing


def test_a_token_is_exposed_only_where_others_can_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mode of 0644 in a folder that nobody else may enter, such as Ray's own in /root, is none."""
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o755)
    token = folder / "token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    for parent in token.parents:
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o001:
            monkeypatch.setattr(Path, "parents", property(lambda path: [folder]))  # what is above is not ours
            break
    assert probe.token_exposure() == f"{token} has mode 0644"
    folder.chmod(0o700)
    assert probe.token_exposure() is None
    folder.chmod(0o755)
    token.chmod(0o600)
    assert probe.token_exposure() is None


def test_where_a_port_listens_is_read_from_the_kernel() -> None:
    with socket.create_server(("127.0.0.1", 0)) as near, socket.create_server(("", 0)) as far:
        ports = [listener.getsockname()[1] for listener in (near, far)]
        assert list(probe.listening(ports).values()) == [["127.0.0.1"], ["*"]]


def test_storage_that_is_tried_is_left_as_it_was(tmp_path: Path) -> None:
    first, second = probe.Probe("first"), probe.Probe("10.0.0.2/a:b")
    place = first.existing(str(tmp_path / "not" / "there" / "yet"))
    assert place == str(tmp_path)
    assert [one.write(place, "run") for one in (first, second)] == [None, None]
    assert first.seen(place, "run", ["first", "10.0.0.2/a:b"]) == {
        "nodes": ["10.0.0.2/a:b", "first"],
        "error": None,
    }
    for one in (first, second):
        one.clean(place, "run")
    assert list(tmp_path.iterdir()) == []
    assert "is not there" in str(first.write(str(tmp_path / "not"), "run"))


def test_a_base_is_found_in_a_folder_and_missed_elsewhere(tiny_base: Path) -> None:
    here = probe.Probe("here")
    assert here.base(str(tiny_base), None) == {"how": "folder", "error": None}
    assert here.base("/no/such/base", None) == {"how": None, "error": "/no/such/base is not there"}
    assert "HF_HUB_OFFLINE" in str(here.base("nobody/such-a-base", None)["error"])


def test_nodes_connect_to_those_that_listen_and_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = probe.Probe("there")
    port = listener.listen()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    targets = [("there", "127.0.0.1", port), ("nowhere", "127.0.0.1", free), ("me", "127.0.0.1", port)]
    reached = probe.Probe("me").connect(targets, 2.0)
    assert reached.keys() == {"there", "nowhere"}
    assert reached["there"] is None
    assert "ConnectionRefused" in str(reached["nowhere"])


# -------------------------------------------------------------------------------------------------------- files


def run_of(tmp_path: Path, **sections: Any) -> config.RunConfig:
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 30
    )
    raw = {"output": str(tmp_path / "run"), "model": {"base": "b"}, "data": {"train": str(chats)}, **sections}
    return config.parse(config.RunConfig, raw, "run.yaml")


def test_a_run_asks_for_what_its_largest_stage_holds(tmp_path: Path) -> None:
    from medusa_ray.doctor import needs

    run = run_of(
        tmp_path, train={"num_workers": 3}, distill={"num_actors": "2-8"}, hidden={"mode": "compute"}
    )
    on_cpu, on_gpu = needs.of(run, "run.yaml", False), needs.of(run, "run.yaml", True)
    assert on_cpu.bundles["train"] == (Bundle("train.num_workers", {"CPU": 1}, 3),)
    assert on_gpu.bundles["distill"] == (Bundle("distill.num_actors", {"CPU": 1, "GPU": 1}, 2),)
    run = run_of(tmp_path, train={"num_workers": "2-8", "accelerator_type": "H100"}, hidden={"mode": "compute"})
    on_h100 = {"CPU": 1, "GPU": 1, "accelerator_type:H100": 0.001}
    assert needs.of(run, "run.yaml", True).bundles["train"] == (Bundle("train.num_workers", on_h100, 2),)
    assert (on_cpu.compiles, on_gpu.compiles) == (True, False)
    assert on_cpu.writes == (str(tmp_path / "run"),)
    assert on_cpu.inputs == (str(tmp_path / "chats.jsonl"),)


def test_a_run_of_an_unknown_base_says_that_its_memory_is_unknown(tmp_path: Path) -> None:
    from medusa_ray.doctor import needs

    run = run_of(tmp_path)
    asked = needs.measured(run, needs.of(run, "run.yaml", False), False)
    assert [finding.level for finding in told(HEALTHY, asked) if finding.check == "file"] == ["warning"]


def test_a_runs_disk_is_what_its_states_take(tmp_path: Path, tiny_base: Path) -> None:
    from medusa_ray.doctor import needs

    run = run_of(
        tmp_path, model={"base": str(tiny_base), "dtype": "float32"}, distill={"max_new_tokens": 100}
    )
    asked = needs.measured(run, needs.of(run, "run.yaml", False), False)
    assert asked.disk_bytes is not None
    assert asked.disk_bytes > 30 * 99 * 32 * 4  # a state of 32 numbers for each token but one of each reply
    assert asked.is_disk_bound


def test_a_serve_file_asks_for_its_fewest_replicas_and_all_their_shards() -> None:
    from medusa_ray.doctor import needs

    model = {"model_id": "m", "base": "b", "device": "cuda", "tensor_parallel": 2}
    app = {"name": "a", "args": model, "deployments": [{"name": "Engine", "num_replicas": 3}]}
    other = {"name": "r", "route_prefix": "/r", "import_path": "medusa_ray.serve:build_resilient_app"}
    other |= {"args": {"models": [{"model_id": "n", "base": "b", "device": "cpu"}]}}
    other |= {"deployments": [{"name": "n", "autoscaling_config": {"min_replicas": 0, "max_replicas": 4}}]}
    serve = config.parse(config.ServeConfig, {"applications": [app, other]}, "serve.yaml")
    asked = needs.of(serve, "serve.yaml", True)
    shard = Bundle("a/Engine", {"CPU": 1, "GPU": 1}, 3)
    assert asked.bundles["serve"] == (shard, shard, Bundle("r/Router", {"CPU": 1}))
    assert (asked.http, asked.wants_gpu) == (("127.0.0.1", 8000), True)


def test_only_run_and_serve_files_are_examined(tmp_path: Path) -> None:
    traffic = tmp_path / "traffic.yaml"
    traffic.write_text("output: o\nprompts: p\ntargets: {a: {url: 'http://x', model: m}}\n")
    with pytest.raises(config.UserError, match="expected was a run or serve file"):
        doctor.read(str(traffic))


def test_no_cluster_is_the_users_mistake_and_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(config.UserError, match="no Ray cluster answers"):
        doctor.run(None, address=f"127.0.0.1:{port}", timeout_s=3)
    with pytest.raises(config.UserError, match="medusa-ray submit --address http://x:8265 -- doctor"):
        doctor.run(None, address="http://x:8265")
    with pytest.raises(config.UserError, match="a Ray client's address"):
        doctor.run(None, address="ray://x:10001")


def test_an_address_that_takes_connections_and_answers_none_does_not_hang() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        started_s = time.monotonic()
        with pytest.raises(config.UserError, match="no Ray cluster answers"):
            doctor.run(None, address=f"127.0.0.1:{mute.getsockname()[1]}", timeout_s=2)
    assert time.monotonic() - started_s < 8


@pytest.mark.ray
def test_the_tests_own_cluster_is_fit_for_a_small_run(
    ray_cluster: None, tiny_base: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path, model={"base": str(tiny_base), "dtype": "float32", "device": "cpu"})
    known, asked = doctor.examine(run, "run.yaml", doctor.Door("", asks_for_token=False), 20)
    assert [finding for finding in judge(known, asked) if finding.level == "fault"] == []
    storage = known.nodes[0].storage[str(tmp_path / "run")]
    assert storage.seen == {known.nodes[0].name}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl"]


def test_a_base_at_a_uri_is_looked_for_there(tmp_path: Path) -> None:
    """Not on the hub, which knows no such name."""
    from medusa_ray.doctor import probe

    (tmp_path / "config.json").write_text("{}")
    assert probe.base(tmp_path.as_uri(), None) == {"how": "URI", "error": None}
    missing = f"{tmp_path.as_uri()}/other"
    assert probe.base(missing, None) == {"how": None, "error": f"there is no config.json at {missing}"}
