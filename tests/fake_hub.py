"""A hub in memory on loopback: repos, branches, commits and large files, as huggingface_hub 2.4 asks for them.

It speaks create, preupload, the LFS batch with uploads in one piece and in parts, commit, tree and resolve, but no Xet.
What it is asked is in `requests`; `faults` say what goes wrong and how often.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

SIGNATURE = "c1d2e3f4a5b6c7d8"  # signs the addresses of uploads, as good as a token while it lasts


@dataclass
class Repo:
    is_private: bool
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # hash -> files
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        commit = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        self.messages.append(message)
        return commit

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


@dataclass
class Fault:
    """What happens to the requests of this method whose path has this in it: a status, a cut or a stall."""

    method: str
    path: str
    status: int | None = None
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body, its or the answer's
    stall: bool = False  # at cut_after, until the server ends
    times: int = 1_000_000


@dataclass
class FakeHub:
    url: str = ""
    users: dict[str, str] = field(default_factory=dict)  # token -> user
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    part_size: int | None = None  # of uploads in parts
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)  # that resolve was asked for
    stalled: threading.Event = field(default_factory=threading.Event)
    kept: threading.Event = field(default_factory=threading.Event)  # a large file has come
    ending: threading.Event = field(default_factory=threading.Event)
    lie: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> what tree says of it instead
    served: dict[str, bytes] = field(default_factory=dict)  # name -> what resolve gives instead
    makes_public: bool = False
    ignores: str = ""  # a name that its .gitignore has

    def writes(self) -> list[tuple[str, str]]:
        return [(method, path) for method, path in self.requests if method not in ("GET", "HEAD")]

    def uploads(self) -> list[str]:
        return [path for method, path in self.requests if method == "PUT"]

    def make(self, repo: str, files: dict[str, bytes], *, is_private: bool = True) -> Repo:
        made = self.repos[repo] = Repo(is_private)
        made.commit("main", files, "initial commit")
        return made


@contextmanager
def serving() -> Iterator[FakeHub]:
    hub = FakeHub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.ending.set()
        server.shutdown()
        server.server_close()
        thread.join()


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".pt"))


class Cut(Exception):
    """The connection ends here."""


class Refusal(Exception):
    def __init__(self, status: int, message: str, **headers: str) -> None:
        self.status, self.message, self.headers = status, message, headers


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, and the second would wait 40 ms

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_one()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_one(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.fault = next(
            (f for f in self.hub.faults if f.method == self.command and f.path in path and f.times > 0), None
        )
        try:
            if self.fault:
                self.fault.times -= 1
            self.body = self.read_body()
            if self.fault and self.fault.status:
                raise Refusal(self.fault.status, self.fault.message, **self.fault.headers)
            self.answer(path)
        except Refusal as refusal:
            self.send(refusal.status, {"error": refusal.message}, refusal.headers)
        except (Cut, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            self.connection.close()

    def read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(pieces)
        else:
            length = int(self.headers.get("Content-Length", 0))
            if self.fault and self.fault.cut_after is not None and self.command != "GET":
                self.rfile.read(min(self.fault.cut_after, length))
                if self.fault.stall:
                    self.hub.stalled.set()
                    self.hub.ending.wait()
                raise Cut
            body = self.rfile.read(length)
        return body

    def send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.cut_after is not None:
            self.wfile.write(content[: self.fault.cut_after])
            self.wfile.flush()
            raise Cut
        self.wfile.write(content)

    # ---------------------------------------------------------------------------------------------- routes

    def answer(self, path: str) -> None:
        for method, pattern, route in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                route(self, *match.groups())
                return
        raise Refusal(404, f"no route {self.command} {path}")

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(
                401,
                f"Invalid credentials: {token}",
                **{"X-Error-Message": "Invalid credentials in Authorization header"},
            )
        return self.hub.users.get(token)

    def repo(self, name: str, *, writes: bool = False) -> Repo:
        user, repo = self.user(), self.hub.repos.get(name)
        is_owner = name.split("/")[0] == user
        if repo is None or (repo.is_private and not is_owner):
            raise Refusal(404 if user else 401, "Repository not found", **{"X-Error-Code": "RepoNotFound"})
        if writes and not is_owner:
            raise Refusal(403, "you have no right to write here")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", **{"X-Error-Code": "RevisionNotFound"})
        return commit

    def create(self) -> None:
        asked, user = json.loads(self.body), self.user()
        name = f"{asked['organization'] or user}/{asked['name']}"
        if user is None or asked["organization"] not in (None, user):
            raise Refusal(403, f"you have no right to make repos under {asked['organization']}")
        if name in self.hub.repos:
            self.send(409, {"error": "You already created this repo", "url": f"{self.hub.url}/{name}"})
            return
        is_private = asked.get("visibility") == "private" and not self.hub.makes_public
        self.hub.make(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, is_private=is_private)
        self.send(200, {"url": f"{self.hub.url}/{name}"})

    def info(self, name: str, revision: str | None = None) -> None:
        repo = self.repo(name)
        self.send(
            200, {"id": name, "private": repo.is_private, "sha": self.commit_of(repo, revision or "main")}
        )

    def tree(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": "training", "oid": "0" * 40, "size": 0}
        ]
        for file, content in repo.commits[self.commit_of(repo, revision)].items():
            entry = {"type": "file", "path": file, "size": len(content)}
            entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if is_large(file):
                sha256 = hashlib.sha256(content).hexdigest()
                entry |= {"oid": "1" * 40, "lfs": {"oid": sha256, "size": len(content), "pointerSize": 134}}
            entries.append(entry | self.hub.lie.get(file, {}))
        self.send(200, entries)

    def branch(self, name: str, branch: str) -> None:
        repo = self.repo(name, writes=True)
        repo.branches[branch] = self.commit_of(repo, json.loads(self.body).get("startingPoint", "main"))
        self.send(200, {})

    def preupload(self, name: str, revision: str) -> None:
        repo = self.repo(name, writes=True)
        files = repo.commits[self.commit_of(repo, revision)]
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            oid = None
            if path in files:
                content = files[path]
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                oid = hashlib.sha256(content).hexdigest() if is_large(path) else oid
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if is_large(path) else "regular",
                    "shouldIgnore": path == self.hub.ignores,
                    "oid": oid,
                }
            )
        self.send(200, {"files": answers})

    def batch(self, name: str) -> None:
        self.repo(name, writes=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.hub.large:
                href, header = f"{self.hub.url}/large/{oid}?X-Amz-Signature={SIGNATURE}", {}
                if self.hub.part_size and size > self.hub.part_size:
                    numbers = range(1, -(-size // self.hub.part_size) + 1)
                    header = {
                        str(n): f"{self.hub.url}/part/{oid}/{n}?X-Amz-Signature={SIGNATURE}" for n in numbers
                    }
                    header["chunk_size"] = str(self.hub.part_size)
                answer["actions"] = {"upload": {"href": href, "header": header}}
            objects.append(answer)
        self.send(200, {"objects": objects, "transfer": "basic"})

    def put_large(self, oid: str) -> None:
        self.keep(oid, self.body)
        self.send(200, {})

    def put_part(self, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = self.body
        self.send(200, {}, {"ETag": f'"{number}"'})

    def complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self.keep(oid, b"".join(self.hub.parts[oid, number] for number in numbers))
        self.send(200, {})

    def keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the digest is another")
        self.hub.large[oid] = content
        self.hub.kept.set()

    def make_commit(self, name: str, branch: str) -> None:
        repo = self.repo(name, writes=True)
        header, *lines = (json.loads(line) for line in self.body.splitlines())
        head = self.commit_of(repo, branch)
        if header["value"].get("parentCommit", head) != head:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.large:
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                raise Refusal(400, f"cannot commit {line['key']} {value['path']}")
        commit = repo.commit(branch, files, header["value"]["summary"])
        self.send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def validate_yaml(self) -> None:
        self.send(200, {"warnings": [], "errors": []})

    def resolve(self, name: str, revision: str, file: str) -> None:
        repo = self.repo(name)
        files = repo.commits[self.commit_of(repo, revision)]
        if file not in files:
            raise Refusal(404, "Entry not found", **{"X-Error-Code": "EntryNotFound"})
        content = self.hub.served.get(file, files[file])
        if wanted := self.headers.get("Range"):
            self.hub.ranges.append(wanted)
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send(
                206,
                content[first:],
                {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"},
            )
        else:
            self.send(200, content)


NAME = r"([^/]+/[^/]+)"
KIND = "(?:models|datasets)"  # told apart by nothing here
ROUTES = (
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"/api/{KIND}/{NAME}", Handler.info),
    ("GET", rf"/api/{KIND}/{NAME}/revision/(.+)", Handler.info),
    ("GET", rf"/api/{KIND}/{NAME}/tree/(.+)", Handler.tree),
    ("POST", rf"/api/{KIND}/{NAME}/branch/(.+)", Handler.branch),
    ("POST", rf"/api/{KIND}/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/api/{KIND}/{NAME}/commit/(.+)", Handler.make_commit),
    ("POST", rf"/(?:datasets/)?{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/large/(\w+)", Handler.put_large),
    ("POST", r"/large/(\w+)", Handler.complete),
    ("PUT", r"/part/(\w+)/(\d+)", Handler.put_part),
    ("GET", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
)
