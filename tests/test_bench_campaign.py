"""What the benchmark measures of servers whose delays are known, and what it says of runs that show nothing.

The server is GuideLLM's own mock: each reply waits for its first token, and then for each further one. A bare client
tells what it adds to the delays that it was told, a few tenths of a millisecond each on an idle machine.
"""

import http.client
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import peers
import pyarrow.parquet as pq
import pytest

from medusa_ray import bench, provenance, report
from medusa_ray.config import TrafficConfig
from medusa_ray.report.numbers import drawn_rate, latency_s, tokens, tpot_ms, ttft_ms
from medusa_ray.report.samples import Drawn, Samples

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]

TTFT_MS, NUM_TOKENS = 300.0, 16
ITL_MS = {"baseline": 90.0, "medusa": 60.0}
WITHIN = 0.03


@contextmanager
def mock_server(**options: float) -> Iterator[str]:
    """URL of GuideLLM's mock server with these options, names with underscores."""
    port = peers.free_port()
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    line = [sys.executable, "-m", "guidellm", "mock-server", "--port", str(port), "--host", "127.0.0.1"]
    with peers.running([*line, "--model", "mock", *words], {}, port) as url:
        yield url


def ask(port: int) -> tuple[float, float]:
    """Milliseconds to the first content of a streamed reply, and for each further token: the bare client."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    messages = [{"role": "user", "content": "a"}]
    body = {"model": "mock", "messages": messages, "stream": True, "max_completion_tokens": NUM_TOKENS}
    sent_s = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response, times_s = connection.getresponse(), []
    while line := response.readline():
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:])["choices"]
            if choices and choices[0]["delta"].get("content"):
                times_s.append(time.perf_counter())
    connection.close()
    return 1e3 * (times_s[0] - sent_s), 1e3 * (times_s[-1] - times_s[0]) / (len(times_s) - 1)


def measured(folder: Path, urls: dict[str, str], **changes: Any) -> tuple[TrafficConfig, list[dict[str, Any]]]:
    """A finished benchmark and its rows."""
    prompts = folder / "prompts.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(16)]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    values = {
        "output": str(folder / "bench"),
        "prompts": str(prompts),
        "targets": {arm: {"url": url, "model": "mock"} for arm, url in urls.items()},
        "loads": ["synchronous", "concurrency=4"],
        "num_requests": 16,
        "num_warmup": 2,
        "rounds": 2,
        "max_tokens": NUM_TOKENS,
        **changes,
    }
    config = TrafficConfig.model_validate(values)
    bench.run(config)
    return config, pq.read_table(f"{config.output}/requests.parquet").to_pylist()


def test_known_delays_come_out_within_three_percent(tmp_path: Path) -> None:
    """Medians over requests of means over tokens; each reply's delays are drawn anew, with 2% of standard deviation."""
    with ExitStack() as stack:
        urls = {}
        for arm, itl_ms in ITL_MS.items():
            delays = {"ttft_ms": TTFT_MS, "ttft_ms_std": 0.02 * TTFT_MS, "itl_ms": itl_ms, "itl_ms_std": 0.02 * itl_ms}
            urls[arm] = stack.enter_context(mock_server(**delays, output_tokens=NUM_TOKENS))
        added = {}
        for arm, url in urls.items():
            bare = [ask(int(url.rpartition(":")[2])) for _ in range(12)]
            ttft, itl = (statistics.median(values) for values in zip(*bare, strict=True))
            added[arm] = (ttft - TTFT_MS, itl - ITL_MS[arm])
            print(f"\n{arm}: the mock adds {added[arm][0]:.2f} ms to the first token, {added[arm][1]:.2f} ms to others")
        _, rows = measured(tmp_path, urls, rounds=4)
    samples = Samples(rows)
    for load, streams in (("synchronous", 1), ("concurrency=4", 4)):
        for arm, itl_ms in ITL_MS.items():
            whole_ms = TTFT_MS + added[arm][0] + (NUM_TOKENS - 1) * (itl_ms + added[arm][1])
            known = {
                "ttft_ms": TTFT_MS + added[arm][0],
                "tpot_ms": itl_ms + added[arm][1],
                "latency_ms": whole_ms,
                "tokens_per_s": streams * NUM_TOKENS / whole_ms * 1e3,
            }
            mine = samples.rows(arm, load)
            found = {
                "ttft_ms": drawn(samples, mine, ttft_ms),
                "tpot_ms": drawn(samples, mine, tpot_ms),
                "latency_ms": drawn(samples, mine, lambda row: 1e3 * latency_s(row)),
                "tokens_per_s": drawn_rate(samples, arm, load, tokens),
            }
            for name, value in known.items():
                compare(f"{load} {arm} {name}", found[name], value)
        ratio = (ITL_MS["baseline"] + added["baseline"][1]) / (ITL_MS["medusa"] + added["medusa"][1])
        compare(f"{load} speedup", samples.quotient(load, tpot_ms), ratio)


def drawn(samples: Samples, rows: list[dict[str, Any]], figure: Any) -> Drawn:
    values_PR = samples.grid(rows, figure)
    return Drawn(samples.percentile(values_PR, 50), len(values_PR))


def compare(what: str, found: Drawn | None, known: float) -> None:
    assert found is not None
    assert found.interval is not None
    low, high = found.interval
    print(f"{what:36} known {known:9.3f}  found {found.point:9.3f} [{low:.3f}, {high:.3f}]")
    for value in (found.point, low, high):
        assert value == pytest.approx(known, rel=WITHIN), what


def test_a_server_against_itself_shows_no_speedup(tmp_path: Path) -> None:
    """Twenty benchmarks of two rounds: of 95% intervals, one in twenty may miss what is true."""
    num_runs = 20
    with mock_server(ttft_ms=60, ttft_ms_std=6, itl_ms=12, itl_ms_std=1, output_tokens=NUM_TOKENS) as url:
        urls = {"baseline": url, "medusa": url}
        _, rows = measured(tmp_path, urls, loads=["concurrency=4"], rounds=2 * num_runs)
    found = []
    for run in range(num_runs):
        mine = [row for row in rows if row["round"] // 2 == run]
        ratio = Samples(mine).quotient("concurrency=4", tpot_ms)
        assert ratio is not None
        assert ratio.interval is not None
        found.append(ratio.interval)
        print(f"run {run}: {ratio.point:.4f} [{ratio.interval[0]:.4f}, {ratio.interval[1]:.4f}]")
    holding = sum(low <= 1 <= high for low, high in found)
    widest = max(high - low for low, high in found)
    print(f"1.0 is in {holding} of {num_runs} intervals, the widest {widest:.3f}")
    assert holding >= 17
    assert widest <= 0.10


# ---------------------------------------------------------------------------------------------- not comparable


class Crowd(BaseHTTPRequestHandler):
    """A proxy before a mock server that takes a second for the bytes of each event: what a slow client looks like."""

    target = ("", 0)

    def do_GET(self) -> None:
        self.forward("GET", None)

    def do_POST(self) -> None:
        self.forward("POST", self.rfile.read(int(self.headers["Content-Length"])))

    def forward(self, method: str, body: bytes | None) -> None:
        connection = http.client.HTTPConnection(*self.target, timeout=60)
        connection.request(method, self.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        self.send_response(response.status)
        self.end_headers()
        while line := response.readline():
            if line.startswith(b"data: {"):
                time.sleep(1.0)
            try:
                self.wfile.write(line)
            except BrokenPipeError:  # the benchmark's time limit has cut it off
                break
        connection.close()

    def log_message(self, *_: Any) -> None:
        pass


def refusal(folder: Path, load: str) -> str:
    """What the report says in place of a speedup at a load."""
    found = report.run(str(folder))
    assert found["speedup"][load]["tpot"] is None
    assert found["verdict"]["ship"] is False
    return str(found["speedup"][load]["not_comparable"])


def test_injected_errors_make_arms_not_comparable(tmp_path: Path) -> None:
    delays = {"ttft_ms": 20, "itl_ms": 2, "output_tokens": NUM_TOKENS}
    with mock_server(**delays) as sound, mock_server(**delays, fail_after_requests=20) as failing:
        measured(tmp_path, {"baseline": sound, "medusa": failing}, rounds=1)
    assert "fail" in refusal(tmp_path, "concurrency=4")


def test_requests_that_a_slow_client_cuts_off_make_arms_not_comparable(tmp_path: Path) -> None:
    with mock_server(ttft_ms=20, itl_ms=2, output_tokens=NUM_TOKENS) as url:
        Crowd.target = ("127.0.0.1", int(url.rpartition(":")[2]))
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), Crowd)
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        urls = {"baseline": f"http://127.0.0.1:{proxy.server_port}", "medusa": url}
        measured(tmp_path, urls, rounds=1, loads=["concurrency=4"], max_seconds=30, num_warmup=0)
        proxy.shutdown()
    assert refusal(tmp_path, "concurrency=4") != "None"


def test_a_client_that_cannot_keep_up_makes_arms_not_comparable(tmp_path: Path) -> None:
    """GuideLLM's one worker against a server that answers at once, as fast as it sends."""
    with mock_server(ttft_ms=0, itl_ms=0, output_tokens=400) as url:
        urls = {"baseline": url, "medusa": url}
        config, _ = measured(tmp_path, urls, rounds=1, loads=["throughput"], num_requests=64, max_tokens=400)
    shares = provenance.read_json(f"{config.output}/bench.json")["client"]
    print(shares)
    busiest = max(value for loads in shares.values() for values in loads.values() for value in values)
    assert busiest > 0.3
    if busiest > 0.9:  # a machine that is busy with other things gives the client no whole core
        assert "client" in refusal(tmp_path, "throughput")


def test_request_sets_that_differ_make_arms_not_comparable(tmp_path: Path) -> None:
    """A time limit that ends one arm earlier than the other: its requests are other ones."""
    with (
        mock_server(ttft_ms=20, itl_ms=2, output_tokens=NUM_TOKENS) as fast,
        mock_server(ttft_ms=1500, itl_ms=2, output_tokens=NUM_TOKENS) as slow,
    ):
        urls = {"baseline": slow, "medusa": fast}
        config, _ = measured(tmp_path, urls, rounds=1, loads=["synchronous"], max_seconds=10)
    assert provenance.read_json(f"{config.output}/bench.json")["not_comparable"] == ["synchronous"]
    assert "prompts" in refusal(tmp_path, "synchronous")
