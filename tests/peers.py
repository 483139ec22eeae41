"""Other people's servers, started for a comparison and ended after it."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_S = 900.0


@contextmanager
def vllm(
    venv: Path,
    base: str,
    core: int,
    max_total_tokens: int,
    *options: str,
    heads: str | None = None,
    num_heads: int = 0,
) -> Iterator[str]:
    """URL of a vLLM server, all of it on one core of a CPU; it serves the model `base`, in float32.

    venv: a virtual environment that has vLLM. heads: in vLLM's own layout. options: further ones of `vllm serve`.
    """
    port = free_port()
    words = [
        *(
            "taskset",
            "-c",
            str(core),
            f"{venv}/bin/vllm",
            "serve",
            base,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ),
        *(
            "--served-model-name",
            "base",
            "--dtype",
            "float32",
            "--max-model-len",
            str(max_total_tokens),
            *options,
        ),
    ]
    if heads:
        speculation = {"method": "medusa", "model": heads, "num_speculative_tokens": num_heads}
        words += ["--speculative-config", json.dumps(speculation)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            "PATH": f"{venv}/bin:{os.environ['PATH']}",
            "VLLM_CACHE_ROOT": cache,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": str(core),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }
        with running(words, environment, port) as url:
            yield url


@contextmanager
def transformers_serve(base: str, core: int) -> Iterator[str]:
    """URL of transformers' own server in continuous batches, on one core; its model is called `base`, as given here."""
    port = free_port()
    words = ["taskset", "-c", str(core), f"{Path(sys.executable).parent}/transformers", "serve", base]
    words += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--continuous-batching", "--attn-implementation", "sdpa", "--no-cb-use-cuda-graph"]
    words += ["--cb-num-blocks", "512", "--cb-block-size", "32", "--cb-max-batch-tokens", "512"]
    with tempfile.TemporaryDirectory() as cache, running(words, {"HF_HUB_CACHE": cache}, port) as url:
        yield url  # without a cache folder, /v1/models fails


@contextmanager
def transformers_generate(base: str, core: int, num_lookup: int) -> Iterator[str]:
    """URL of transformers' `generate` with prompt lookup, a request at a time; the model is called `base`."""
    port = free_port()
    script = Path(__file__).with_name("generate_server.py")
    words = ["taskset", "-c", str(core), sys.executable, str(script), base, str(port), str(num_lookup)]
    with running(words, {}, port) as url:
        yield url


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def running(words: list[str], environment: dict[str, str], port: int) -> Iterator[str]:
    """URL of a server while its process runs, once its /health answers."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    common = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as log:
        # A group of its own, so that what it starts ends with it.
        server = subprocess.Popen(
            words, env={**inherited, **common, **environment}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _wait(url: str, server: "subprocess.Popen[bytes]", log: Any) -> None:
    until = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if server.poll() is not None or time.monotonic() > until:
                log.seek(0)
                raise RuntimeError(f"the server does not start:\n{log.read()[-3000:]}") from None
            time.sleep(1)
