"""The address by which Ray knows a node -> the network interface at which its gloo and NCCL listen.

Left alone, gloo takes the interface that the host's name resolves to, often loopback, which no other node reaches, and
NCCL the first that it likes, which may be a container's bridge.
"""

import os
import socket

import psutil
import ray.util


def choose() -> None:
    """Has gloo and NCCL in this process use the interface of its node's address, unless the environment says which.

    Call it before processes meet. Nothing is chosen where no interface has that address, as behind a translation of
    addresses.
    """
    if name := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # else eth1 stands for eth10 too


def interface_of(address: str) -> str | None:
    """The name of this machine's interface that has the address; None when there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        # An IPv6 address may come with its zone, fe80::1%eth0.
        if any(found.address.partition("%")[0] == address for found in addresses):
            return name
    return None


def listener(address: str) -> socket.socket:
    """A socket that listens at a free port of this address, and of no other."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.bind((address, 0))
    found.listen(socket.SOMAXCONN)
    return found
