"""Other people's servers, started for a comparison and ended after it."""

import json
import os
import signal
import socket
import subprocess
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
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
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
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as log:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "PATH": f"{venv}/bin:{os.environ['PATH']}",
            "VLLM_CACHE_ROOT": cache,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": str(core),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        # A group of its own, so that what it starts ends with it.
        server = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
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
