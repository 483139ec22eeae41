"""A verb -> a Ray job that runs it on a cluster, by Ray's own job API; and jobs followed, stopped and listed.

Whatever is wrong with the verb is said here, before anything is sent, as far as this machine can tell.
"""

import asyncio
import logging
import os
import secrets
import shlex
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import typer

import medusa_ray
from medusa_ray import config, parts, provenance
from medusa_ray.cli import SENT_BY, app
from medusa_ray.config import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

FILES: dict[str, type[config.Strict]] = {
    "run_yaml": config.RunConfig,
    "serve_yaml": config.ServeConfig,
    "traffic_yaml": config.TrafficConfig,
}
# Seconds that Ray gives a job between SIGTERM and SIGKILL; its own 3 are too few for training to save.
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
CONNECT_S = 5.0
RECONNECT_S = 60.0
NOT_HERE = ("submit", "jobs")
ENTRYPOINT = "python -m medusa_ray.cli"


# ------------------------------------------------------------------------------------------------- the verb


class Verb:
    """The words after `--`, parsed as the command line here would parse them. Nothing of it runs."""

    def __init__(self, words: Sequence[str]) -> None:
        """Raises UserError for what is no verb that a job can run; typer's own errors for its arguments."""
        group: Any = typer.main.get_command(app)
        if not words or words[0] not in group.commands or words[0] in NOT_HERE:
            verbs = ", ".join(name for name in group.commands if name not in NOT_HERE)
            raise UserError(
                f"submit got {shlex.join(words) or 'no verb'}; expected was `--` and a verb with its arguments, one of "
                f"{verbs}."
            )
        self.words = list(words)
        self.params: dict[str, Any] = (
            group.commands[words[0]].make_context(f"medusa-ray {words[0]}", list(words[1:])).params
        )

    @property
    def file(self) -> tuple[str, type[config.Strict]] | None:
        """The YAML file that the verb reads, and what it holds."""
        return next(((self.params[name], kind) for name, kind in FILES.items() if name in self.params), None)

    def reads_here(self) -> bool:
        """Whether it names a file or folder below the one that this command runs in."""
        named = [
            word for value in self.params.values() for word in (value if isinstance(value, list) else [value])
        ]
        return any(isinstance(word, str) and is_relative(word) and Path(word).exists() for word in named)

    def outputs(self, checked: config.Strict | None) -> Iterator[tuple[str, str]]:
        """What it writes to, by name: a folder, a file or a URI."""
        if isinstance(checked, config.RunConfig | config.TrafficConfig) and self.words[0] != "plan":
            yield "output", checked.output
        if self.params.get("out") is not None:
            yield "out", str(self.params["out"])
        if self.words[0] == "report":
            yield "the folder of the run", self.params["words"][-1]
        if self.words[0] == "pull":
            yield "FOLDER", self.params["folder"]

    def check(self, working_dir: str | None) -> config.Strict | None:
        """The checked values of its file, where this machine has it; a relative one is found as the job finds it.

        Raises UserError for what no cluster would take either, and for what would be lost with the job.
        """
        checked = None
        name, kind = self.file or ("", config.Strict)
        folder = working_dir or "."
        if name and is_relative(name):
            if not is_local(folder):
                name = ""  # in a package that only the cluster opens
            elif not (Path(folder) / name).is_file():
                raise UserError(
                    f"{name} is not in {Path(folder).resolve()}, which the job starts in. Name a file that is there, "
                    "or a URI, or give its folder with --working-dir."
                )
            else:
                name = str(Path(folder) / name)
        if name and Path(name).is_file():  # a URI may be one that only the cluster reaches
            checked = config.load(kind, name, self.params.get("overrides") or ())
        for what, uri in self.outputs(checked):
            if is_relative(uri):
                raise UserError(
                    f"{what} is {uri!r}, a place in the job's own working directory, which goes with the job. Name "
                    "a URI such as s3://BUCKET/RUN, or an absolute path that all nodes share."
                )
        return checked


def is_relative(uri: str) -> bool:
    return "://" not in uri and not os.path.isabs(uri)


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith(("file://", "local://"))


# ------------------------------------------------------------------------------------------- its environment


def environment(
    runtime_env: str | None,
    variables: Sequence[str],
    working_dir: str | None,
    sends_code: bool,
    reads_here: bool,
) -> dict[str, Any]:
    """Ray's runtime environment of the job.

    runtime_env: a file of YAML or JSON. variables: KEY=VALUE, or KEY for the value that it has here. sends_code: this
    medusa_ray goes with the job, and is used there instead of the one installed. reads_here: the folder that this
    command runs in is sent where nothing names another. Raises UserError.
    """
    raw = config.read(runtime_env) if runtime_env else {}
    folders: dict[str, Any] = {key: raw.pop(key) for key in ("working_dir", "py_modules") if key in raw}
    found: dict[str, Any] = config.parse(config.RuntimeEnv, raw, str(runtime_env)).model_dump(
        exclude_unset=True
    )
    found |= folders
    if working_dir is not None:
        found["working_dir"] = working_dir
    elif reads_here:
        found.setdefault("working_dir", ".")
    folder = found.get("working_dir")
    if folder is not None and "://" not in folder:
        if not Path(folder).exists():
            raise UserError(
                f"the working directory {folder} is not there. Name a folder of this machine, or a URI."
            )
        found["excludes"] = [*(found.get("excludes") or []), *artifacts_in(Path(folder))]
    given = STOP_WAIT | (found.get("env_vars") or {})
    for variable in variables:
        key, equals, value = variable.partition("=")
        if not key or (not equals and key not in os.environ):
            raise UserError(
                f"--env got {variable!r}; expected KEY=VALUE, or the KEY of a variable that is set here."
            )
        given[key] = value if equals else os.environ[key]
    if sends_code:
        found["py_modules"] = [*(found.get("py_modules") or []), str(Path(medusa_ray.__file__).parent)]
    elif version := provenance.versions().get("medusa_ray"):
        given[SENT_BY] = version
    return found | {"env_vars": given}


def artifacts_in(folder: Path) -> list[str]:
    """Rows and checkpoints of runs in a folder, which are large and are no part of a program."""
    marks = [*folder.rglob(parts.MARK), *folder.rglob("training/run.json")]
    return sorted({f"/{mark.parent.relative_to(folder)}/" for mark in marks if mark.parent != folder})


def check_sender() -> None:
    """In a job: raises UserError where another version of medusa_ray has sent it."""
    sent_by, here = os.environ[SENT_BY], provenance.versions().get("medusa_ray")
    if here and here != sent_by:
        raise UserError(
            f"the job was sent by medusa_ray {sent_by}, but the cluster has {here}. Install the same on both, or "
            "submit with --send-code."
        )


# ----------------------------------------------------------------------------------------------- the cluster


def connect(address: str | None) -> "JobSubmissionClient":
    """A client of the cluster's job server: at the address, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else here.

    The token is RAY_AUTH_TOKEN's, RAY_AUTH_TOKEN_PATH's or ~/.ray/auth_token's. Raises UserError, within seconds, when
    no cluster answers or it does not take the token.
    """
    where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if where:
        where = _found_at(where)
        os.environ["RAY_API_SERVER_ADDRESS"] = where  # over the argument below, Ray lets the variable win
    from ray.exceptions import AuthenticationError, RpcError
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # uploads, and that .git stays behind
    try:
        return JobSubmissionClient(where)
    except AuthenticationError as error:
        raise _not_let_in(where, error) from error
    except (RpcError, RuntimeError, ValueError, OSError) as error:
        raise _no_cluster(where, error) from error


def _found_at(where: str) -> str:
    """The address as Ray takes it: HOST:PORT may be that of the dashboard or of Ray itself.

    Raises UserError where nobody listens, for which Ray would wait for minutes.
    """
    split = urlsplit(where if "://" in where else f"//{where}")
    try:
        port = split.port or {"https": 443, "http": 80, "ray": 10001}.get(split.scheme)
        if split.hostname and port:
            socket.create_connection((split.hostname, port), timeout=CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(where, error) from error
    if split.scheme or not port:
        return where
    try:
        urllib.request.urlopen(f"http://{where}/api/version", timeout=CONNECT_S).close()
    except urllib.error.HTTPError:  # it wants a token
        pass
    except (OSError, HTTPException):
        return where
    return f"http://{where}"


def _no_cluster(where: str | None, error: Exception) -> UserError:
    reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
    return UserError(
        f"no Ray cluster takes jobs at {where or 'this machine'}: {reason}. Give its dashboard with --address "
        "http://HEAD:8265 or RAY_API_SERVER_ADDRESS; `kubectl port-forward` brings one out of Kubernetes."
    )


def _not_let_in(where: str | None, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0].partition(". ")[0]
    return UserError(
        f"the cluster at {where or 'this machine'} does not let this command in: {reason}. Set RAY_AUTH_MODE=token and "
        "RAY_AUTH_TOKEN_PATH, a file with the cluster's token, or RAY_AUTH_TOKEN."
    )


@contextmanager
def told(client: "JobSubmissionClient") -> Iterator[None]:
    """What the cluster refuses is the user's to mend."""
    from ray.exceptions import AuthenticationError
    from ray.util.state.exception import RayStateApiException

    try:
        yield
    except AuthenticationError as error:
        raise _not_let_in(client.get_address(), error) from error
    except (RuntimeError, OSError, RayStateApiException) as error:
        raise UserError(
            f"the cluster at {client.get_address()} refused: {_last_line(str(error)) or repr(error)}"
        ) from error


def _last_line(said: str) -> str:
    """Ray puts the server's traceback into its message; the last line says what is wrong."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else ""


# ------------------------------------------------------------------------------------------------------ jobs


def submit(client: "JobSubmissionClient", verb: Verb, runtime_env: dict[str, Any], job_id: str | None) -> str:
    """Sends the verb, with its working directory, and returns the job's id."""
    from ray.exceptions import AuthenticationError

    job_id = job_id or f"{verb.words[0]}-{secrets.token_hex(4)}"
    entrypoint = f"{ENTRYPOINT} {shlex.join(verb.words)}"
    try:
        return client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime_env)
    except KeyboardInterrupt:
        print(f"\nmedusa-ray: the job {job_id} may be sent; `medusa-ray jobs list` says.", file=sys.stderr)
        raise
    except AuthenticationError as error:
        raise _not_let_in(client.get_address(), error) from error
    except (RuntimeError, ValueError, OSError) as error:
        raise _refused(str(error), runtime_env.get("working_dir"), job_id) from error


def _refused(said: str, working_dir: str | None, job_id: str) -> UserError:
    if "already exists" in said:
        return UserError(f"the cluster has a job {job_id} already. Choose another --job-id, or leave it out.")
    if "exceeds the maximum size" in said or "status code 413" in said:
        large = ", ".join(
            f"{name} ({size / 2**20:.0f} MiB)" for name, size in largest_in(Path(working_dir or "."))
        )
        return UserError(
            f"the working directory {working_dir} is more than Ray takes; the largest in it are {large}. List what the "
            "job does not need in .gitignore or .rayignore, or give a smaller folder with --working-dir; data goes to "
            "storage that every node reaches."
        )
    return UserError(f"the cluster did not take the job: {_last_line(said) or 'it does not say why'}")


def largest_in(folder: Path, count: int = 3) -> list[tuple[str, int]]:
    """Names and bytes of the largest entries of a folder."""
    sizes = {
        entry.name: sum(
            file.stat().st_size
            for file in ([entry] if entry.is_file() else entry.rglob("*"))
            if file.is_file()
        )
        for entry in folder.iterdir()
    }
    return sorted(sizes.items(), key=lambda item: -item[1])[:count]


def has_several_nodes(client: "JobSubmissionClient") -> bool:
    from ray.util.state import list_nodes

    with told(client):
        return sum(node.state == "ALIVE" for node in list_nodes(client.get_address())) > 1


def follow(client: "JobSubmissionClient", job_id: str) -> int:
    """Prints the job's log until its end and returns its exit code. Ctrl-C ends the following, not the job."""
    rest = f"{job_id} --address {client.get_address()}"
    try:
        asyncio.run(_relay(client, job_id))
    except KeyboardInterrupt:
        print(
            f"\nmedusa-ray: the job {job_id} goes on. `medusa-ray jobs follow {rest}` follows it again, `medusa-ray "
            f"jobs stop {rest}` stops it.",
            file=sys.stderr,
        )
        return 128 + signal.SIGINT
    except ConnectionError as error:
        print(
            f"medusa-ray: the cluster does not answer: {error}. `medusa-ray jobs follow {rest}` follows the job again.",
            file=sys.stderr,
        )
        return 1
    with told(client):
        return exit_code(client.get_job_info(job_id))


async def _relay(client: "JobSubmissionClient", job_id: str) -> None:
    """The log as it grows, once, though connections may break. Raises ConnectionError after RECONNECT_S without one."""
    from aiohttp import ClientError

    shown, lost_s = 0, None
    with told(client):
        client.get_job_info(job_id)
    while True:
        began_s, position = time.monotonic(), 0
        try:
            async for text in client.tail_job_logs(job_id):
                position += len(text)
                if position > shown:
                    print(text[len(text) - min(len(text), position - shown) :], end="", flush=True)
                    shown = position
            if client.get_job_status(job_id) in ENDED:
                return
        except (ClientError, RuntimeError, OSError) as error:
            now_s = time.monotonic()
            if lost_s is None or now_s - began_s > RECONNECT_S:  # it was there until now
                lost_s = now_s
            if now_s - lost_s > RECONNECT_S:
                raise ConnectionError(str(error)) from error
        await asyncio.sleep(1)


def exit_code(job: "JobDetails") -> int:
    """What the verb would have ended with here; what Ray says of a job that its own failure ended goes to stderr."""
    code = job.driver_exit_code
    if job.status == "STOPPED":
        print(f"medusa-ray: the job {job.submission_id} was stopped.", file=sys.stderr)
        return 128 + signal.SIGTERM
    if code is None:
        print(f"medusa-ray: the job {job.submission_id} failed: {job.message}", file=sys.stderr)
        return 1
    if code and "No module named 'medusa_ray'" in (job.message or ""):
        raise UserError(
            "the cluster has no medusa_ray. Start it from an image that has (serve_configs/Containerfile), or submit "
            "with --send-code where only this package is missing."
        )
    return code if code >= 0 else 128 - code


def stop(client: "JobSubmissionClient", job_id: str) -> str:
    """Stops a job, which has two minutes to save what it has, and returns its status then."""
    with told(client):
        client.stop_job(job_id)
        while (status := client.get_job_status(job_id)) not in ENDED:
            time.sleep(0.5)
    return str(status.value)


def rows(client: "JobSubmissionClient") -> list[list[str]]:
    """Of the jobs that were submitted, the newest last: id, status, when it started, seconds, exit code, verb."""
    with told(client):
        jobs = [job for job in client.list_jobs() if job.submission_id]
    return [
        [
            str(job.submission_id),
            str(job.status.value),
            f"{datetime.fromtimestamp((job.start_time or 0) / 1000, UTC):%Y-%m-%d %H:%M:%S}",
            f"{((job.end_time or time.time() * 1000) - (job.start_time or 0)) / 1000:.0f}",
            "" if job.driver_exit_code is None else str(job.driver_exit_code),
            job.entrypoint.removeprefix(f"{ENTRYPOINT} "),
        ]
        for job in sorted(jobs, key=lambda job: job.start_time or 0)
    ]
