"""Verbs as jobs: what is told before anything is sent, what comes back, and a run from `submit` to its report.

The cluster has two nodes and wants a token; the user's machine shares no variable with it.
"""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from test_cli import one_message, process
from test_s3 import Bucket, filesystem_of

from medusa_ray import parts, provenance
from medusa_ray.cli import jobs
from medusa_ray.config import UserError
from medusa_ray.serve import free_port

TOKEN = "0123456789abcdef" * 4
COMMAND = [sys.executable, "-m", "medusa_ray.cli"]
RUN = {"output": "s3://bucket/run", "model": {"base": "b"}, "data": {"train": "c"}}


# ------------------------------------------------------------------------------------------ before it is sent


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The address of no cluster; the test is in a folder of its own."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return f"http://127.0.0.1:{free_port()}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lern", "run.yaml"], "expected was `--` and a verb"),
        (["submit", "--", "run", "run.yaml"], "expected was `--` and a verb"),
        (["run", "none.yaml"], ", which the job starts in. Name a file"),
        (["run", "run.yaml", "train.lerning_rate=1"], "did you mean train.learning_rate?"),
        (["run", "run.yaml", "output=runs/mine"], "output is 'runs/mine', a place in the job's own working"),
        (["report", "runs/mine"], "the folder of the run is 'runs/mine', a place in"),
        (["profile", "base", "--out", "found.json"], "out is 'found.json', a place in"),
        (["validate", "run.yaml"], "no Ray cluster takes jobs at http://127.0.0.1"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(nowhere: str, words: list[str], said: str) -> None:
    Path("run.yaml").write_text(yaml.safe_dump(RUN))
    assert said in one_message(process("submit", "--address", nowhere, "--", *words))


def test_options_of_the_verb_are_checked_as_here(nowhere: str) -> None:
    done = process("submit", "--address", nowhere, "--", "export", "heads", "out", "--format", "gguf")
    assert done.returncode == 2
    assert "gguf" in done.stderr


def test_variables_come_from_the_file_then_the_command_line_then_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "env.json"
    file.write_text(json.dumps({"env_vars": {"A": "file", "B": "file"}, "pip": ["x"]}))
    monkeypatch.setenv("C", "here")
    found = jobs.environment(str(file), ["B=line=2", "C"], None, False, False)
    given = found["env_vars"]
    assert (given["A"], given["B"], given["C"], found["pip"]) == ("file", "line=2", "here", ["x"])
    monkeypatch.delenv("C")
    with pytest.raises(UserError, match="--env got 'C'"):
        jobs.environment(None, ["C"], None, False, False)
    file.write_text(json.dumps({"envvars": {}}))
    with pytest.raises(UserError, match="did you mean env_vars"):
        jobs.environment(str(file), [], None, False, False)


def test_rows_and_checkpoints_of_runs_stay_behind_and_heads_travel(tmp_path: Path) -> None:
    for folder in ("run/distilled", "run/hidden", "run/heads"):
        provenance.write_json(f"{tmp_path}/{folder}/{provenance.FILE}", {})
    for folder in ("run/distilled", "run/hidden"):
        provenance.write_json(f"{tmp_path}/{folder}/{parts.MARK}", {})
    provenance.write_json(f"{tmp_path}/run/training/run.json", {})
    found = jobs.environment(None, [], str(tmp_path), False, False)
    assert found["excludes"] == ["/run/distilled/", "/run/hidden/", "/run/training/"]


def test_a_job_sent_by_another_version_says_so() -> None:
    message = one_message(process("validate", "run.yaml", MEDUSA_RAY_SENT_BY="0.0.1"))
    assert "the job was sent by medusa_ray 0.0.1, but the cluster has" in message


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 1, 1),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 143),
    ],
)
def test_the_exit_code_is_the_jobs(status: str, code: int | None, expected: int) -> None:
    job: Any = SimpleNamespace(status=status, driver_exit_code=code, message="why", submission_id="it")
    assert jobs.exit_code(job) == expected


def test_a_cluster_without_the_package_is_told_from_a_failing_verb() -> None:
    bare = subprocess.run([sys.executable, "-I", "-S", *COMMAND[1:]], capture_output=True, text=True, cwd="/")
    job: Any = SimpleNamespace(status="FAILED", driver_exit_code=bare.returncode, message=bare.stderr)
    with pytest.raises(UserError, match="the cluster has no medusa_ray"):
        jobs.exit_code(job)


def test_a_broken_connection_neither_loses_nor_repeats_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    log, cuts = "one\ntwo\nthree\nfour\n", [5, 9, 0, 99]

    class Client:
        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            cut = cuts.pop(0)
            for i in range(0, min(cut, len(log)), 3):
                yield log[i : min(i + 3, cut)]
            if cut < len(log):
                raise RuntimeError("WebSocket connection closed unexpectedly")

        def get_job_info(self, job_id: str) -> None: ...

        def get_job_status(self, job_id: str) -> str:
            return "SUCCEEDED"

    client: Any = Client()
    asyncio.run(jobs._relay(client, "it"))
    assert capsys.readouterr().out == log


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_connection_may_break_after_a_long_silence_but_not_for_long(
    is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "RECONNECT_S", 0.5)
    num_tries = 0

    class Client:
        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            nonlocal num_tries
            num_tries += 1
            if num_tries == 1:
                await asyncio.sleep(0.6)
            if num_tries == 1 or is_lost:
                raise OSError("connection reset")
            yield "done"

        def get_job_info(self, job_id: str) -> None: ...

        def get_job_status(self, job_id: str) -> str:
            return "SUCCEEDED"

    client: Any = Client()
    if is_lost:
        with pytest.raises(ConnectionError, match="connection reset"):
            asyncio.run(jobs._relay(client, "it"))
    else:
        asyncio.run(jobs._relay(client, "it"))
    assert num_tries == 2


# ------------------------------------------------------------------------------------------------ two nodes


@dataclass
class Cluster:
    """A head without CPUs and a worker, whose settings this machine's commands do not share."""

    dashboard: str
    folders: list[Path]  # where its processes write: Ray's own, the home, what is temporary

    def client(self, **variables: str) -> dict[str, str]:
        """Variables of a command on a user's machine."""
        own = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_"))}
        return own | {"RAY_API_SERVER_ADDRESS": self.dashboard, "RAY_AUTH_TOKEN": TOKEN} | variables

    def run(self, *words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *words],
            env=self.client(**variables),
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=600,
        )


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    bucket = Bucket()
    yield bucket
    bucket.stop()


def wait_for_port(port: int, node: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 90
    while time.monotonic() < deadline_s:
        assert node.poll() is None
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"nobody listens at {port}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = Path(f"/tmp/jobs{os.getpid()}")  # a socket's path has to be short
    home = tmp_path_factory.mktemp("home")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_"))},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "TMPDIR": str(home / "temporary"),
    }
    (home / "temporary").mkdir()
    port, dashboard_port, *agents = (free_port() for _ in range(4))
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--object-store-memory=200000000"]
    log = (home / "nodes.log").open("wb")
    nodes = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        node = subprocess.Popen(
            [*ray, *words], env=environment, cwd=home, stdout=log, stderr=log, start_new_session=True
        )
        nodes.append(node)
        return node

    try:
        head = start(
            "--head", "--num-cpus=0", "--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}",
            f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={agents[0]}",
        )  # fmt: skip
        wait_for_port(dashboard_port, head)
        worker = start(
            "--num-cpus=4", f"--address=127.0.0.1:{port}", f"--dashboard-agent-listen-port={agents[1]}"
        )
        wait_for_port(agents[1], worker)
        yield Cluster(f"http://127.0.0.1:{dashboard_port}", [folder, home])
    finally:
        for node in reversed(nodes):
            node.terminate()
            try:
                node.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Slow:
    """A run's file on a web server that holds it back: a `validate` that takes as long as a test wants."""

    url: str
    is_asked: Event
    may_answer: Event


@pytest.fixture
def slow() -> Iterator[Slow]:
    is_asked, may_answer = Event(), Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_asked.set()
            may_answer.wait(60)
            body = yaml.safe_dump(RUN).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.send_error(405)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    yield Slow(f"http://127.0.0.1:{server.server_port}/run.yaml", is_asked, may_answer)
    may_answer.set()
    server.shutdown()


def eventually(holds: Callable[[], object], timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


@pytest.mark.ray
def test_ctrl_c_leaves_a_job_running_that_can_be_followed_again(
    cluster: Cluster, slow: Slow, tmp_path: Path
) -> None:
    following = subprocess.Popen(
        [*COMMAND, "submit", "--job-id", "slow", "--", "validate", slow.url],
        env=cluster.client(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        # What a shell starts in the background ignores Ctrl-C, and so does all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with following:
        assert slow.is_asked.wait(60)
        following.send_signal(signal.SIGINT)
        out, err = following.communicate(timeout=30)
    assert following.returncode == 130
    assert out.startswith("job slow\n")
    assert f"`medusa-ray jobs follow slow --address {cluster.dashboard}` follows it again" in err
    assert "Traceback" not in err
    again = cluster.run("submit", "--job-id", "slow", "--", "validate", slow.url)
    assert "the cluster has a job slow already" in one_message(again)
    slow.may_answer.set()
    done = cluster.run("jobs", "follow", "slow")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{slow.url}: a valid RunConfig\n")


@pytest.mark.ray
def test_a_detached_job_is_its_id_and_can_be_listed_and_stopped(cluster: Cluster, slow: Slow) -> None:
    sent = cluster.run("submit", "--detach", "--", "validate", slow.url)
    assert sent.returncode == 0, sent.stderr
    (job_id,) = sent.stdout.split()
    assert slow.is_asked.wait(60)
    assert "RUNNING" in cluster.run("jobs", "list").stdout
    stopped = cluster.run("jobs", "stop", job_id)
    assert (stopped.returncode, stopped.stdout) == (0, f"{job_id}: STOPPED\n")
    assert "no-such-job" in one_message(cluster.run("jobs", "stop", "no-such-job"))


@pytest.mark.ray
def test_the_working_directory_goes_along_and_so_may_the_code(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN | {"typo": 1}))
    provenance.write_json(f"{tmp_path}/old/distilled/{parts.MARK}", {})
    provenance.write_json(f"{tmp_path}/old/heads/tree.json", {})
    done = cluster.run("submit", "--send-code", "--working-dir", str(tmp_path), "--", "validate", "run.yaml")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "run.yaml:\n  typo is not a key" in done.stdout
    (sent,) = cluster.folders[0].glob("session_2*/runtime_resources")
    assert list(sent.glob("py_modules_files/*/medusa_ray/cli/jobs.py"))
    assert list(sent.glob("working_dir_files/*/old/heads/tree.json"))
    assert not list(sent.glob("working_dir_files/*/old/distilled/*"))


@pytest.mark.ray
@pytest.mark.parametrize("token", ["", "f" * 64])
def test_without_the_token_a_command_is_told_so(cluster: Cluster, token: str) -> None:
    done = cluster.run("jobs", "list", RAY_AUTH_TOKEN=token)
    message = one_message(done)
    assert "does not let this command in" in message
    assert TOKEN not in message


@pytest.mark.ray
def test_a_folder_that_nodes_may_not_share_is_noted(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.run("submit", "--", "report", str(tmp_path))
    assert done.returncode == 2  # there is nothing in it
    assert f"note: the folder of the run is {tmp_path}, which all nodes must share" in done.stderr


@pytest.mark.ray
def test_an_address_without_a_scheme_is_the_dashboard(cluster: Cluster) -> None:
    """Ray takes it for its own port, and waits 40 s there."""
    done = cluster.run(
        "jobs", "list", "--address", cluster.dashboard.removeprefix("http://"), RAY_ADDRESS="127.0.0.1:1"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_a_run_goes_from_submit_to_its_report_through_a_bucket(
    cluster: Cluster, bucket: Bucket, tiny_base: Path, tmp_path: Path
) -> None:
    """Base, files, rows, heads and report: all of it is in the bucket, and none of the run on a node's disk.

    A training that is stopped afterwards saves first.
    """
    storage = filesystem_of(bucket)
    storage.mkdir("bucket")
    storage.put(str(tiny_base), "bucket/base", recursive=True)
    chats = [
        {"id": f"chat{i}", "messages": [{"role": "user", "content": f"{'why ' * (i % 5)}{i}"}]}
        for i in range(12)
    ]
    lines = "".join(json.dumps(chat) + "\n" for chat in chats)
    storage.pipe_file("bucket/chats/train.jsonl", lines.encode())
    storage.pipe_file("bucket/chats/test.jsonl", lines.encode())
    model = {"base": "s3://bucket/base", "dtype": "float32", "device": "cpu"}
    port = free_port()
    files = {
        "run": {
            "output": "s3://bucket/run",
            "model": model,
            "data": {"train": "s3://bucket/chats"},
            "distill": {"num_actors": 2, "rows_per_part": 4, "max_new_tokens": 8},
            "heads": {"num_heads": 2},
            "train": {"num_workers": 2, "epochs": 1, "batch_size": 16},
            "evaluate": {"max_new_tokens": 8, "num_speed": 2, "num_parity": 2, "compile": False},
        },
        "serve": {
            "proxy_location": "HeadOnly",
            "http_options": {"port": port},
            "applications": [
                {
                    "name": name,
                    "route_prefix": f"/{name}",
                    "args": {
                        **model, "model_id": name, "max_batch_size": 4, "max_total_tokens": 128, "threads": 1, **heads
                    },
                }
                for name, heads in (("baseline", {}), ("medusa", {"heads": "s3://bucket/run/heads"}))
            ],
        },
        "traffic": {
            "output": "s3://bucket/run/bench",
            "prompts": "s3://bucket/run/prompts/test",
            "targets": {
                name: {"url": f"http://127.0.0.1:{port}/{name}", "model": name} for name in ("baseline", "medusa")
            },
            "loads": ["synchronous"],
            "num_requests": 4,
            "num_warmup": 1,
            "rounds": 1,
            "max_seconds": 20,
            "max_tokens": 8,
        },
    }  # fmt: skip
    for name, values in files.items():
        storage.pipe_file(f"bucket/{name}.yaml", yaml.safe_dump(values).encode())
    storage.get("bucket/serve.yaml", str(tmp_path / "serve.yaml"))
    variables = {
        "AWS_ENDPOINT_URL": bucket.url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "us-east-1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    env = [word for key, value in variables.items() for word in ("--env", f"{key}={value}")]
    verbs = (
        ("plan", "s3://bucket/run.yaml"),
        ("run", "s3://bucket/run.yaml"),
        ("export-prompts", "s3://bucket/run.yaml"),
        ("export", "s3://bucket/run/heads", "s3://bucket/vllm", "--format", "vllm"),
        ("import", "s3://bucket/vllm", "s3://bucket/imported"),
        ("profile", "s3://bucket/base", "--heads", "s3://bucket/imported", "--batch=1", "--out=s3://bucket/p.json"),
        ("serve", "serve.yaml"),
        ("bench", "s3://bucket/traffic.yaml"),
        ("report", "s3://bucket/run"),
    )  # fmt: skip
    for verb in verbs:
        began_s = time.monotonic()
        options = ("--send-code",) if verb[0] == "serve" else ()
        done = cluster.run("submit", *env, *options, "--", *verb, cwd=tmp_path)
        print(f"\n{verb[0]}: {time.monotonic() - began_s:.1f} s")
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert TOKEN not in done.stdout + done.stderr
    assert json.loads(storage.cat_file("bucket/p.json"))["heads"] == "s3://bucket/imported"
    assert len(storage.cat_file("bucket/run/export/test.jsonl").splitlines()) == 12
    report = json.loads(storage.cat_file("bucket/run/report/report.json"))
    assert set(report["arms"]) == {"baseline", "medusa"}
    assert report["parity"]["token_exact"] == report["parity"]["prompts"]
    assert storage.cat_file("bucket/run/report/report.html").startswith(b"<!DOCTYPE html>")
    left = [
        file
        for folder in cluster.folders
        for file in folder.rglob("*")
        if not {"bases", "py_modules_files"} & set(file.parts)  # the base, and the code that was sent
        and (file.suffix in (".parquet", ".safetensors", ".html") or file.name == provenance.FILE)
    ]
    assert left == []

    for folder in ("distilled", "hidden"):
        storage.copy(f"bucket/run/{folder}", f"bucket/long/{folder}", recursive=True)
    words = (
        "train",
        "s3://bucket/run.yaml",
        "output=s3://bucket/long",
        "train.epochs=9999",
        "train.save_steps=99999",
    )
    assert (
        cluster.run("submit", "--detach", "--job-id", "long", *env, "--", *words, cwd=tmp_path).returncode
        == 0
    )
    eventually(lambda: storage.invalidate_cache() or storage.exists("bucket/long/heads/training.jsonl"), 120)
    assert cluster.run("jobs", "stop", "long").stdout == "long: STOPPED\n"
    done = cluster.run("jobs", "follow", "long")
    assert done.returncode == 143
    assert "has saved and stopped" in done.stdout
