"""Faults planted in a cluster of network namespaces: doctor finds each of them, and none where there is none.

Real, as far as one host allows: another code and other metadata on a node's path, a full tmpfs, mounts that one node
lacks, a rule that drops connections to free ports, tokens, a file's mode, limits, a fifo that nobody writes to, a node
whose processes are all killed. Made up: the clock, by a library that adds to what the C library tells all processes of
a node.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from moto.server import ThreadedMotoServer
from namespaces import WHY_NOT, Cluster, ip

from medusa_ray.doctor.console import show

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]
REPOSITORY = Path(__file__).parents[1]
NETWORK = "10.77.31"
SERVE_PORT = 18555
AHEAD = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t which, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(which, now);
    if (which == CLOCK_REALTIME) now->tv_sec += 420;
    return failed;
}
"""
HEAD, WELL, SICK, LOST = (f"{NETWORK}.{i}" for i in (1, 2, 3, 4))

# Where a fault is planted: the run of doctor that meets it, the node, and the check and words that tell it.
FAULTS = {
    "another transformers": ("unshared", SICK, "versions", "transformers 5.17.0"),
    "another medusa_ray": ("unshared", SICK, "versions", "medusa_ray code"),
    "an unshared path": ("unshared", SICK, "storage", f"does not show what {HEAD}, {WELL}"),
    "a base that one node lacks": ("unshared", SICK, "base", "base"),
    "closed ports": ("unshared", SICK, "network", "no connection with"),
    "gloo on loopback": ("unshared", SICK, "network", "127.0.0.1, where no other node is"),
    "a clock seven minutes ahead": ("unshared", SICK, "clocks", "420 s ahead"),
    "a token that all can read": ("unshared", SICK, "token file", "mode 0644"),
    "no compiler": ("unshared", SICK, "compiler", "no C++ compiler"),
    "few open files": ("unshared", SICK, "open files", "1024"),
    "a small /dev/shm": ("unshared", SICK, "memory", "/dev/shm has 64.0 MiB"),
    "chats that hang": ("unshared", SICK, "nodes", "hangs on reading"),
    "a full disk": ("full", "all nodes", "storage", "No space left"),
    "too few CPUs": ("full", "", "resources", "59 of train.num_workers find no node"),
    "no GPU": ("gpu", "", "GPUs", "no node of Ray has a GPU"),
    "no credentials": ("bucket", SICK, "storage", "NoCredentialsError"),
    "a taken port": ("serve", HEAD, "port of Serve", "cannot be used"),
    "a dead node": ("dead", LOST, "nodes", "is dead"),
}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that every account may enter, with a full disk of two MiB in it."""
    folder = Path(tempfile.mkdtemp(prefix="medusa-doctor-"))
    folder.chmod(0o755)
    full = folder / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(full)], check=True)
    with pytest.raises(OSError, match="No space"):
        (full / "ballast").write_bytes(bytes(4 * 2**20))
    yield folder
    subprocess.run(["umount", str(full)], check=True)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def files(place: Path, tiny_base: Path) -> dict[str, Path]:
    """Run and serve files by name, on storage that all nodes share."""
    shutil.copytree(tiny_base, place / "base")
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    for name in ("chats", "hanging"):
        (place / f"{name}.jsonl").write_text(f"{json.dumps(chat)}\n" * 40)
    (place / "shared").mkdir()
    (place / "unshared").mkdir()
    run: dict[str, Any] = {
        "output": f"{place}/shared/run",
        "model": {"base": f"{place}/base", "dtype": "float32", "device": "cpu"},
        "data": {"train": f"{place}/chats.jsonl"},
        "train": {"num_workers": 2, "dtype": "float32"},
    }
    serve: dict[str, Any] = {
        "http_options": {"host": "127.0.0.1", "port": SERVE_PORT},
        "applications": [
            {
                "name": "tiny",
                "args": {"model_id": "tiny", "base": f"{place}/base", "dtype": "float32", "device": "cpu"},
            }
        ],
    }
    contents = {
        "well": run,
        "unshared": run | {"output": f"{place}/unshared/run", "data": {"train": f"{place}/hanging.jsonl"}},
        "full": run | {"output": f"{place}/full/run", "train": {"num_workers": 67, "dtype": "float32"}},
        "gpu": run | {"model": run["model"] | {"device": "cuda"}},
        "bucket": run | {"output": "s3://doctor/run"},
        "serve": serve,
    }
    for name, content in contents.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return {name: place / f"{name}.yaml" for name in contents}


@pytest.fixture(scope="module")
def cluster(place: Path, files: dict[str, Path]) -> Iterator[Cluster]:
    """Two nodes with which nothing is the matter."""
    token = place / "token"
    token.write_text("a" * 64)
    token.chmod(0o600)
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
        "PYTHONPATH": str(REPOSITORY),
        "AWS_ACCESS_KEY_ID": "doctor",
        "AWS_SECRET_ACCESS_KEY": "doctor",
        "AWS_ENDPOINT_URL": f"http://{NETWORK}.254:5999",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with Cluster(NETWORK, place, environment) as cluster:
        bucket = ThreadedMotoServer(f"{NETWORK}.254", 5999, verbose=False)
        bucket.start()
        code = "import fsspec; fsspec.filesystem('s3').mkdir('doctor')"
        cluster.add()
        cluster.add()
        made = cluster.run([sys.executable, "-c", code])
        assert made.returncode == 0, made.stderr
        yield cluster
        bucket.stop()


def doctor(cluster: Cluster, *words: object, **environment: str) -> tuple[int, dict[str, Any]]:
    """Its exit code and diagnosis."""
    command = [sys.executable, "-m", "medusa_ray.cli", "doctor", *map(str, words), "--json"]
    done = cluster.run(command, **environment)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("name", ["", "well", "bucket", "serve"])
def test_a_healthy_cluster_has_no_fault(cluster: Cluster, files: dict[str, Path], name: str) -> None:
    code, found = doctor(cluster, *([files[name]] if name else []))
    told = [finding for finding in found["findings"] if finding["level"] != "ok"]
    assert (code, found["is_fit"], told) == (0, True, [])
    assert len(found["nodes"]) == 2


def test_a_wrong_token_is_told_at_once(cluster: Cluster) -> None:
    """Ray itself tries for twenty seconds, and then says that there is no cluster."""
    code, found = doctor(cluster, RAY_AUTH_TOKEN="b" * 64)
    assert code == 1
    assert [finding["found"] for finding in found["findings"]] == ["Ray refuses the token of this machine"]
    assert found["seconds"] < 5


@pytest.fixture(scope="module")
def diagnoses(cluster: Cluster, place: Path, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What doctor says to each file once a third node has joined with most of the faults, and a fourth has died."""
    older = place / "older"
    shutil.copytree(
        REPOSITORY / "medusa_ray", older / "medusa_ray", ignore=shutil.ignore_patterns("*.safetensors")
    )
    (older / "medusa_ray" / "hidden.py").write_text("# as it was before the last release\n")
    (older / "transformers-5.17.0.dist-info").mkdir()
    (older / "transformers-5.17.0.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 5.17.0\n")
    (place / "ahead.c").write_text(AHEAD)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "ahead.so", "ahead.c", "-ldl"], cwd=place, check=True)
    token = place / "copied_token"
    token.write_text("a" * 64)
    token.chmod(0o644)
    os.mkfifo(place / "fifo")
    before = [
        *(f"mount -t tmpfs none {place}/{folder}" for folder in ("unshared", "base")),
        "mount -t tmpfs -o size=64m none /dev/shm",
        f"mount --bind {place}/fifo {place}/hanging.jsonl",
        "ulimit -n 1024",
    ]
    sick = cluster.add(
        before="\n".join(before),
        PYTHONPATH=f"{older}:{REPOSITORY}",
        LD_PRELOAD=str(place / "ahead.so"),
        RAY_LD_PRELOAD_ON_WORKERS="1",
        RAY_AUTH_TOKEN_PATH=str(token),
        GLOO_SOCKET_IFNAME="lo",
        CXX="no-such-compiler",
        AWS_ACCESS_KEY_ID="",
        AWS_SECRET_ACCESS_KEY="",
    )
    free = "32768-60999"
    ip("-n", sick.namespace, "rule", "add", "ipproto", "tcp", "sport", free, "dport", free, "blackhole")
    lost = cluster.add()
    listener = f"import socket, time; s = socket.create_server(('', {SERVE_PORT})); time.sleep(600)"
    holder = subprocess.Popen(cluster.hosts[0].command([sys.executable, "-c", listener]))
    try:
        found = {name: doctor(cluster, file, "--timeout", 10)[1] for name, file in files.items()}
        lost.kill()
        cluster.wait_for(3)
        found["dead"] = doctor(cluster)[1]
    finally:
        holder.kill()
    for name, diagnosis in found.items():
        print(f"\nmedusa-ray doctor {name}.yaml")
        show(diagnosis)
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_doctor_finds_a_planted_fault(diagnoses: dict[str, dict[str, Any]], fault: str) -> None:
    name, node, check, words = FAULTS[fault]
    findings = diagnoses[name]["findings"]
    told = [finding for finding in findings if finding["check"] == check and words in finding["found"]]
    assert [finding["node"] for finding in told] == [node], findings
    assert told[0]["level"] != "ok"
    assert told[0]["expected"]
    assert told[0]["do"]


def test_a_node_that_hangs_does_not_hold_the_others_up(diagnoses: dict[str, dict[str, Any]]) -> None:
    assert diagnoses["unshared"]["seconds"] < 40
    assert any(finding["check"] == "inputs" for finding in diagnoses["gpu"]["findings"])


def test_doctor_leaves_nothing_behind(
    diagnoses: dict[str, dict[str, Any]], cluster: Cluster, place: Path
) -> None:
    assert not list(place.rglob(".medusa-ray-doctor-*"))
    assert not (place / "shared" / "run").exists()
    code = "import fsspec; print(fsspec.filesystem('s3').find('doctor'))"
    assert cluster.run([sys.executable, "-c", code]).stdout.strip() == "[]"


def test_an_open_dashboard_is_told(tmp_path: Path) -> None:
    environment = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(REPOSITORY)}
    with Cluster("10.77.32", tmp_path, environment) as cluster:
        cluster.add({"--dashboard-host": "0.0.0.0"})
        code, found = doctor(cluster)
    told = [finding["found"] for finding in found["findings"] if finding["check"] == "authentication"]
    assert code == 1
    assert "the dashboard listens at *:8299: whoever reaches it runs code here" in told[0]
