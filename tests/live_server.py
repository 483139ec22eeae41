"""A server in a process of its own, as uvicorn runs it, with an eye on its engine; and clients that need not behave.

The process wraps the product's application in `Watched`, which answers one more route, /watched. It is not part of the
product: what is measured there is what a client cannot see.
"""

import argparse
import asyncio
import contextvars
import gc
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HOST = "127.0.0.1"
WATCH_ID = "x-watch-id"  # header of the requests that are followed
LAG_PERIOD_S = 0.02

_watch_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("watch_id", default=None)


# ------------------------------------------------------------------------------------------------ the process


class Watched:
    """An ASGI application around another: /watched tells of engine, event loop and memory, and forgets the traces."""

    def __init__(self, app: Any, server: Any, step_s: float = 0.0) -> None:
        self.app, self.engine = app, server.engine
        self.num_steps = 0
        self.traces: dict[str, dict[str, Any]] = {}
        self.max_lag_s = self.max_busy_s = 0.0
        self._followed: dict[Any, str] = {}  # by sequence
        self._beat: asyncio.Task[None] | None = None
        self._watch_engine(step_s)

    def _watch_engine(self, step_s: float) -> None:
        """Counts and slows the steps; notes when sequences come, are cancelled and lose their pages."""
        engine, scheduler = self.engine, self.engine.scheduler
        take_in, add, cancel, release = engine._take_in, scheduler.add, scheduler.cancel, scheduler.release

        def counted_take_in() -> Any:
            self.num_steps += 1
            time.sleep(step_s)
            return take_in()

        def noted_add(sequence: Any) -> None:
            if watch_id := _watch_id.get():
                self._followed[sequence] = watch_id
                self._note(watch_id, "added")
            add(sequence)

        def noted_cancel(sequence: Any) -> None:
            if watch_id := self._followed.get(sequence):
                self._note(watch_id, "cancelled")
            cancel(sequence)

        def noted_release() -> Any:
            stay = release()
            for sequence in [s for s in list(self._followed) if s.finish_reason]:
                self._note(self._followed.pop(sequence), "freed")
            return stay

        engine._take_in, scheduler.add = counted_take_in, noted_add
        scheduler.cancel, scheduler.release = noted_cancel, noted_release

    def _note(self, watch_id: str, what: str) -> None:
        trace = self.traces.setdefault(watch_id, {})
        trace.setdefault(f"{what}_s", time.monotonic())
        trace.setdefault(f"{what}_step", self.num_steps)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._beat is None:
            self._beat = asyncio.create_task(self._measure_lag())
        if scope["type"] == "http" and scope["path"].endswith("/watched"):
            await self._tell(send)
            return
        headers = dict(scope.get("headers", ()))
        watch_id = headers.get(WATCH_ID.encode(), b"").decode() or None
        _watch_id.set(watch_id)

        async def noted_receive() -> Any:
            message = await receive()
            if watch_id and message["type"] == "http.disconnect":
                self._note(watch_id, "heard")
            return message

        await self.app(scope, noted_receive, send)

    async def _measure_lag(self) -> None:
        """How long the event loop stood still, and how much of a processor's time it took for that: where others want
        the processors too, as in tests, only the latter says whose fault it was."""
        while True:
            before_s, busy_s = time.monotonic(), time.thread_time()
            await asyncio.sleep(LAG_PERIOD_S)
            self.max_lag_s = max(self.max_lag_s, time.monotonic() - before_s - LAG_PERIOD_S)
            self.max_busy_s = max(self.max_busy_s, time.thread_time() - busy_s)

    async def _tell(self, send: Any) -> None:
        scheduler = self.engine.scheduler
        facts = {
            "num_open": scheduler.num_open,
            "num_running": len(scheduler.running),
            "num_free_pages": self.engine.cache.num_free_pages,
            "num_steps": self.num_steps,
            "max_lag_s": self.max_lag_s,
            "max_busy_s": self.max_busy_s,
            "num_tasks": len(asyncio.all_tasks()),
            "num_files": psutil.Process().num_fds(),
            "rss_mib": psutil.Process().memory_info().rss / 2**20,
            "failure": repr(self.engine.failure) if self.engine.failure else None,
            "traces": self.traces,
        }
        self.traces, self.max_lag_s, self.max_busy_s = {}, 0.0, 0.0
        body = json.dumps(facts).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("args", type=json.loads, help="an EngineConfig as JSON")
    parser.add_argument("--step-s", type=float, default=0.0, help="what each step of the engine is slowed by")
    options = parser.parse_args()

    import torch
    import uvicorn

    from medusa_ray.config import EngineConfig
    from medusa_ray.serve import Server, build_api

    torch.set_num_threads(1)
    server = Server.load(EngineConfig(**options.args))
    gc.freeze()  # as a replica does
    app = Watched(build_api(server), server, options.step_s)
    listener = socket.create_server((HOST, 0), backlog=2048)
    print(f"port={listener.getsockname()[1]}", flush=True)
    # As Ray Serve sets uvicorn up.
    config = uvicorn.Config(app, lifespan="on", access_log=False, log_level="warning", timeout_keep_alive=5)
    uvicorn.Server(config).run(sockets=[listener])


# ------------------------------------------------------------------------------------------------ its parent


@dataclass
class Live:
    """A server that runs."""

    port: int
    log: Path  # what the process writes to stderr
    prefix: str = ""

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}{self.prefix}"

    def watched(self) -> dict[str, Any]:
        """What the process tells of itself. Traces and the greatest lag are those since the last call."""
        answer = asyncio.run(self.watched_async())
        return answer

    async def watched_async(self) -> dict[str, Any]:
        return (await ask(self, "GET", "/watched")).json()


@contextmanager
def live_server(folder: Path, step_s: float = 0.0, **args: Any) -> Iterator[Live]:
    """A server of these EngineConfig fields in a process of its own; it must end cleanly."""
    base = {"model_id": "medusa", "dtype": "float32", "device": "cpu", "compile": "no", **args}
    log = folder / "server.log"
    here = Path(__file__)
    paths = [str(here.parent.parent), str(here.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    command = [sys.executable, str(here), json.dumps(base), "--step-s", str(step_s)]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=env, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("port="), log.read_text()[-2000:]
        live = Live(int(line.removeprefix("port=")), log)
        asyncio.run(until_ready(live))
        yield live
        assert process.poll() is None, log.read_text()[-2000:]
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    # Nobody sees a 500 that is sent to who has left; the log does.
    assert "Traceback" not in log.read_text(), log.read_text()[-4000:]


async def until_ready(live: Live, limit_s: float = 240) -> None:
    deadline_s = time.monotonic() + limit_s
    while True:
        with suppress(OSError):
            if (await ask(live, "GET", "/health")).status == 200:
                return
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.1)


async def until_idle(live: Live, limit_s: float = 30) -> dict[str, Any]:
    """What the process tells of itself once nothing runs or waits there."""
    deadline_s = time.monotonic() + limit_s
    traces: dict[str, Any] = {}
    while True:
        facts = await live.watched_async()
        traces |= facts["traces"]
        if not facts["num_open"]:
            return {**facts, "traces": traces}
        assert time.monotonic() < deadline_s, facts
        await asyncio.sleep(0.05)


# ------------------------------------------------------------------------------------------------ raw clients


@dataclass
class Answer:
    """An HTTP response as it came."""

    status: int
    headers: dict[str, str]
    body: bytes
    took_s: float = 0.0

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One HTTP/1.1 connection at the level of bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, live: Live) -> "Connection":
        return cls(*await asyncio.open_connection(HOST, live.port, limit=2**24))

    async def send(self, raw: bytes) -> None:
        self.writer.write(raw)
        await self.writer.drain()

    async def head(self) -> Answer:
        """Status and headers of the next response. Raises IncompleteReadError where the server hangs up instead."""
        raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines if line)
        return Answer(int(first.split()[1]), {k.lower(): v for k, v in headers.items()}, b"")

    async def chunk(self) -> bytes:
        """The next piece of a chunked body; empty at its end."""
        size = int((await self.reader.readline()).strip() or b"-1", 16)
        if size < 0:
            raise asyncio.IncompleteReadError(b"", None)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def answer(self, method: str = "POST") -> Answer:
        """The next response to a request of this method, whole."""
        answer = await self.head()
        if method == "HEAD" or answer.status in (100, 204, 304):
            return answer
        if answer.headers.get("transfer-encoding") == "chunked":
            while piece := await self.chunk():
                answer.body += piece
        elif "content-length" in answer.headers:
            answer.body = await self.reader.readexactly(int(answer.headers["content-length"]))
        return answer

    def close(self, abruptly: bool = False) -> None:
        """Hangs up, with a FIN or abruptly with a RST."""
        if abruptly:
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # on, for 0 s
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.writer.transport.abort()
        else:
            self.writer.close()


def request_bytes(live: Live, method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    lines = {"host": HOST, "content-type": "application/json", "content-length": str(len(body)), **named}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {live.prefix}{path} HTTP/1.1\r\n{head}\r\n".encode() + body


async def ask(live: Live, method: str, path: str, fields: Any = None, **headers: str) -> Answer:
    """One request on a connection of its own; `fields` are JSON, or bytes as they are."""
    body = fields if isinstance(fields, bytes) else b"" if fields is None else json.dumps(fields).encode()
    started_s = time.monotonic()
    connection = await Connection.open(live)
    try:
        await connection.send(request_bytes(live, method, path, body, connection="close", **headers))
        answer = await connection.answer()
        answer.took_s = time.monotonic() - started_s
        return answer
    finally:
        connection.close()


if __name__ == "__main__":
    main()
