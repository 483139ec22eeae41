"""An address -> whether Ray answers there, and whether it asks for a token and takes that of this machine.

With a wrong token `ray.init` tries for twenty seconds, and then says that there is no cluster; one that accepts
connections and answers none holds it up for longer.
"""

import os
from dataclasses import dataclass

import grpc
from ray._private.services import canonicalize_bootstrap_address_or_die

from medusa_ray.config import UserError
from medusa_ray.doctor.probe import token_file

CALL = "/ray.rpc.NodeInfoGcsService/GetClusterId"  # what every driver asks first


@dataclass(frozen=True)
class Door:
    """asks_for_token is None where that cannot be told, as over TLS."""

    address: str
    asks_for_token: bool | None
    refusal: str | None = None  # why this machine is not let in


def knock(address: str, timeout_s: float) -> Door:
    """address: as RAY_ADDRESS. Raises UserError when nothing answers there."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
        return Door(address, None)
    try:
        address = canonicalize_bootstrap_address_or_die(address)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"no Ray cluster was found: {error} Start one, or name it by --address.") from error
    with grpc.insecure_channel(address) as channel:
        if _is_taken(channel, address, None, timeout_s):
            return Door(address, asks_for_token=False)
        mode = os.environ.get("RAY_AUTH_MODE", "token").lower()
        if mode == "disabled":
            return Door(
                address, True, "Ray asks for a token, and RAY_AUTH_MODE=disabled keeps from sending one"
            )
        if mode != "token":  # as Kubernetes has them, which Ray's own client knows how to get
            return Door(address, True)
        token = _token()
        if token is None:
            return Door(address, True, f"Ray asks for a token, and there is none at {token_file()}")
        is_taken = _is_taken(channel, address, token, timeout_s)
        return Door(address, True, None if is_taken else "Ray refuses the token of this machine")


def _is_taken(channel: grpc.Channel, address: str, token: str | None, timeout_s: float) -> bool:
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    try:
        channel.unary_unary(CALL)(b"", timeout=timeout_s, metadata=metadata)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return False
        raise UserError(
            f"no Ray cluster answers at {address}: {error.code().name}, {error.details()}. Start it, or name another "
            "one by --address."
        ) from error
    return True


def _token() -> str | None:
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    try:
        return token_file().read_text().strip()
    except OSError:
        return None
