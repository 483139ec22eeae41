"""Chats that a server has answered -> Parquet files that `data` reads: traffic that trains the next heads.

Whatever goes wrong here, no reply fails or waits for it: a chat is left out, and counted by the reason. What chats say
goes into these files and nowhere else, in no message and no log.
"""

import hashlib
import importlib
import itertools
import logging
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import fsspec
import pyarrow as pa

from medusa_ray import parts, records
from medusa_ray.config import TrafficLogConfig

LOG = logging.getLogger("medusa_ray")

Row = dict[str, Any]  # of records.TRAFFIC

REASONS = (
    "text_completion",  # /v1/completions: no messages
    "tools",  # functions that the model may call, which no chat row holds
    "opted_out",  # the request says `store: false`
    "cut_off",  # the client hung up in the middle, or the engine failed
    "empty",  # a reply without text
    "full",  # no memory left for it, as storage is slow or down
    "redacted",  # the hook returned None
    "redact_failed",  # the hook raised, or returned what is no row
    "unwritten",  # storage was down to the end
)
POLL_S = 0.1
MAX_RETRY_S = 60.0
CLOSE_S = 10.0  # below Ray Serve's graceful_shutdown_timeout_s
ROW_BYTES, MESSAGE_BYTES = 1000, 300  # what Python takes for a row and for a message, beside their texts


class TrafficLog:
    """The traffic log of one replica: a buffer, and a thread that writes files of it, each whole or absent."""

    def __init__(self, config: TrafficLogConfig) -> None:
        """Raises ValueError when the hook cannot be imported or nothing here can open such a URI."""
        self.config = config
        self.num_logged = 0
        self.num_failed_writes = 0
        self.num_dropped = dict.fromkeys(REASONS, 0)
        self._redact = _function(config.redact) if config.redact else None
        try:
            fsspec.core.url_to_fs(config.uri)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"traffic_log.uri {config.uri!r} cannot be opened: {error}. Give a folder, or install what it takes."
            ) from error
        # Another start of the same replica must not write over its files; names sort by time.
        self._name = f"train-{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:12]}"
        self._num_files = 0
        self._max_bytes = config.max_buffer_mib * 2**20
        self._lock = threading.Lock()
        self._held_bytes = 0  # of rows that wait and of the batch
        self._waiting: deque[tuple[Row, int]] = deque()
        self._batch: list[pa.RecordBatch] = []  # a row each, since a file's worth at a time would hold the GIL
        self._batch_bytes = 0
        self._begun_s = 0.0  # when the batch got its first row
        self._closing = threading.Event()
        self._closes_s = float("inf")
        self._thread = threading.Thread(target=self._run, name="traffic-log", daemon=True)
        self._thread.start()

    def samples(self, reply_id: str) -> bool:
        """Whether the chat with this reply is one of those to keep; the same wherever and whenever it is asked."""
        start = hashlib.sha256(reply_id.encode()).digest()[:8]
        return int.from_bytes(start, "big") < self.config.share * 2**64

    def add(self, row: Row) -> None:
        """Takes a row of records.TRAFFIC, which from now on is the log's own. Never waits for storage."""
        messages = row["messages"]
        if not messages[-1]["content"].strip():
            self.drop("empty")
            return
        size = ROW_BYTES + sum(MESSAGE_BYTES + sys.getsizeof(message["content"]) for message in messages)
        with self._lock:
            has_room = self._held_bytes + size <= self._max_bytes and not self._closing.is_set()
            self._held_bytes += size * has_room
        if has_room:
            self._waiting.append((row, size))
        else:
            self.drop("full")

    def drop(self, reason: str, num_rows: int = 1) -> None:
        """Counts chats that are left out for one of REASONS."""
        with self._lock:
            self.num_dropped[reason] += num_rows

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Writes what is held, as far as storage takes it in time; what it does not is counted."""
        self._closes_s = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s + 2 * POLL_S)
        if self._thread.is_alive():
            LOG.warning("traffic_log uri=%s hangs; its last file may be missing", self.config.uri)

    # -------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        while True:
            is_last = self._closing.wait(POLL_S)
            while self._waiting:
                self._take(*self._waiting.popleft())
                time.sleep(0)  # a step of the engine goes first
                if len(self._batch) >= self.config.max_rows:
                    self._write()
            is_due = time.monotonic() - self._begun_s >= self.config.max_seconds
            if self._batch and (is_last or is_due or self._held_bytes > self._max_bytes // 2):
                self._write()
            if is_last:
                return

    def _take(self, row: Row, size: int) -> None:
        """Puts into the batch what the hook leaves of a row."""
        reason = "redacted"
        try:
            kept = self._redact(row) if self._redact else row
            if kept is not None:
                if not kept["messages"]:
                    raise ValueError("no messages")
                self._batch.append(pa.RecordBatch.from_pylist([kept], records.TRAFFIC))
        except (Exception, SystemExit) as error:  # a hook may do anything, and the thread has to go on
            kept, reason = None, "redact_failed"
            if not self.num_dropped[reason]:
                # Not the error's text, which may be the chat's. The metrics have the rest of them.
                name = type(error).__name__
                LOG.warning("traffic_log redact=%s raised %s; such chats are dropped", self.config.redact, name)
        if kept is None:
            self.drop(reason)
            self._release(size)
            return
        self._batch_bytes += size
        if len(self._batch) == 1:
            self._begun_s = time.monotonic()

    def _write(self) -> None:
        """Writes the batch, under the same name until it is there."""
        num_rows, name = len(self._batch), f"{self._name}-{self._num_files:06}"
        table = pa.Table.from_batches(self._batch).combine_chunks()
        for attempt in itertools.count():
            try:
                parts.write(self.config.uri, name, table)
                self.num_logged += num_rows
                break
            except Exception as error:  # every kind of storage has errors of its own
                self.num_failed_writes += 1
                LOG.warning("traffic_log file=%s rows=%d not written: %s", name, num_rows, error)
            if time.monotonic() >= self._closes_s:
                self.drop("unwritten", num_rows)
                break
            if self._closing.wait(min(2**attempt, MAX_RETRY_S)):
                time.sleep(POLL_S)
        self._num_files += 1
        self._release(self._batch_bytes)
        self._batch, self._batch_bytes = [], 0

    def _release(self, size: int) -> None:
        with self._lock:
            self._held_bytes -= size


def _function(reference: str) -> Callable[[Row], Row | None]:
    """What `module:function` names. Raises ValueError."""
    module, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may raise anything as it is imported
        reason = f"{type(error).__name__}: {error}"
    else:
        if callable(function):
            return function  # type: ignore[no-any-return]
        reason = f"it is a {type(function).__name__}"
    raise ValueError(
        f"traffic_log.redact {reference!r} is no function that can be imported ({reason}). Name one that every replica "
        "has, by runtime_env or PYTHONPATH."
    )
