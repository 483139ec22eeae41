"""Processes of several nodes meet at the interface by which Ray knows their node."""

import os
import socket
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from medusa_ray import interfaces
from medusa_ray.serve.shards import store_at
from medusa_ray.train.meeting import Meeting

NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Ray knows it by 10.0.0.7, which is at its second interface; a bridge of containers comes first."""
    found = {
        "docker0": ["172.17.0.1"],
        "lo": ["127.0.0.1", "::1"],
        "eth1": ["02:42:ac", "10.0.0.7", "fe80::7%eth1"],
    }
    listed = {name: [SimpleNamespace(address=one) for one in some] for name, some in found.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: listed)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is as it was, afterwards
        monkeypatch.delenv(name)
    return monkeypatch


def test_the_interface_is_the_one_with_the_nodes_address(machine: pytest.MonkeyPatch) -> None:
    interfaces.choose()
    assert [os.environ[name] for name in NAMES] == ["eth1", "=eth1"]
    assert interfaces.interface_of("fe80::7") == "eth1"


def test_what_the_user_has_set_stays(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("NCCL_SOCKET_IFNAME", "ib0,ib1")
    interfaces.choose()
    assert [os.environ[name] for name in NAMES] == ["eth1", "ib0,ib1"]


def test_an_address_that_no_interface_has_chooses_none(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(ray.util, "get_node_ip_address", lambda: "203.0.113.9")
    interfaces.choose()
    assert not set(NAMES) & os.environ.keys()


def test_shards_of_a_base_meet_at_the_nodes_address_alone() -> None:
    """At every interface, whoever reaches the machine could take part."""
    store = store_at("127.0.0.2")  # loopback has a whole network of addresses
    sockets = psutil.Process().net_connections("tcp")
    assert [s.laddr.ip for s in sockets if s.laddr.port == store.port and s.status == "LISTEN"] == [
        "127.0.0.2"
    ]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", store.port), timeout=5)
    store.set("key", "value")
    assert store.get("key") == b"value"


@pytest.mark.ray
def test_training_workers_meet_at_the_interface_of_their_node(ray_cluster: None) -> None:
    def report(config: dict[str, Any]) -> dict[str, str]:
        return {name: os.environ.get(name, "") for name in config["names"]}

    loop: Any = report
    trainer = TorchTrainer(
        loop,
        train_loop_config={"names": NAMES},
        torch_config=Meeting(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
    )
    result: Any = trainer.fit()
    (node,) = ray.nodes()
    expected = interfaces.interface_of(node["NodeManagerAddress"])
    assert expected
    assert result.return_value == dict(zip(NAMES, [expected, f"={expected}"], strict=True))
