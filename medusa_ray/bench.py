"""Prompts and OpenAI servers -> a row per request. GuideLLM sends the traffic; this knows HTTP and no engine.

Each arm gets the same prompts in the same order, and the arms take turns within every load, so that whatever
else the machine does meets both. All runs share one GuideLLM process: starting it costs seconds of CPU time,
mostly imports, and a further run in it some tenths.
"""

import http.client
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
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from medusa_ray import parts, provenance, records
from medusa_ray.config import TargetConfig, TrafficConfig, UserError

LOG = logging.getLogger("medusa_ray")

Messages = list[dict[str, str]]
Row = dict[str, Any]  # one row of records.REQUESTS
Report = dict[str, Any]  # the JSON file of one run of GuideLLM

CHECK_TIMEOUT_S = 10.0
END_TIMEOUT_S = 10.0
RUN_ATTEMPTS = 3
START_TIMEOUT_S = 180.0  # for GuideLLM's imports on a machine that is busy with other things
AGGREGATES = (
    "requests_per_second", "request_latency", "time_to_first_token_ms", "inter_token_latency_ms",
    "output_tokens_per_second",
)


def run(config: TrafficConfig) -> str:
    """Sends the traffic of `config` to its targets and returns the URI of the results, its `output`.

    Writes requests.parquet (records.REQUESTS), bench.json, GuideLLM's own files under guidellm/, and the
    provenance last. Raises UserError before any traffic when the prompts cannot be read or a target cannot
    serve them.
    """
    settings = config.model_dump(mode="json", exclude={"output"})
    inputs = {"prompts": provenance.digest(config.prompts)}
    if provenance.is_complete(config.output, settings, inputs):
        return config.output
    prompts = read_prompts(config.prompts)[: config.num_requests]
    with (
        tempfile.TemporaryDirectory(prefix="medusa_ray_bench_", ignore_cleanup_errors=True) as folder,
        GuideLLM(Path(folder)) as guidellm,
    ):
        # While GuideLLM imports what it needs.
        infos = {name: check(name, target, prompts[0], config) for name, target in config.targets.items()}
        for name, target in config.targets.items():
            warm_up(name, target, prompts, config)
        clear(config.output)
        rows, aggregates = measure(config, prompts, guidellm, Path(folder))
    parts.write(config.output, "requests", pa.Table.from_pylist(rows, schema=records.REQUESTS))
    bench = {
        "hardware": provenance.hardware(),
        "versions": provenance.versions(),
        "traffic": settings,
        "arms": {name: {"info": infos[name], "guidellm": aggregates[name]} for name in infos},
        "not_comparable": not_comparable(rows, config),
    }
    provenance.write_json(f"{config.output}/bench.json", bench)
    provenance.write(config.output, settings, inputs, requests=len(rows), failed=num_failed(rows))
    return config.output


def measure(
    config: TrafficConfig, prompts: list[Messages], guidellm: "GuideLLM", folder: Path
) -> tuple[list[Row], dict[str, dict[str, list[dict[str, float]]]]]:
    """All rows, and GuideLLM's own aggregates by arm and load, a list of one per round."""
    # Prompts come again when there are fewer of them than requests.
    sent = [prompts[i % len(prompts)] for i in range(config.num_requests)]
    data = folder / "prompts.parquet"
    pq.write_table(pa.table({"messages": pa.array(sent, records.MESSAGES)}), data)
    rows: list[Row] = []
    aggregates: dict[str, dict[str, list[dict[str, float]]]] = {
        arm: {load: [] for load in config.loads} for arm in config.targets
    }
    for round_, load, arm in plan(config):
        report = run_whole(guidellm, arguments(config, config.targets[arm], load, data), config)
        found = rows_of(report, prompts, config.max_seconds)
        rows += [{"arm": arm, "load": load, "round": round_, **row} for row in found]
        aggregates[arm][load].append(aggregates_of(report))
        provenance.write_json(f"{config.output}/guidellm/round{round_}-{load}-{arm}.json", report)
        LOG.info(
            "stage=bench round=%d load=%s arm=%s requests=%d failed=%d",
            round_, load, arm, len(found), num_failed(found),
        )
    return rows, aggregates


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


def clear(output: str) -> None:
    """Removes the results of other traffic, and nothing else."""
    parts.clear(output)
    filesystem, path = fsspec.core.url_to_fs(f"{output}/guidellm")
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def plan(config: TrafficConfig) -> Iterator[tuple[int, str, str]]:
    """(round, load, arm) in the order of measurement: arms take turns at each load, and in who is first."""
    for round_ in range(config.rounds):
        arms = list(config.targets)[:: -1 if round_ % 2 else 1]
        for load in config.loads:
            for arm in arms:
                yield round_, load, arm


# ------------------------------------------------------------------------------------------------ prompts


def read_prompts(uri: str) -> list[Messages]:
    """The chats of a prompts split (Parquet), or of a JSONL file, each up to the reply that is asked for.

    Raises UserError when there are none.
    """
    filesystem, path = fsspec.core.url_to_fs(uri)
    if filesystem.isdir(path):
        files = [f"{uri.rstrip('/')}/{name}.parquet" for name in parts.names(uri)]
        rows = [row for file in files for row in _read_part(file)]
        prompts = [row["messages"] for row in rows if row["error"] is None and row["messages"]]
    elif filesystem.isfile(path):
        with filesystem.open(path, "r", encoding="utf-8") as file:
            lines = [(i, line) for i, line in enumerate(file, 1) if line.strip()]
        prompts = [_prompt_of(line, f"{uri}, line {i},") for i, line in lines]
    else:
        raise UserError(
            f"prompts is {uri!r}, but nothing is there. Run `medusa-ray data`, or give a JSONL file of chats."
        )
    if not prompts:
        raise UserError(f"{uri} holds no chats to send; expected rows with `messages` and without an error.")
    return prompts


def _read_part(uri: str) -> list[dict[str, Any]]:
    with fsspec.open(uri, "rb") as file:
        return records.check_columns(pq.read_table(file), records.PROMPTS, uri).to_pylist()


def _prompt_of(line: str, where: str) -> Messages:
    try:
        chat = json.loads(line)["messages"]
        messages = [{"role": str(message["role"]), "content": str(message["content"])} for message in chat]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where} is no chat ({error!r}); expected was "
            '{"messages": [{"role": ..., "content": ...}, ...]}.'
        ) from error
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise UserError(f"{where} has nothing to answer: no message stands before the assistant's.")
    return messages


# ------------------------------------------------------------------------------------------------ targets


def check(name: str, target: TargetConfig, prompt: Messages, config: TrafficConfig) -> Any:
    """The target's /info, or None where it has none. Raises UserError unless it answers a first prompt."""
    try:
        models = [model["id"] for model in _get(f"{target.url}/v1/models")["data"]]
    except urllib.error.HTTPError as error:
        raise UserError(
            f"target {name} answers {error.code} to {target.url}/v1/models, which should list models. Set "
            f"targets.{name}.url to the server's base URL, with its route prefix and without /v1."
        ) from error
    except OSError as error:
        raise UserError(
            f"target {name} does not answer at {target.url}: {getattr(error, 'reason', error)}. Start the "
            f"server, or correct targets.{name}.url."
        ) from error
    except (ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        raise UserError(
            f"target {name} is no OpenAI server: {target.url}/v1/models gives {error!r}. Correct "
            f"targets.{name}.url."
        ) from error
    try:
        _ask(target, prompt, config)
    except OSError as error:
        raise UserError(
            f"target {name} does not answer a chat request for the model {target.model!r}: {_reason(error)}. "
            f"It serves {models}. Correct targets.{name}.model, or what the answer names."
        ) from error
    try:
        return _get(f"{target.url}/info")
    except (OSError, ValueError):
        return None


def warm_up(name: str, target: TargetConfig, prompts: list[Messages], config: TrafficConfig) -> None:
    """Sends the warm-up requests all at once, so that the batches they make shrink from num_warmup to one."""
    with ThreadPoolExecutor(max_workers=max(config.num_warmup, 1)) as pool:
        chosen = [prompts[i % len(prompts)] for i in range(config.num_warmup)]
        answers = [pool.submit(_ask, target, prompt, config) for prompt in chosen]
    try:
        for answer in answers:
            answer.result()
    except OSError as error:
        raise UserError(
            f"target {name} fails at {config.num_warmup} warm-up requests at once: {_reason(error)}. Lower "
            "num_warmup, or let the server queue more requests."
        ) from error


def _ask(target: TargetConfig, prompt: Messages, config: TrafficConfig) -> None:
    body = {
        "model": target.model, "messages": prompt, "max_completion_tokens": config.max_tokens,
        "temperature": config.temperature, "seed": config.seed,
    }
    request = urllib.request.Request(
        f"{target.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=config.max_seconds) as response:
        response.read()


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=CHECK_TIMEOUT_S) as response:
        return json.load(response)


def _reason(error: OSError) -> str:
    """What the server said of an error, in OpenAI's form or as it came; else what went wrong on the way."""
    if not isinstance(error, urllib.error.HTTPError):
        return str(error)
    text = error.read().decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return f"{error.code} {text[:300]}".rstrip(".")


# ------------------------------------------------------------------------------------------------ GuideLLM


def arguments(config: TrafficConfig, target: TargetConfig, load: str, data: Path) -> list[str]:
    """The command line of one `guidellm run`, but for its output."""
    kind, _, streams = load.partition("=")
    profile: dict[str, Any] = {"kind": "concurrent", "streams": [int(streams)]} if streams else {"kind": kind}
    if kind == "throughput":
        profile["max_concurrency"] = config.max_concurrency
    backend = {
        "kind": "openai_http",
        "target": target.url,
        "model": target.model,
        "max_tokens": config.max_tokens,
        "extras": {"body": {"temperature": config.temperature, "seed": config.seed}},
        "validate_backend": False,  # it asks for /health, which not every server has; `check` asks for more
    }
    options: list[tuple[str, Any]] = [
        ("--backend", backend),
        ("--profile", profile),
        ("--data", {"kind": "parquet_file", "path": str(data)}),
        # The data end here too, but GuideLLM 0.8.1 never returns when the last request ends before it has
        # noticed that, as happens on a dead server.
        ("--constraint", {"kind": "max_requests", "count": config.num_requests}),
        ("--constraint", {"kind": "max_duration", "seconds": config.max_seconds}),
    ]
    words = [word for name, value in options for word in (name, json.dumps(value))]
    return ["run", "--disable-console", *words]


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
                [sys.executable, "-c", "from medusa_ray import bench; bench.serve_guidellm()"],
                cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

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
        answered, _, _ = select.select([self._stdout], [], [], timeout_s)
        code = self._stdout.readline().decode().strip() if answered else f"no end within {timeout_s:.0f} s"
        if code != "0":
            raise RuntimeError(
                f"GuideLLM failed ({code or 'it died'}). Its last output:\n"
                f"{self._log.read_text(errors='replace')[-2000:]}"
            )
        report: Report = json.loads(self._result.read_bytes())
        return report


def serve_guidellm() -> None:
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


def rows_of(report: Report, prompts: list[Messages], max_seconds: float) -> list[Row]:
    """Every request that one run began, as a row of records.REQUESTS without arm, load and round."""
    groups = report["benchmarks"][0]["requests"]
    statuses = ("successful", "errored", "incomplete")
    requests = [(status, request) for status in statuses for request in groups[status]]
    # Only a request that the server answered tells what it held. The others held what is left: GuideLLM hands
    # the prompts out in order, and what it never came to are the last ones.
    requests.sort(key=lambda pair: (not pair[1]["request_args"], pair[1]["info"]["timings"]["queued"]))
    left = {i: prompts[i % len(prompts)] for i in range(len(requests) + len(prompts))}
    rows = []
    for status, request in requests:
        held = request["request_args"] and json.loads(request["request_args"])["body"]["messages"]
        place = next((i for i, prompt in left.items() if not held or prompt == held), None)
        assert place is not None, f"GuideLLM sent {held}, which is none of the prompts left"
        del left[place]
        rows.append({"prompt": place % len(prompts), **_row_of(status, request, max_seconds)})
    return rows


def _row_of(status: str, request: dict[str, Any], max_seconds: float) -> Row:
    # The server's count. GuideLLM's own, elsewhere, would be of events, and an event may hold many tokens.
    output_tokens = request["output_metrics"]["total_tokens"]
    error = None
    if status == "incomplete":
        error = f"cut off when max_seconds, {max_seconds:g}, were over"
    elif status != "successful":
        error = request["info"]["error"]
    elif output_tokens is None:
        error = "the server sent no usage, so its tokens cannot be counted"
    ttft_ms = request["time_to_first_token_ms"]
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
    }


def aggregates_of(report: Report) -> dict[str, float]:
    """GuideLLM's own means over the requests that succeeded, to check ours against."""
    metrics = report["benchmarks"][0]["metrics"]
    return {name: metrics[name]["successful"]["mean"] for name in AGGREGATES}


def not_comparable(rows: list[Row], config: TrafficConfig) -> list[str]:
    """The loads at which the arms did not get the same prompts in every round."""
    sent: dict[tuple[str, str], list[tuple[int, int]]] = {
        (load, arm): [] for load in config.loads for arm in config.targets
    }
    for row in rows:
        sent[row["load"], row["arm"]].append((row["round"], row["prompt"]))
    first = next(iter(config.targets))
    return [
        load
        for load in config.loads
        if any(sorted(sent[load, arm]) != sorted(sent[load, first]) for arm in config.targets)
    ]


def num_failed(rows: list[Row]) -> int:
    return sum(row["error"] is not None for row in rows)
