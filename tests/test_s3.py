"""Chats from a bucket and rows into it, while it stumbles, falls silent and goes down: none is lost or doubled."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from fsspec import AbstractFileSystem
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from test_distill import config_of, make_prompts, rows_of, worker
from werkzeug.serving import make_server

from medusa_ray import distill, parts

Environ = dict[str, Any]
StartResponse = Callable[..., Any]

# The verb `run` as far as these stages, in a process of its own.
DRIVER = "from medusa_ray import cli; cli.STAGES = ('data', 'distill'); cli.main()"
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
GONE = b"<Error><Code>ServiceUnavailable</Code><Message>The bucket is being moved.</Message></Error>"


class QuietHandler(MotoRequestHandler):
    def log(self, *_: Any) -> None:
        pass


@dataclass
class Bucket:
    """moto's S3 behind a door that may refuse a request, carry it out and say that it did not, or never answer."""

    refused: int = 0  # every which request, counted from 1; 0 for none
    done_but_denied: int = 0
    silent: int = 0
    silence_s: float = 2.0
    goes_down_after: float = float("inf")  # so many parts
    num_requests: int = 0
    num_parts: int = 0
    faults: dict[str, int] = field(
        default_factory=lambda: {"refused": 0, "denied": 0, "silent": 0, "down": 0}
    )

    def __post_init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = Lock()
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=QuietHandler)
        self.url = f"http://127.0.0.1:{self._server.port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        with self._lock:
            fault = self._fault(environ)
            if fault:
                self.faults[fault] += 1
        if fault == "silent":
            time.sleep(self.silence_s)
        if fault == "denied":
            list(self._moto(environ, lambda *_: lambda _: None))
        if fault:
            body = b"" if environ["REQUEST_METHOD"] == "HEAD" else GONE if fault == "down" else SLOW_DOWN
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            start_response("503 Service Unavailable", headers)
            return [body]
        return self._moto(environ, start_response)

    def _fault(self, environ: Environ) -> str | None:
        self.num_requests += 1
        if self.num_parts >= self.goes_down_after:
            return "down"
        is_part = environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].endswith(".parquet")
        self.num_parts += is_part
        for fault, every in (
            ("refused", self.refused), ("denied", self.done_but_denied), ("silent", self.silent),
        ):  # fmt: skip
            if every and self.num_requests % every == 0:
                return fault
        return None


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    bucket = Bucket()
    # moto keeps what it holds for as long as the process lives.
    urllib.request.urlopen(f"{bucket.url}/moto-api/reset", data=b"").close()
    yield bucket
    bucket.stop()


def options_of(bucket: Bucket, **client: Any) -> dict[str, Any]:
    return {"key": "k", "secret": "s", "endpoint_url": bucket.url, "config_kwargs": client}


def settings_of(bucket: Bucket, **client: Any) -> dict[str, str]:
    """Variables that tell fsspec's S3 where the bucket is, and whose patience it has."""
    return {"FSSPEC_S3": json.dumps(options_of(bucket, **client)), "AWS_EC2_METADATA_DISABLED": "true"}


def filesystem_of(bucket: Bucket) -> AbstractFileSystem:
    return fsspec.filesystem("s3", **options_of(bucket), skip_instance_cache=True)


@dataclass
class Job:
    """Chats in a bucket, and a run that reads them there and writes there."""

    bucket: Bucket
    file: Path
    environment: dict[str, str]

    @classmethod
    def make(cls, bucket: Bucket, folder: Path, base: Path, num_chats: int, **client: Any) -> "Job":
        filesystem = filesystem_of(bucket)
        filesystem.mkdir("bucket")
        chats = [
            {"id": f"chat{i}", "messages": [{"role": "user", "content": f"{'why ' * (i % 5)}{i}"}]}
            for i in range(num_chats)
        ]
        lines = "".join(json.dumps(chat) + "\n" for chat in chats)
        filesystem.pipe_file("bucket/chats/train.jsonl", lines.encode())
        filesystem.pipe_file("bucket/chats/test.jsonl", lines.encode())
        config = {
            "output": "s3://bucket/run",
            "model": {"base": str(base), "dtype": "float32", "device": "cpu"},
            "data": {"train": "s3://bucket/chats"},
            "distill": {"num_actors": 2, "batch_size": 4, "rows_per_part": 4, "max_new_tokens": 8},
            "hidden": {"mode": "compute"},
        }
        file = folder / "run.yaml"
        file.write_text(yaml.safe_dump(config))
        variables = settings_of(bucket, **client)
        job = {"runtime_env": {"env_vars": variables}}  # as `ray job submit --runtime-env-json` hands it on
        environment = {
            **os.environ, **variables,
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job),
        }  # fmt: skip
        return cls(bucket, file, environment)

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DRIVER, "run", str(self.file)]
        return subprocess.Popen(command, env=self.environment, stderr=subprocess.PIPE, text=True)

    def run(self) -> tuple[int, str]:
        """Exit code, and what stood on stderr."""
        with self.start() as driver:
            _, said = driver.communicate(timeout=900)
        return driver.returncode, said

    def rows(self) -> list[dict[str, Any]]:
        filesystem = filesystem_of(self.bucket)
        files = sorted(filesystem.glob("bucket/run/distilled/*.parquet"))
        return [row for file in files for row in pq.read_table(filesystem.open(file)).to_pylist()]


def check(job: Job, num_chats: int) -> None:
    """Ids out are ids in, none twice, in parts that can all be read; and no writer left anything half done."""
    assert [row["id"] for row in job.rows()] == [f"chat{i}/0/0" for i in range(num_chats)]
    left = [
        file
        for file in filesystem_of(job.bucket).find("bucket/run")
        if ".parquet." in file or ".json." in file
    ]
    assert left == []


def run_to_its_end(job: Job) -> int:
    """The same command until it is through. How often it stopped, each time with a message."""
    for stops in range(9):
        code, said = job.run()
        if code == 0:
            return stops
        assert code == 2, said
        assert "Traceback" not in said
        (message,) = (line for line in said.splitlines() if line.startswith("medusa-ray: "))
        print(message)
    raise AssertionError("nine starts were not enough")


def test_workers_get_every_part_into_a_bucket_that_stumbles(
    bucket: Bucket, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails is a failure of storage, and whatever is there is whole."""
    monkeypatch.setitem(
        fsspec.config.conf, "s3", options_of(bucket, read_timeout=1, retries={"max_attempts": 1})
    )
    filesystem_of(bucket).mkdir("bucket")
    prompts = make_prompts("s3://bucket/run", tiny_base)
    config = config_of("s3://bucket/run", tiny_base)
    folder = config.artifact("distilled")
    parts.begin(folder, "key")
    shards = list(distill.plan("s3://bucket/run/prompts/train", 4))
    bucket.refused, bucket.done_but_denied, bucket.silent, bucket.silence_s = 17, 37, 97, 1.5
    left = [shard["part"] for shard in shards]
    while left:
        try:
            generator = worker(config)
            for shard in shards:
                if shard["part"] in left:
                    generator(shard)
            left = sorted(set(left) - parts.begin(folder, "key"))
        except Exception as error:
            if not parts.storage_error(error):
                raise
    print(f"\n{bucket.num_requests} requests, faults {bucket.faults}")
    assert [row["id"] for row in rows_of(config, "distilled")] == [f"{prompt['id']}/0" for prompt in prompts]
    assert len(rows_of(config, "hidden")) == len(prompts) - 2
    assert min(bucket.faults[name] for name in ("refused", "denied", "silent")) > 0


def test_a_part_is_so_many_requests_to_a_bucket_however_many_there_are(
    bucket: Bucket, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at the whole folder for each would be thousands, of a billion rows."""
    monkeypatch.setitem(fsspec.config.conf, "s3", options_of(bucket))
    filesystem_of(bucket).mkdir("bucket")
    make_prompts("s3://bucket/run", tiny_base)
    config = config_of("s3://bucket/run", tiny_base)
    generator = worker(config)
    generator.hidden = None  # captured states are a second file
    numbers = []
    for shard in distill.plan("s3://bucket/run/prompts/train", 4):
        before = bucket.num_requests
        generator(shard)
        numbers.append(bucket.num_requests - before)
    print(f"\n{numbers} requests")
    assert max(numbers) <= 25


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_bucket_that_stumbles_and_goes_down_costs_time_and_no_row(
    ray_cluster: None, bucket: Bucket, tmp_path: Path, tiny_base: Path
) -> None:
    job = Job.make(bucket, tmp_path, tiny_base, 12, read_timeout=1, retries={"max_attempts": 3})
    bucket.refused, bucket.done_but_denied, bucket.silent = 17, 23, 79
    bucket.goes_down_after = 3
    code, said = job.run()
    assert code == 2, said
    assert "Traceback" not in said
    assert "medusa-ray: storage failed: OSError: [Errno 16] " in said
    assert "the same command goes on" in said
    bucket.goes_down_after = float("inf")
    run_to_its_end(job)
    check(job, 12)
    print(f"\n{bucket.num_requests} requests, faults {bucket.faults}")
    assert min(bucket.faults.values()) > 0


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_drivers_killed_on_a_bad_day_of_the_bucket_lose_no_row(
    ray_cluster: None, bucket: Bucket, tmp_path: Path, tiny_base: Path
) -> None:
    """With the patience that S3's client has by itself."""
    job = Job.make(bucket, tmp_path, tiny_base, 100)
    bucket.refused, bucket.done_but_denied, bucket.silent, bucket.silence_s = 13, 17, 301, 20.0
    ends = []
    for parts_more in (3, 5, 5):
        with job.start() as driver:
            goal = bucket.num_parts + parts_more
            while bucket.num_parts < goal and driver.poll() is None:
                time.sleep(0.1)
            driver.kill()
        ends.append(driver.returncode)
    bucket.goes_down_after = bucket.num_parts + 4
    ends.append(job.run()[0])
    bucket.goes_down_after = float("inf")
    stops = run_to_its_end(job)
    print(f"\nexit codes {ends}, {stops} stops; {bucket.num_requests} requests, faults {bucket.faults}")
    assert ends == [-9, -9, -9, 2]
    check(job, 100)
