"""What a server has answered becomes files that `data` reads, and a reply never pays for it."""

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import ray.serve
from fakes import ScriptedEngine
from fastapi.testclient import TestClient
from test_serve import CHAT, CHAT_URL, COMPLETION_URL, events_of, steps_of, streamed_text

from medusa_ray import config, data, parts, records, serve, traffic
from medusa_ray.chat import Chat
from medusa_ray.config import EngineConfig, RunConfig, ServeConfig, TrafficLogConfig, UserError
from medusa_ray.openai_api import ChatRequest, Envelope
from medusa_ray.serve import Server, build_api
from medusa_ray.serve.calls import Call
from medusa_ray.traffic import TrafficLog

SECRET = "the launch code is 0000"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def chat(tiny_base: Path) -> Chat:
    return Chat.load(str(tiny_base))


def server_of(engine: ScriptedEngine, chat: Chat, folder: Path, **options: Any) -> Server:
    log = TrafficLogConfig(uri=str(folder), **options)
    args = EngineConfig(model_id="medusa", base="base", traffic_log=log)
    return Server(engine, chat, args, TrafficLog(log))  # type: ignore[arg-type]  # a stand-in


@contextmanager
def client_of(engine: ScriptedEngine, chat: Chat, folder: Path, **options: Any) -> Iterator[TestClient]:
    """Its end is the server's, as a replica that drains."""
    with TestClient(build_api(server_of(engine, chat, folder, **options))) as client:
        yield client


def asked(text: str, **fields: Any) -> dict[str, Any]:
    return {**CHAT, "messages": [{"role": "user", "content": text}], **fields}


def rows_in(folder: Path) -> list[Row]:
    return [row for file in sorted(folder.glob("train*.parquet")) for row in pq.read_table(file).to_pylist()]


def row_of(number: int, text: str = "yes") -> Row:
    messages = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": text}]
    return {"id": f"r{number}", "messages": messages, "model": "m", "created": 7, "finish_reason": "stop"}


def dropped(client: TestClient) -> dict[str, int]:
    lines = client.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("medusa_ray_traffic_dropped_total{")]
    return {line.split('reason="')[1].split('"')[0]: int(float(line.split()[-1])) for line in found}


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------- what is logged


def test_a_row_is_the_chat_as_its_client_saw_it(chat: Chat, tmp_path: Path) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hé"}, {"type": "text", "text": "llo"}]},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "go on"},
    ]
    engine = ScriptedEngine(steps_of(chat, "wö", "rld E", "ND of it"))
    with client_of(engine, chat, tmp_path) as client:
        whole = client.post(CHAT_URL, json={**CHAT, "messages": messages, "stop": "END"}).json()
        stream = client.post(CHAT_URL, json={**CHAT, "model": "medusa", "stream": True})
        engine.finish_reason = "length"
        cut = client.post(CHAT_URL, json=CHAT).json()
        assert not rows_in(tmp_path)  # nothing is due yet
    assert [file.suffix for file in tmp_path.iterdir()] == [".parquet"]
    first, second, third = rows_in(tmp_path)
    assert first == {
        "id": whole["id"],
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "héllo"},
            *messages[2:],
            {"role": "assistant", "content": "wörld "},
        ],
        "model": "medusa",
        "created": whole["created"],
        "finish_reason": "stop",
    }
    assert second["id"] == events_of(stream)[0]["id"]
    assert second["messages"][-1]["content"] == streamed_text(stream) == "wörld END of it"
    assert (third["id"], third["finish_reason"]) == (cut["id"], "length")


def test_without_the_section_nothing_is_kept(chat: Chat, tmp_path: Path) -> None:
    assert EngineConfig(model_id="m", base="b").traffic_log is None
    args = EngineConfig(model_id="medusa", base="base")
    engine: Any = ScriptedEngine(steps_of(chat, "a"))
    with TestClient(build_api(Server(engine, chat, args))) as client:
        assert client.post(CHAT_URL, json=CHAT).status_code == 200
        assert "traffic" not in client.get("/metrics").text


def test_the_share_is_chosen_by_the_hash_of_the_replys_id(chat: Chat, tmp_path: Path) -> None:
    """A random choice could not be made again by whoever has to find out whether a chat was kept."""
    ids = []
    with client_of(ScriptedEngine(steps_of(chat, "a")), chat, tmp_path, share=0.25) as client:
        for _ in range(200):
            ids.append(client.post(CHAT_URL, json=CHAT).json()["id"])
    kept = [i for i in ids if int(hashlib.sha256(i.encode()).hexdigest()[:16], 16) / 2**64 < 0.25]
    assert [row["id"] for row in rows_in(tmp_path)] == kept
    assert 20 < len(kept) < 85  # 50 on average, standard deviation 6
    for share, num in ((0.0, 0), (1.0, 200)):
        log = TrafficLog(TrafficLogConfig(uri=str(tmp_path), share=share))
        assert sum(map(log.samples, ids)) == num
        log.close()


def test_what_is_no_whole_chat_or_is_not_to_be_kept_is_left_out_and_counted(
    chat: Chat, tmp_path: Path
) -> None:
    class Dying(ScriptedEngine):
        async def stream(self, request: Any) -> Any:
            async for delta in super().stream(request):
                yield delta
                if self.finish_reason == "dies":
                    raise RuntimeError("the engine has failed: bang")

    engine = Dying(steps_of(chat, "a", "b"))
    with client_of(engine, chat, tmp_path) as client:
        client.post(COMPLETION_URL, json={"model": "medusa", "prompt": SECRET})
        client.post(CHAT_URL, json=asked(SECRET, store=False))
        client.post(CHAT_URL, json=asked(SECRET, temperature=3))  # refused, and so no chat
        engine.finish_reason = "dies"
        client.post(CHAT_URL, json=asked(SECRET, stream=True))
        engine.finish_reason, engine.steps = "stop", [[2]]  # the end of a turn and nothing else
        client.post(CHAT_URL, json=asked(SECRET))
        counts = dict.fromkeys(traffic.REASONS, 0)
        assert dropped(client) == {**counts, "text_completion": 1, "opted_out": 1, "cut_off": 1, "empty": 1}
        engine.steps = steps_of(chat, "a")
        client.post(CHAT_URL, json=asked("fine", store=True))
    assert [row["messages"][0]["content"] for row in rows_in(tmp_path)] == ["fine"]


@pytest.mark.parametrize(("num_steps", "is_kept"), [(1, False), (2, True)])
def test_a_client_that_hangs_up_after_the_last_step_only_leaves_its_chat(
    chat: Chat, tmp_path: Path, num_steps: int, is_kept: bool
) -> None:
    """Many clients close the connection on reading [DONE], before the server gets to do anything more."""
    server = server_of(ScriptedEngine(steps_of(chat, "a", "b")), chat, tmp_path)
    request = ChatRequest.model_validate(CHAT)

    async def scenario() -> None:
        pieces = server.logged(server.answer(request, Call("x")), request, Envelope(request))
        for _ in range(num_steps):
            await anext(pieces)
        await pieces.aclose()

    asyncio.run(scenario())
    server.close()
    assert server.traffic is not None
    assert (len(rows_in(tmp_path)), server.traffic.num_dropped["cut_off"]) == (is_kept, not is_kept)


# ------------------------------------------------------------------------------------------- redaction


def mask(row: Row) -> Row | None:
    """What a user's hook may do, and what it should not."""
    text = row["messages"][0]["content"]
    if "drop" in text:
        return None
    if "raise" in text:
        raise KeyError(text)
    if "exit" in text:
        raise SystemExit(text)
    if "no row" in text:
        return [text]  # type: ignore[return-value]
    if "no text" in text:
        return {**row, "messages": [{"role": "user", "content": 5}]}
    if "no messages" in text:
        return {**row, "messages": None}
    return {
        **row,
        "messages": [{**m, "content": m["content"].replace("0000", "****")} for m in row["messages"]],
    }


def test_a_hook_changes_or_drops_rows_and_fails_no_request(
    chat: Chat, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    texts = ["keep", "drop", "raise", "exit", "no row", "no text", "no messages", "half of a pair"]
    log = TrafficLog(TrafficLogConfig(uri=str(tmp_path), redact="test_traffic:mask"))
    args = EngineConfig(model_id="medusa", base="base", traffic_log=log.config)
    engine: Any = ScriptedEngine(steps_of(chat, "a"))
    with TestClient(build_api(Server(engine, chat, args, log))) as client:
        for text in texts:
            assert client.post(CHAT_URL, json=asked(f"{text}: {SECRET}")).status_code == 200
        wait_until(lambda: sum(log.num_dropped.values()) == 6)
        assert (log.num_dropped["redacted"], log.num_dropped["redact_failed"]) == (1, 5)
    contents = [row["messages"][0]["content"] for row in rows_in(tmp_path)]
    assert contents == ["keep: the launch code is ****", "half of a pair: the launch code is ****"]
    assert "redact=test_traffic:mask raised KeyError" in caplog.text
    assert "launch" not in caplog.text
    assert log.num_logged == 2


@pytest.mark.parametrize(
    ("redact", "reason"),
    [
        ("no_such_module:f", "ModuleNotFoundError"),
        ("test_traffic:no_such_function", "AttributeError"),
        ("test_traffic:SECRET", "it is a str"),
    ],
)
def test_a_hook_that_cannot_be_imported_stops_a_server_from_starting(redact: str, reason: str) -> None:
    """Found out with the first chat, it would be too late for that chat."""
    log = TrafficLogConfig(uri="memory://t", redact=redact)
    message = rf"^traffic_log.redact '{redact}' is no function that can be imported \({reason}.*PYTHONPATH\.$"
    with pytest.raises(ValueError, match=message):
        Server.load(EngineConfig(model_id="m", base="no such base", traffic_log=log))


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (
            {"uri": "u", "redact": "privacy.mask"},
            "traffic_log.redact is 'privacy.mask'; expected 'module:function'",
        ),
        ({"uri": "u", "share": 1.5}, "traffic_log.share is 1.5"),
        ({"share": 1.0}, "traffic_log.uri is missing"),
        ({"uri": "u", "redakt": "a:b"}, "did you mean applications.0.args.traffic_log.redact"),
    ],
)
def test_validate_names_what_is_wrong_with_the_section(section: dict[str, Any], says: str) -> None:
    app = {"name": "a", "args": {"model_id": "m", "base": "b", "traffic_log": section}}
    with pytest.raises(UserError, match=says):
        config.parse(ServeConfig, {"applications": [app]}, "x.yaml")


def test_a_uri_that_nothing_opens_stops_a_server_from_starting() -> None:
    with pytest.raises(ValueError, match=r"traffic_log.uri 'nosuch://x' cannot be opened"):
        TrafficLog(TrafficLogConfig(uri="nosuch://x"))


# ------------------------------------------------------------------------------------------- files


def test_files_end_by_number_of_rows_by_time_and_at_the_servers_end(tmp_path: Path) -> None:
    log = TrafficLog(TrafficLogConfig(uri=str(tmp_path / "rows"), max_rows=3))
    for number in range(7):
        log.add(row_of(number))
    log.close()
    files = [pq.read_table(file) for file in sorted((tmp_path / "rows").iterdir())]
    assert [file.num_rows for file in files] == [3, 3, 1]
    assert [file.schema for file in files] == [records.TRAFFIC] * 3
    assert rows_in(tmp_path / "rows") == [row_of(number) for number in range(7)]

    log = TrafficLog(TrafficLogConfig(uri=str(tmp_path / "time"), max_seconds=0.2))
    log.add(row_of(0))
    wait_until(lambda: log.num_logged == 1)
    assert rows_in(tmp_path / "time") == [row_of(0)]
    log.close()
    again = TrafficLog(TrafficLogConfig(uri=str(tmp_path / "time")))
    again.add(row_of(1))
    again.close()
    assert len(rows_in(tmp_path / "time")) == 2


class Storage:
    """Refuses to write until it is up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_up, self._write = False, parts.write
        monkeypatch.setattr(parts, "write", self.write)
        monkeypatch.setattr(traffic, "MAX_RETRY_S", 0.05)

    def write(self, *args: Any) -> None:
        if not self.is_up:
            raise PermissionError("503 slow down")
        self._write(*args)


def test_rows_wait_for_storage_that_is_down_as_far_as_memory_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(monkeypatch)
    log = TrafficLog(TrafficLogConfig(uri=str(tmp_path), max_rows=1, max_buffer_mib=1))
    start_s = time.perf_counter()
    for number in range(6):
        log.add(row_of(number, "x" * 300_000))
    assert time.perf_counter() - start_s < 1  # adding waits for nothing
    wait_until(lambda: log.num_failed_writes > 2)
    assert log.num_dropped["full"] == 3
    storage.is_up = True
    wait_until(lambda: log.num_logged == 3)
    for number in range(6, 9):  # there is room again
        log.add(row_of(number, "x" * 300_000))
    log.close()
    assert [row["id"] for row in rows_in(tmp_path)] == ["r0", "r1", "r2", "r6", "r7", "r8"]
    assert log.num_dropped["full"] == 3


def test_large_rows_are_written_before_the_buffer_is_full(tmp_path: Path) -> None:
    log = TrafficLog(TrafficLogConfig(uri=str(tmp_path), max_buffer_mib=1))
    for number in range(8):
        log.add(row_of(number, "x" * 300_000))
        wait_until(lambda number=number: not log._waiting)  # type: ignore[misc]  # bound at once
        time.sleep(2 * traffic.POLL_S)
    log.close()
    assert (log.num_logged, log.num_dropped["full"]) == (8, 0)


def test_a_server_ends_in_time_although_storage_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Storage(monkeypatch)
    log = TrafficLog(TrafficLogConfig(uri=str(tmp_path), max_rows=2))
    for number in range(5):
        log.add(row_of(number))
    start_s = time.monotonic()
    log.close(timeout_s=0.5)
    assert time.monotonic() - start_s < 2
    wait_until(lambda: log.num_dropped["unwritten"] == 5)
    assert log.num_logged == 0
    log.add(row_of(6))
    assert log.num_dropped["full"] == 1


# ------------------------------------------------------------------------------------------- the loop, with Ray


@pytest.mark.ray
def test_what_a_deployed_model_answered_are_the_chats_of_the_next_run(
    ray_cluster: None, tiny_base: Path, tmp_path: Path
) -> None:
    log = {"uri": str(tmp_path / "traffic"), "max_rows": 4}
    args = {
        "model_id": "medusa",
        "base": str(tiny_base),
        "dtype": "float32",
        "device": "cpu",
        "compile": "no",
    }
    app = {"name": "medusa", "args": {**args, "traffic_log": log}}
    raw = {"http_options": {"port": serve.free_port()}, "applications": [app]}
    url = serve.deploy(config.parse(ServeConfig, raw, "loop.yaml"))["medusa"]
    assert httpx.get(f"{url}/info").json()["logged_share"] == 1.0
    said = {}
    for number in range(10):
        body = asked(f"question {number}", max_tokens=12, ignore_eos=True, seed=number)
        reply = httpx.post(f"{url}{CHAT_URL}", json=body, timeout=60).json()
        said[f"{reply['id']}/0"] = (body["messages"], reply["choices"][0]["message"]["content"])
    serve.shutdown()
    ray.serve.shutdown()
    assert len(list((tmp_path / "traffic").glob("*.parquet"))) >= 3

    model = {"base": str(tiny_base), "dtype": "float32", "device": "cpu"}
    run = {"model": model, "data": {"train": log["uri"]}, "output": str(tmp_path / "run")}
    folder = data.run(config.parse(RunConfig, run, "next.yaml"))
    prompts = [
        row
        for split in ("train", "test")
        for name in parts.names(f"{folder}/{split}")
        for row in parts.read(f"{folder}/{split}", name).to_pylist()
    ]
    assert {row["id"]: (row["messages"], row["reference"]) for row in prompts if not row["error"]} == {
        i: chat for i, chat in said.items() if chat[1].strip()
    }


def test_the_example_pair_closes_the_loop() -> None:
    """The folder that one file names is the one that the other reads."""
    configs = Path(__file__).parents[1]
    served = config.load(ServeConfig, configs / "serve_configs" / "demo_traffic_log.yaml")
    run = config.read(configs / "train_configs" / "demo_from_traffic.yaml")
    (log,) = [app.args.traffic_log for app in served.applications]
    assert log is not None
    assert json.dumps(run["data"]).count(log.uri) == 1
