"""The processes that share a replica's base: the replica leads, and Ray actors in its placement group follow."""

import logging
import os
import threading

import ray
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from medusa_ray import interfaces
from medusa_ray.config import EngineConfig
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.sharded import Shards, follow
from medusa_ray.serve.server import device_of

log = logging.getLogger("medusa_ray")


@ray.remote
class Follower:
    """One process with a shard. It ends with its leader, to whom its actor belongs, and with any failure."""

    def follow(self, args: EngineConfig, host: str, port: int, rank: int) -> None:
        try:
            if args.threads:
                torch.set_num_threads(args.threads)
            interfaces.choose()
            shards = Shards.join(dist.TCPStore(host, port), rank, args.tensor_parallel)
            dtype = getattr(torch, args.dtype)
            backbone = Backbone.load(args.base, dtype, device_of(args), num_shards=shards.num)
            follow(backbone, shards)
        except Exception:
            log.exception("shard %d has failed", rank)
        finally:
            os._exit(1)  # others see the end of its connections, and wait no longer


def store_at(host: str) -> dist.TCPStore:
    """Where processes meet; torch's own would listen at every interface, and takes orders from whoever connects."""
    socket = interfaces.listener(host)
    port = socket.getsockname()[1]
    fd = socket.detach()  # the store's from here on, which closes it
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=fd)


class Followers:
    """The other shards of the process that makes them."""

    def __init__(self, args: EngineConfig) -> None:
        """Called in a replica, whose placement group has a bundle for each shard, its own first."""
        group = ray.util.get_current_placement_group()
        if group is None or len(group.bundle_specs) != args.tensor_parallel:
            bundles = group.bundle_specs if group else None
            raise ValueError(
                f"tensor_parallel is {args.tensor_parallel}, but the replica's placement_group_bundles are {bundles}; "
                "give one for each shard, or leave them out."
            )
        host = ray.util.get_node_ip_address()
        interfaces.choose()
        store = store_at(host)
        self._actors, self._ends = [], []
        for rank, bundle in list(enumerate(group.bundle_specs))[1:]:
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            options = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0)}
            actor = Follower.options(**options, scheduling_strategy=place).remote()  # type: ignore[attr-defined]
            self._actors.append(actor)
            self._ends.append(actor.follow.remote(args, host, store.port, rank))
        self.shards = Shards.join(store, 0, args.tensor_parallel)

    def watch(self, engine: Engine) -> None:
        """Fails the engine as soon as a follower ends; one that has no requests would not notice."""

        def wait() -> None:
            ray.wait(self._ends)
            engine.failure = engine.failure or RuntimeError("a process with a shard of the base has ended")

        threading.Thread(target=wait, name="medusa-shards", daemon=True).start()
