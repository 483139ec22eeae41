"""How training workers meet: Ray Train's way, at the network interface of each worker's node."""

from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from medusa_ray import interfaces


class Meeting(TorchConfig):
    @property
    def backend_cls(self) -> type["InterfacesFirst"]:
        return InterfacesFirst


# Ray has no other place between the start of a worker, which tells its node, and the meeting. Its name is private:
# drop this when TorchConfig has one.
class InterfacesFirst(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(interfaces.choose)
        super().on_start(worker_group, backend_config)
