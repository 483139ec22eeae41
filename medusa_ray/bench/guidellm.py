"""A load on one target -> what GuideLLM measured, as rows: its command line, its process, its report.

All runs share one process: starting it costs seconds of CPU time, mostly imports, and a further run in it some tenths.
"""

import importlib
import json
import logging
import multiprocessing
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from medusa_ray import records
from medusa_ray.bench.prompts import Prompt
from medusa_ray.bench.targets import endpoint
from medusa_ray.config import TargetConfig, TrafficConfig

LOG = logging.getLogger("medusa_ray")

Row = dict[str, Any]  # one row of records.REQUESTS
Report = dict[str, Any]  # the JSON file of one run of GuideLLM

END_TIMEOUT_S = 10.0
RUN_ATTEMPTS = 3
START_TIMEOUT_S = 180.0  # for GuideLLM's imports on a machine that is busy with other things
SAMPLE_S = 0.25
AGGREGATES = (
    "requests_per_second", "request_latency", "time_to_first_token_ms", "inter_token_latency_ms",
    "output_tokens_per_second",
)


def due_s(load: str, num_requests: int, seed: int) -> list[float] | None:
    """When each request of an open load is due, in seconds after the first; None for a load that is closed.

    Drawn here, as GuideLLM's own arrivals of one seed are not quite the same in two runs.
    """
    kind, _, rate = load.partition("=")
    if kind not in ("poisson", "constant"):
        return None
    gaps_s = np.full(num_requests - 1, 1 / float(rate))
    if kind == "poisson":
        gaps_s = np.random.default_rng(seed).exponential(gaps_s)
    return [0.0, *np.cumsum(gaps_s).tolist()]


def write_data(prompts: list[Prompt], file: Path, due_s: list[float] | None = None) -> None:
    """The prompts in the order in which they are sent, and when, as Parquet that GuideLLM reads."""
    if prompts[0].is_chat:
        column, values = "messages", pa.array([prompt.asked for prompt in prompts], records.MESSAGES)
    else:
        column, values = "text", pa.array([prompt.asked for prompt in prompts], pa.string())
    columns = {column: values} | ({"relative_timestamp": pa.array(due_s)} if due_s else {})
    pq.write_table(pa.table(columns), file)


def arguments(
    config: TrafficConfig,
    target: TargetConfig,
    load: str,
    data: Path,
    prompt: Prompt,
    key: str | None = None,
) -> list[str]:
    """The command line of one `guidellm run`, but for its output. prompt: one of those in `data`."""
    backend = {
        "kind": "openai_http",
        "target": target.url,
        "model": target.model,
        "request_format": endpoint(prompt),
        "max_tokens": config.max_tokens,
        "extras": {"body": {"temperature": config.temperature, "seed": config.seed}},
        "validate_backend": False,  # it asks for /health, which not every server has; `check` asks for more
    }
    if key:
        backend["api_key"] = key  # which GuideLLM's report hides
    options: list[tuple[str, Any]] = [
        ("--backend", backend),
        ("--profile", profile(config, load)),
        ("--data", {"kind": "parquet_file", "path": str(data)}),
        # The data end here too, but GuideLLM 0.8.1 never returns when the last request ends before it has
        # noticed that, as happens on a dead server.
        ("--constraint", {"kind": "max_requests", "count": config.num_requests}),
        ("--constraint", {"kind": "max_duration", "seconds": config.max_seconds}),
    ]
    words = [word for name, value in options for word in (name, json.dumps(value))]
    return ["run", "--disable-console", *words]


def profile(config: TrafficConfig, load: str) -> dict[str, Any]:
    """GuideLLM's name for a load."""
    kind, _, number = load.partition("=")
    if kind == "concurrency":
        return {"kind": "concurrent", "streams": [int(number)]}
    if kind in ("poisson", "constant"):
        return {"kind": "replay", "schedule_turn": "timestamp"}  # at the times that the data have
    return {"kind": kind, "max_concurrency": config.max_concurrency} if kind == "throughput" else {"kind": kind}


def run_whole(guidellm: "GuideLLM", words: list[str], config: TrafficConfig) -> Report:
    """The report of a run with a record of each request that was begun.

    GuideLLM 0.8.1 stops listening to its worker when the last request has ended, on a busy machine at times just
    before the record of that request arrives. Arms are compared on the same requests only, so such a run, in
    which a request seems never to have ended, is measured again.
    """
    for _ in range(RUN_ATTEMPTS):
        report = guidellm.run(words, config.max_seconds)
        state = report["benchmarks"][0]["scheduler_state"]
        if not any(state[f"{stage}_requests"] for stage in ("queued", "pending", "processing")):
            break
        LOG.warning("GuideLLM lost the record of a request; this run is measured again")
    return report


class GuideLLM:
    """One GuideLLM process that takes command lines in turn. Leaving the context ends it and its children."""

    def __init__(self, folder: Path) -> None:
        """folder: takes its files. GuideLLM works in it, so that it finds no settings in a stray .env."""
        self._result = folder / "result.json"
        self._log = folder / "guidellm.log"
        environment = {
            "GUIDELLM__MAX_WORKER_PROCESSES": "1",  # more are for servers that one cannot keep up with
            "GUIDELLM__LOGGING__CONSOLE_LOG_LEVEL": "WARNING",
            **os.environ,
            "GUIDELLM__MP_CONTEXT_TYPE": "forkserver",
            # Seconds that pass idly in every run, once and several times; the defaults are 1 and 0.1.
            "GUIDELLM__SCHEDULER_START_DELAY_NON_DISTRIBUTED": "0.1",
            "GUIDELLM__MP_POLL_INTERVAL": "0.05",
            "HF_HUB_OFFLINE": "1",  # the prompts are a local file
            "HF_DATASETS_CACHE": str(folder / "cache"),
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                # With -c there is no main module, which GuideLLM's own children would have to import again.
                [sys.executable, "-c", "from medusa_ray.bench import guidellm; guidellm.serve()"],
                cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self.watch = Watch(self._process.pid)

    def __enter__(self) -> "GuideLLM":
        return self

    def __exit__(self, *_: object) -> None:
        # Its whole session, which has nothing left to do. Python's resource tracker ignores SIGTERM, and
        # removes the semaphores of the others when they are gone.
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal_number)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(END_TIMEOUT_S)
        self._stdout.close()
        with suppress(BrokenPipeError):
            self._stdin.close()

    def run(self, words: list[str], max_seconds: float) -> Report:
        """What one command line measured. Raises RuntimeError, with the end of its output, when it fails."""
        self._result.unlink(missing_ok=True)
        line = json.dumps([*words, "--output", json.dumps({"kind": "json", "path": str(self._result)})])
        with suppress(BrokenPipeError):  # of a dead process; its answer is then empty
            self._stdin.write(line.encode() + b"\n")
            self._stdin.flush()
        timeout_s = max_seconds + START_TIMEOUT_S
        with self.watch:
            answered, _, _ = select.select([self._stdout], [], [], timeout_s)
        code = self._stdout.readline().decode().strip() if answered else f"no end within {timeout_s:.0f} s"
        if code != "0":
            raise RuntimeError(
                f"GuideLLM failed ({code or 'it died'}). Its last output:\n"
                f"{self._log.read_text(errors='replace')[-2000:]}"
            )
        report: Report = json.loads(self._result.read_bytes())
        return report


class Watch:
    """CPU times of a process and all below it, sampled while the context is open: is the client too slow?"""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._samples: dict[int, list[tuple[float, float]]] = {}  # of each process: when, CPU seconds so far

    def __enter__(self) -> None:
        self._samples = defaultdict(list)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.is_set():
            with suppress(psutil.Error):
                root = psutil.Process(self._pid)
                for process in [root, *root.children(recursive=True)]:
                    with suppress(psutil.Error):
                        times = process.cpu_times()
                        self._samples[process.pid].append((time.time(), times.user + times.system))
            self._ended.wait(SAMPLE_S)

    def busiest(self, start_s: float, end_s: float) -> float:
        """Share of a CPU core that the busiest process took between two times, in seconds since the epoch.

        GuideLLM's worker is one process with one event loop: from about 0.9 on it is what limits the requests.
        """
        shares = [0.0]
        for samples in self._samples.values():
            at_s, used_s = zip(*samples, strict=True)
            start_used_s, end_used_s = np.interp([start_s, end_s], at_s, used_s)
            shares.append((end_used_s - start_used_s) / (end_s - start_s) if end_s > start_s else 0.0)
        return float(max(shares))


def serve() -> None:
    """The child process: command lines on stdin, a JSON list each -> the exit code of each on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what GuideLLM prints goes to the log
    # Each run starts two processes. A server that has done their imports forks them at once; GuideLLM's own
    # default would do the imports anew, and a fork of this process would copy locks that its threads hold.
    multiprocessing.set_forkserver_preload(["guidellm.scheduler", "guidellm.backends.openai.http"])
    importlib.import_module("guidellm.benchmark.entrypoints")
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for line in sys.stdin:
        sys.argv = ["guidellm", *json.loads(line)]
        code: Any = 0
        try:
            runpy.run_module("guidellm", run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        print(code, file=answers, flush=True)


def _end_with(parent: int) -> None:
    """Ends this session when the process that asked for it is no more, even in the middle of a run."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGTERM)


# ------------------------------------------------------------------------------------------------ results


def rows_of(report: Report, prompts: list[Prompt], max_seconds: float, is_open: bool = False) -> list[Row]:
    """Every request that one run began, as a row of records.REQUESTS without arm, load and round.

    is_open: requests were due at times of their own, whatever the server did.
    """
    groups = report["benchmarks"][0]["requests"]
    statuses = ("successful", "errored", "incomplete")
    requests = [(status, request) for status in statuses for request in groups[status]]
    # Only a request that the server answered tells what it held. The others held what is left: GuideLLM hands
    # the prompts out in order, and what it never came to are the last ones.
    requests.sort(key=lambda pair: (not pair[1]["request_args"], pair[1]["info"]["timings"]["queued"]))
    left = {i: prompts[i % len(prompts)] for i in range(len(requests) + len(prompts))}
    rows = []
    for status, request in requests:
        body = json.loads(request["request_args"])["body"] if request["request_args"] else {}
        held = body.get("messages") or body.get("prompt")
        place = next((i for i, prompt in left.items() if not held or prompt.asked == held), None)
        assert place is not None, f"GuideLLM sent {held}, which is none of the prompts left"
        del left[place]
        row = _row_of(status, request, max_seconds, is_open)
        rows.append({"prompt": place % len(prompts), "category": prompts[place % len(prompts)].category, **row})
    return rows


def _row_of(status: str, request: dict[str, Any], max_seconds: float, is_open: bool) -> Row:
    # The server's count. GuideLLM's own, elsewhere, would be of events, and an event may hold many tokens.
    output_tokens = request["output_metrics"]["total_tokens"]
    error = None
    if status == "incomplete":
        error = f"cut off when max_seconds, {max_seconds:g}, were over"
    elif status != "successful":
        error = request["info"]["error"]
    elif output_tokens is None:
        error = "the server sent no usage, so its tokens cannot be counted"
    ttft_ms, timings = request["time_to_first_token_ms"], request["info"]["timings"]
    start_s, last_s = timings["request_start"], timings["last_token_iteration"]
    due_s = timings["targeted_start"] if is_open else None
    speculation = (request["response_metrics"] or {}).get("speculative_decoding") or {}
    return {
        "start_s": request["request_start_time"],
        "latency_s": request["request_latency"],
        "ttft_s": None if ttft_ms is None else ttft_ms / 1e3,
        "prompt_tokens": request["input_metrics"]["total_tokens"],
        "output_tokens": output_tokens,
        "num_steps": speculation.get("num_spec_steps"),
        "accepted_histogram": speculation.get("acceptance_histogram"),
        "text": request["output"],
        "error": error,
        "events": timings["token_iterations"] or None,
        "last_s": None if last_s is None or start_s is None else last_s - start_s,
        "wait_s": None if due_s is None or start_s is None else start_s - due_s,
        "draft_tokens": speculation.get("num_draft_tokens"),
    }


def aggregates_of(report: Report) -> dict[str, float]:
    """GuideLLM's own means over the requests that succeeded, to check ours against."""
    metrics = report["benchmarks"][0]["metrics"]
    return {name: metrics[name]["successful"]["mean"] for name in AGGREGATES}
