"""heads/ -> a repo of the hub, and a repo -> heads/.

Only the files of LISTED travel, either way. `push` makes one commit of all that the repo lacks, so that a reader sees
the old heads or the new ones; large files are stored there before, by their digest, and what has arrived is not sent
again. `pull` fills a hidden folder beside the one that is asked for, verifies it by digest and moves it there whole.
Nothing that is pulled is executed or unpickled.
"""

import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_url
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, validate_repo_id

from medusa_ray import provenance
from medusa_ray.config import UserError
from medusa_ray.medusa import layouts
from medusa_ray.medusa.heads import WEIGHTS
from medusa_ray.medusa.tensors import check_finite

# The files of heads, in our layout and in those of other engines. No pattern: what nobody thought of stays at home.
LISTED = re.compile(
    r"medusa_lm_head\.(safetensors|pt)|medusa_heads\.safetensors"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|(config|tree|accuracy|provenance)\.json|README\.md"
)
TENSORS = (".safetensors", ".pt")
RECORD = "hub.json"  # in a folder that was pulled: from which commit, and the digest of each file
MAX_TEXT = 16 * 2**20  # bytes of a file that is no tensors; the index of a large model has one
MAX_ENTRIES = 10_000  # of a repo's top folder
CHUNK = 2**20
TIMEOUT_S = 30.0  # of the first question, so that a hub which never answers is noticed

# What no file may carry to a hub. A container@account of Azure's URIs is no password, hence the colon.
SECRET = re.compile(
    r"://[^/\s:@]*:(?!\d+/)[^\s@]+@"
    r"|\b(hf_|gh[pousr]_|sk-)[A-Za-z0-9]{20,}|\b(github_pat_|glpat-|xox[abp]-|sk-(proj|ant)-)[\w-]{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}|PRIVATE KEY-----"
    r"|[?&](x-amz-(signature|credential|security-token)|signature|sig|token|access_token|api_?key)=[^&\s]+",
    re.IGNORECASE,
)
SECRET_NAME = (
    r"([\w.-]*[_.-])?(password|passwd|secret|api[_-]?key|(secret[_-]?)?access[_-]?key([_-]id)?|credentials?|authorization"
    r"|(hf|auth|access|api|refresh|bearer|session|security)[_-]?token)|token"
)
SECRET_KEY = re.compile(rf"(--?)?({SECRET_NAME})", re.IGNORECASE)
SECRET_SETTING = re.compile(rf"(--?)?({SECRET_NAME})=.+", re.IGNORECASE)


@dataclass(frozen=True)
class LocalFile:
    name: str
    size: int
    content: Path | bytes  # text as the bytes that were looked through for secrets

    def digest_as(self, entry: RepoFile) -> str:
        file = io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")
        with file:
            return digest_as(entry, file, self.size)


@dataclass(frozen=True)
class Remote:
    """A repo as it is; all empty when there is none."""

    exists: bool = False
    is_private: bool = True
    commit: str | None = None  # of the revision, or of main where the revision is to be made
    has_revision: bool = False
    files: dict[str, RepoFile] = field(default_factory=dict)  # of LISTED


@dataclass(frozen=True)
class Plan:
    """What a push would send."""

    folder: str
    repo: str
    revision: str
    is_public: bool
    files: list[LocalFile]
    left_out: list[str]  # names in the folder, with the reason where the name is not it
    notes: list[str]
    remote: Remote | None  # None when it could not be seen

    def state(self, file: LocalFile) -> str:
        """What a file is beside the hub's: `new`, `changed`, `same`, or `?` when that could not be seen."""
        if self.remote is None:
            return "?"
        entry = self.remote.files.get(file.name)
        if entry is None:
            return "new"
        return "same" if file.size == entry.size and file.digest_as(entry) == digest_of(entry) else "changed"

    def visibility(self) -> str:
        if self.remote is None or not self.remote.exists:
            return "public" if self.is_public else "private"
        return f"{'private' if self.remote.is_private else 'public'}, as the repo is now"


# ------------------------------------------------------------------------------------------------------- push


def plan(
    folder: str,
    repo: str,
    revision: str = "main",
    *,
    public: bool = False,
    must_see: bool = False,
    api: HfApi,
) -> Plan:
    """What is in a folder of heads, and what of it the hub lacks. Sends nothing.

    must_see: a hub that cannot be asked is an error rather than a note. Raises UserError when the folder holds no
    finite heads or a secret, before the hub is asked.
    """
    check_repo(repo)
    if must_see:
        check_token(api)
    files, left_out = listed(folder)
    notes = check_texts(files, token_of(api))
    check_heads(folder)
    remote = None
    try:
        remote = look(api, repo, revision, writes=True)
    except UserError as error:
        if must_see:
            raise
        notes.append(f"the hub could not be asked what it has: {error}")
    if remote and not remote.exists:
        notes.append(f"{repo} is not there, or this token cannot see it: it would be made")
    return Plan(folder, repo, revision, public, files, left_out, notes, remote)


def check(plan: Plan) -> None:
    """Raises UserError when this push would publish by accident or leave files of other heads beside these."""
    if plan.remote is None:
        return
    if plan.remote.exists and not plan.remote.is_private and not plan.is_public:
        raise UserError(
            f"{plan.repo} is public, and --public was not given. Nothing was sent. Say --public, make the repo "
            "private, or give another name."
        )
    here = {file.name for file in plan.files} | {"README.md"}
    if strangers := sorted(plan.remote.files.keys() - here):
        raise UserError(
            f"{plan.repo}@{plan.revision} has {', '.join(strangers)}, which {plan.folder} does not: a reader would "
            "take them for these heads' own. Nothing was sent. Remove them there, or push to another repo."
        )


def push(plan: Plan, message: str, api: HfApi) -> str | None:
    """Makes the repo and the branch where they lack, and one commit. Returns its hash, None when all is there.

    Raises UserError with what came from the hub and what to do.
    """
    check(plan)
    check_token(api)
    if is_secret(message, token_of(api)):
        raise UserError("--message has what looks like a token or password. A commit keeps it for ever.")
    remote, repo = plan.remote, plan.repo
    assert remote is not None
    with asking(api, repo, writes=True):
        if not remote.exists:
            api.create_repo(repo, private=not plan.is_public)
            remote = look(api, repo, plan.revision, writes=True)
            if not remote.is_private and not plan.is_public:
                raise UserError(
                    f"the hub made {repo} public, though it was asked for a private one. No file was sent."
                )
        if not remote.has_revision:
            api.create_branch(repo, branch=plan.revision, revision=remote.commit)
        missing = [file for file in plan.files if plan.state(file) != "same"]
        if not missing:
            return None
        done = api.create_commit(
            repo,
            [CommitOperationAdd(file.name, file.content) for file in missing],
            commit_message=message,
            revision=plan.revision,
            parent_commit=remote.commit,  # else what somebody pushed meanwhile would be mixed with this
        )
        # A .gitignore in the repo makes the library leave files out without a word.
        after = replace(plan, remote=look(api, repo, done.oid, writes=True))
    if lacking := [file.name for file in plan.files if after.state(file) != "same"]:
        raise UserError(
            f"{repo}@{done.oid} was made without {', '.join(lacking)}. Look for a .gitignore there, then push again."
        )
    return done.oid


def push_prompts(folder: str, repo: str, api: HfApi) -> str:
    """Puts the JSON lines of a local folder into a data set of the hub, in one commit; returns its hash.

    Raises UserError for a data set that others can read, since prompts are what people wrote to a model.
    """
    check_repo(repo)
    check_token(api)
    files = sorted(Path(folder).glob("*.jsonl"))
    if not files:
        raise UserError(f"{folder} has no JSON lines on this machine. Give --out a local folder.")
    with asking(api, repo, writes=True):
        api.create_repo(repo, repo_type="dataset", private=True, exist_ok=True)
        if api.dataset_info(repo, timeout=TIMEOUT_S).private is not True:
            raise UserError(
                f"the data set {repo} is public. Nothing was sent. Make it private, or give another name."
            )
        operations = [CommitOperationAdd(file.name, file) for file in files]
        done = api.create_commit(repo, operations, commit_message="Prompts", repo_type="dataset")
    return str(done.oid)


def listed(folder: str) -> tuple[list[LocalFile], list[str]]:
    """The files of LISTED in a folder, and the names of all else in it."""
    if "://" in folder or not Path(folder).is_dir():
        raise UserError(f"{folder!r} is no folder on this machine. Give one that `medusa-ray train` wrote.")
    files, left_out = [], []
    for path in sorted(Path(folder).iterdir()):
        target = Path(os.path.realpath(path))
        if not LISTED.fullmatch(path.name):
            left_out.append(f"{path.name}/" if path.is_dir() else path.name)
        elif target.parent != Path(folder).resolve() or not LISTED.fullmatch(target.name):
            left_out.append(f"{path.name} (a link to elsewhere)")
        elif not target.is_file():
            left_out.append(f"{path.name} (no file)")
        elif path.name.endswith(TENSORS):
            files.append(LocalFile(path.name, target.stat().st_size, target))
        elif target.stat().st_size > MAX_TEXT:
            raise UserError(
                f"{path} has {target.stat().st_size:,} bytes, but {MAX_TEXT:,} at most were expected."
            )
        else:
            content = target.read_bytes()
            files.append(LocalFile(path.name, len(content), content))
    return files, left_out


def check_heads(folder: str) -> None:
    """Raises UserError unless a folder holds the finite weights of heads, and of nothing else."""
    try:
        found = layouts.read(folder)
        if found.is_model:
            raise ValueError("it is a whole model, base and heads, which `hf upload` sends")
        heads = layouts.layouted(found, None, found.vocab_size)
        check_finite(heads.state_dict(), found.where)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder} holds no sound heads: {error}") from error


def check_texts(files: list[LocalFile], token: str | None) -> list[str]:
    """Notes on what the texts tell of this machine. Raises UserError where one has a token or password, by key."""
    local = []
    for file in files:
        if not isinstance(file.content, bytes):
            continue
        text = file.content.decode("utf-8", errors="replace")
        values: Iterator[tuple[str, str, bool]]
        if file.name.endswith(".json"):
            try:
                values = strings(json.loads(text))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file.name} is no JSON: {error}. Write it again.") from error
        else:
            values = ((f"line {number}", line, False) for number, line in enumerate(text.splitlines(), 1))
        for key, value, is_named_secret in values:
            if is_named_secret or is_secret(value, token):
                raise UserError(
                    f"{file.name}: {key} has what looks like a token or password, and a hub keeps what it was given. "
                    "Nothing was sent. Take it out of the file, change it where it is used, and push again."
                )
            if file.name != "README.md" and re.match(r"([\w.-]+=)?(/.|~/|file:|[A-Za-z]:\\)", value):
                local.append(f"{file.name}: {key}")
    return [f"these name places on this machine: {', '.join(local)}"] if local else []


def strings(value: Any, key: str = "") -> Iterator[tuple[str, str, bool]]:
    """All strings in a JSON value: where each is, itself, and whether its key or the option before it says secret."""
    if isinstance(value, dict):
        for name, inner in value.items():
            here = f"{key}.{name}" if key else str(name)
            yield (f"a key of {key or 'the whole'}", name, False)
            if isinstance(inner, str):
                yield (here, inner, bool(inner and SECRET_KEY.fullmatch(name)))
            else:
                yield from strings(inner, here)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            before = value[place - 1] if place else None
            if isinstance(inner, str):
                follows = isinstance(before, str) and before.startswith("-") and SECRET_KEY.fullmatch(before)
                yield (f"{key}[{place}]", inner, bool(follows or SECRET_SETTING.fullmatch(inner)))
            else:
                yield from strings(inner, f"{key}[{place}]")
    elif isinstance(value, str):
        yield (key, value, False)


def is_secret(text: str, token: str | None) -> bool:
    return bool(SECRET.search(text) or (token and token in text))


# ------------------------------------------------------------------------------------------------------- pull


@dataclass(frozen=True)
class Pulled:
    folder: str
    commit: str
    sizes: dict[str, int]
    is_news: bool  # False when the folder held just this before


def pull(repo: str, folder: str, revision: str = "main", *, api: HfApi) -> Pulled:
    """Puts the heads of a repo into a folder that is new, empty, or as an earlier pull left it.

    Raises UserError when the folder holds anything else, the disk has no room, names or sizes are not to be trusted, or
    what came is not what the hub had listed. What has come stays in a hidden folder beside, and is not asked for again.
    """
    check_repo(repo)
    target = Path(folder).resolve()
    if "://" in folder or (target.exists() and not target.is_dir()):
        raise UserError(f"{folder!r} is no folder on this machine. Give one, or a name that is free.")
    before = record_of(target)
    remote = look(api, repo, revision, writes=False)
    if not remote.exists or remote.commit is None or not remote.has_revision:
        raise UserError(
            f"{repo}@{revision} is not there, or this token cannot see it. Check the name and --revision; "
            "`hf auth whoami` says whose token it is."
        )
    files = remote.files
    if not any(name.endswith(TENSORS) for name in files):
        raise UserError(
            f"{repo}@{revision} holds no heads: none of {WEIGHTS}, {layouts.MODEL_WEIGHTS} and the like."
        )
    sizes = {name: entry.size for name, entry in files.items()}
    if before and before["commit"] == remote.commit and before["files"].keys() <= set(os.listdir(target)):
        return Pulled(folder, remote.commit, sizes, is_news=False)

    part = target.parent / f".{target.name}.{remote.commit}.part"
    try:
        part.mkdir(parents=True, exist_ok=True)
        check_room(part, sizes)
        digests = {name: fetch(api, repo, remote.commit, entry, part / name) for name, entry in files.items()}
        origin = {"repo": repo, "revision": revision, "commit": remote.commit, "files": digests}
        provenance.write_json(str(part / RECORD), origin)
        put(part, target)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}. Run it again where there is room.") from error
    return Pulled(folder, remote.commit, sizes, is_news=True)


def record_of(target: Path) -> dict[str, Any] | None:
    """What an earlier pull put into a folder, None when that is empty. Raises UserError when it holds anything else."""
    if not target.exists() or not (names := set(os.listdir(target))):
        return None
    record = provenance.read_json(str(target / RECORD)) if RECORD in names else {}
    if not {"commit", "files"} <= record.keys():
        raise UserError(f"{target} is there and was not pulled. Nothing was changed. Give another folder.")
    changed = sorted(names - {RECORD} - record["files"].keys())
    for name in sorted(names & record["files"].keys()):
        with (target / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record["files"][name]:
                changed.append(name)
    if changed:
        raise UserError(
            f"{target} has {', '.join(changed)}, not as it was pulled. Nothing was changed. Give another folder."
        )
    return record


def check_room(part: Path, sizes: dict[str, int]) -> None:
    """Raises UserError when a text is too large or the disk too full; bytes that have come already count as there."""
    for name, size in sizes.items():
        if not name.endswith(TENSORS) and size > MAX_TEXT:
            raise UserError(
                f"the hub says that {name} has {size:,} bytes, but {MAX_TEXT:,} at most were expected."
            )
    come = sum(
        min(os.path.getsize(part / name), size) for name, size in sizes.items() if (part / name).exists()
    )
    needed, free = sum(sizes.values()) - come, shutil.disk_usage(part).free
    if needed > free:
        raise UserError(
            f"{needed:,} bytes are to come, but {part.parent} has {free:,} free. Nothing was taken. Make room there, "
            "or give a folder on another disk."
        )


def fetch(api: HfApi, repo: str, commit: str, entry: RepoFile, path: Path) -> str:
    """Downloads a file, from where an earlier run was cut, and verifies it. Returns its sha256."""
    if path.exists() and path.stat().st_size > entry.size:
        path.unlink()
    path.touch()
    with asking(api, repo, writes=False), BoundedFile(path, entry.size) as file:
        http_get(
            hf_hub_url(repo, entry.path, revision=commit, endpoint=api.endpoint),
            file,
            resume_size=file.seek(0, os.SEEK_END),
            headers=build_hf_headers(token=api.token),
            expected_size=entry.size,
            displayed_filename=entry.path,
        )
    with path.open("rb") as file:
        if (came := digest_as(entry, file, entry.size)) != digest_of(entry):
            path.unlink()
            raise UserError(
                f"{entry.path} came with the digest {came}, but {repo}@{commit} lists {digest_of(entry)}. It was "
                "thrown away. Run it again; if that does not help, the hub or what lies between is broken."
            )
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def put(part: Path, target: Path) -> None:
    """Moves a whole folder to its place. Whoever looks there sees the one before, none, or this one."""
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    part.rename(target)
    shutil.rmtree(old, ignore_errors=True)


class BoundedFile(io.FileIO):
    """A file that takes no more bytes than its size was said to be, whoever goes on sending."""

    def __init__(self, path: Path, limit: int) -> None:
        super().__init__(path, "r+")
        self.limit = limit

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.limit:
            raise UserError(
                f"{self.name} was to have {self.limit:,} bytes, but more came. It was cut off there."
            )
        try:
            return super().write(data)
        except OSError as error:
            raise UserError(
                f"{self.name} cannot be written: {error}. Run it again where there is room."
            ) from error


# -------------------------------------------------------------------------------------------------------- hub


def check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise ValueError("it needs the owner too")
    except ValueError as error:
        raise UserError(f"the repo has to be OWNER/NAME: {clean(str(error), None)}") from None


def token_of(api: HfApi) -> str | None:
    return api.token if isinstance(api.token, str) else get_token()


def check_token(api: HfApi) -> None:
    if not token_of(api):
        raise UserError("there is no token of the hub. Run `hf auth login`, or set HF_TOKEN, and push again.")


def look(api: HfApi, repo: str, revision: str, *, writes: bool) -> Remote:
    """A repo as the token sees it. Raises UserError when the hub does not say, or says what cannot be."""
    with asking(api, repo, writes):
        try:
            info = api.model_info(repo, timeout=TIMEOUT_S)
        except RepositoryNotFoundError as error:
            if error.response.status_code == 404 or not token_of(api):  # 401 is its "not found" for strangers
                return Remote()
            raise
        has_revision = True
        if revision != "main":
            try:
                info = api.model_info(repo, revision=revision, timeout=TIMEOUT_S)
            except RevisionNotFoundError:
                has_revision = False
        commit = info.sha
        if commit is not None and not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise UserError(f"the hub names {commit!r} as a commit of {repo}, which is no hash.")
        entries = api.list_repo_tree(repo, revision=commit) if commit else []
        files = trusted(list(islice(entries, MAX_ENTRIES + 1)), repo)
    # Anything but a plain yes counts as public, so that doubt never publishes.
    return Remote(True, info.private is True, commit, has_revision, files)


def trusted(entries: list[Any], repo: str) -> dict[str, RepoFile]:
    """The files of LISTED by name. Raises UserError where names, sizes or digests could harm whoever uses them."""
    if len(entries) > MAX_ENTRIES:
        raise UserError(f"{repo} lists more than {MAX_ENTRIES:,} entries: no repo of heads.")
    files = {}
    for entry in entries:
        name = entry.path
        if not isinstance(name, str) or name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise UserError(
                f"{repo} lists the name {name!r}, which leads out of its folder. Nothing was taken."
            )
        if not isinstance(entry, RepoFile) or not LISTED.fullmatch(name):
            continue
        is_digest = re.fullmatch(r"[0-9a-f]{64}" if entry.lfs else r"[0-9a-f]{40}", str(digest_of(entry)))
        if type(entry.size) is not int or entry.size < 0 or not is_digest:
            raise UserError(f"{repo} lists {name} with size {entry.size!r} and digest {digest_of(entry)!r}.")
        files[name] = entry
    return files


def digest_of(entry: RepoFile) -> str:
    """The digest that a hub gives for a file: sha256 of a large one, git's of a small one."""
    return entry.lfs.sha256 if entry.lfs else entry.blob_id


def digest_as(entry: RepoFile, file: BinaryIO, size: int) -> str:
    """The digest of another file of the kind that the hub gives for this one."""
    hasher = hashlib.sha256() if entry.lfs else hashlib.sha1(b"blob %d\0" % size)  # git: gitformat-loose
    while chunk := file.read(CHUNK):
        hasher.update(chunk)
    return hasher.hexdigest()


@contextmanager
def asking(api: HfApi, repo: str, writes: bool) -> Iterator[None]:
    """Turns what goes wrong with a hub into a UserError, and keeps tokens and signatures out of what is logged."""
    token = token_of(api)
    make = logging.getLogRecordFactory()

    def discreet(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.msg, record.args = clean(record.getMessage(), token), ()
        if record.exc_info:
            record.exc_text = clean(logging.Formatter().formatException(record.exc_info), token)
            record.exc_info = None
        return record

    # Of all loggers, since the library's own and those of its HTTP client write whole addresses, and large files go to
    # addresses whose signature is as good as a token.
    logging.setLogRecordFactory(discreet)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a server's answer makes the library raise
        raise UserError(clean(explain(error, api, repo, writes), token)) from None
    finally:
        logging.setLogRecordFactory(make)


def clean(text: str, token: str | None) -> str:
    """A text without the token, passwords in addresses and what signs them."""
    if token:
        text = text.replace(token, "[token]")
    text = re.sub(r"\bhf_[A-Za-z0-9]{20,}", "[token]", text)
    text = re.sub(r"(\w+://)[^/\s@'\"]+@", r"\1", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1?...", text)


def explain(error: Exception, api: HfApi, repo: str, writes: bool) -> str:
    """What came and what to do about it."""
    cause: BaseException | None = error
    while cause is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__
    status = None if cause is None else cause.response.status_code  # type: ignore[attr-defined]
    said = getattr(cause, "server_message", None) or str(cause or error.__cause__ or error)
    came = " ".join(said.split())[:300]
    again = "Run it again: whole files that have arrived are not sent again." if writes else "Run it again."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the hub is not asked. Unset it."
    if status is None:
        what = f"{api.endpoint} could not be asked about {repo}: {type(error).__name__}: {came}."
        if "xet" in f"{type(error)} {came}".lower():
            return f"{what} If this hub has no Xet storage, set HF_HUB_DISABLE_XET=1. {again}"
        return f"{what} Check the network and HF_ENDPOINT. {again}"
    if status == 401:
        advice = "The token is missing, wrong or has expired. Run `hf auth login`, or set HF_TOKEN."
    elif status in (402, 413, 507) or (status == 403 and re.search(r"storage|quota|limit|plan", came, re.I)):
        advice = f"There is no room for it. Free some on the hub or ask the owner for more. {again}"
    elif status == 403:
        right = "write to" if writes else "read"
        advice = (
            f"The token may not {right} {repo}. `hf auth whoami` says whose it is; take one with that right."
        )
    elif status == 404:
        advice = "It is not there, or this token cannot see it. Check OWNER/NAME and --revision."
    elif status == 409:
        advice = "The name is taken by what this token cannot see, or another change is under way. Give another name."
    elif status == 412:
        advice = "Somebody else has pushed meanwhile. Look at it without --yes, then run it again."
    elif status == 429:
        advice = f"That were too many requests. Wait some minutes. {again}"
    else:
        advice = again
    return f"{api.endpoint} answered {status} about {repo}: {came} {advice}"
