"""A running cluster, and a file that is meant for it -> whether it is fit for that, and what to do where it is not.

`gather` asks the nodes by means of `probe`, `needs` reads the file, and `judge` compares, asking nobody. Nothing is
changed: the files that try storage are removed again.
"""

import os
import time
from dataclasses import replace
from functools import partial
from typing import Any

from medusa_ray import config
from medusa_ray.cli.cluster import cluster
from medusa_ray.config import RunConfig, ServeConfig, UserError
from medusa_ray.doctor.door import Door, knock
from medusa_ray.doctor.facts import Cluster, Needs, plain
from medusa_ray.doctor.judge import DRIVER, Finding, judge

SCHEMA_VERSION = 1


def run(
    file: str | None, overrides: tuple[str, ...] = (), address: str | None = None, timeout_s: float = 20
) -> dict[str, Any]:
    """The diagnosis, as JSON has it: `is_fit`, `findings` with the worst first, `nodes` with what is known of them.

    address: as RAY_ADDRESS, which it replaces; without either, a cluster that runs on this machine. timeout_s: for each
    answer of a node. Raises UserError when there is no cluster, or the file is none.
    """
    started_s = time.monotonic()
    wanted = read(file, overrides) if file else None
    found = knock(_address(address or os.environ.get("RAY_ADDRESS") or "auto"), timeout_s)
    if found.refusal:
        return diagnosis([_not_let_in(found.refusal)], None, started_s)
    os.environ["RAY_ADDRESS"] = found.address
    try:
        with cluster():
            known, needs = examine(wanted, file, found, timeout_s)
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        return diagnosis([_other_versions(error)], None, started_s)
    return diagnosis(judge(known, needs), known, started_s)


def read(file: str, overrides: tuple[str, ...] = ()) -> RunConfig | ServeConfig:
    """The run or serve file, that of a RayService among them. Raises UserError for any other."""
    raw = config.read(file)
    found = config.load(RunConfig, file, overrides) if overrides else config.parse_any(raw, file)
    if not isinstance(found, RunConfig | ServeConfig):
        raise UserError(f"{file} is a {type(found).__name__}; expected was a run or serve file.")
    return found


def examine(
    wanted: RunConfig | ServeConfig | None, file: str | None, found: Door, timeout_s: float
) -> tuple[Cluster, Needs]:
    """What is known of the cluster, Ray being initialised, and what the file needs."""
    from medusa_ray.doctor import gather
    from medusa_ray.doctor import needs as reading

    if wanted is None or file is None:
        return gather.cluster(Needs(), found.asks_for_token, timeout_s), Needs()
    has_gpu = gather.has_gpu()
    try:
        asked = gather.within(timeout_s, partial(reading.of, wanted, file, has_gpu))
    except TimeoutError as error:
        raise UserError(
            f"{file}: its chats or base cannot be looked up from here: {error}. Raise --timeout."
        ) from error
    if isinstance(wanted, RunConfig):
        try:
            asked = gather.within(timeout_s, partial(reading.measured, wanted, asked, has_gpu))
        except TimeoutError as error:
            asked = replace(
                asked, unknown=(f"memory and disk are unknown: {error} of the chats or the base",)
            )
    return gather.cluster(asked, found.asks_for_token, timeout_s), asked


def diagnosis(findings: list[Finding], known: Cluster | None, started_s: float) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "is_fit": all(finding.level != "fault" for finding in findings),
        "findings": [plain(finding) for finding in findings],
        "nodes": plain(known.nodes) if known else [],
        "seconds": round(time.monotonic() - started_s, 1),
    }


def _address(address: str) -> str:
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{address} is where the jobs API listens; expected was an address of Ray, such as HOST:6379 or auto. From "
            f"outside the cluster: medusa-ray submit --address {address} -- doctor"
        )
    if address.startswith("ray://"):
        raise UserError(
            f"{address} is a Ray client's address, by which the nodes cannot be looked at; expected was HOST:6379 or "
            "auto, on a machine of the cluster."
        )
    return address


def _not_let_in(refusal: str) -> Finding:
    return Finding(
        "authentication", "fault", refusal, "the token of the cluster",
        "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a copy of the head's",
        DRIVER,
    )  # fmt: skip


def _other_versions(error: Exception) -> Finding:
    lines = " ".join(line.strip() for line in str(error).splitlines())
    return Finding(
        "versions",
        "fault",
        lines,
        "the same Ray and Python on all machines",
        "install them on this one",
        DRIVER,
    )
