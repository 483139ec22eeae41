"""What travels to a hub and back, against tests/fake_hub.py on loopback: never more than was listed, never half of it.

The oracle is the fake hub's own memory: what it was asked, the bytes it took, and what a reader of a branch sees.
"""

import hashlib
import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_hub import SIGNATURE, FakeHub, Fault, serving
from huggingface_hub import HfApi, constants
from safetensors.torch import save_file

from medusa_ray import cli, exchange, hub, provenance
from medusa_ray.config import UserError
from medusa_ray.medusa import layouts
from medusa_ray.medusa.heads import WEIGHTS, MedusaHeads

TOKEN = "hf_" + "aB3" * 11 + "x"  # as long as a real one
REPO = "ann/heads"
FILES = {WEIGHTS, "config.json", "tree.json", "accuracy.json", "provenance.json"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Xet, which the fake hub does not know, no token and no cache of whoever runs this, and no waiting."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(
        constants, "HF_HUB_OFFLINE", False
    )  # conftest.py has set it; only loopback is asked here
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # Its own pauses between tries, 23 s in all; what counts is that it tries.
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    with serving() as hub_:
        hub_.users = {TOKEN: "ann", "hf_" + "q" * 34: "bob"}
        yield hub_


@pytest.fixture
def api(fake: FakeHub) -> HfApi:
    return HfApi(endpoint=fake.url, token=TOKEN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_heads(tmp_path / "heads")


def make_heads(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    heads = MedusaHeads(2, 1, hidden_size=8, vocab_size=32)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_()
    heads.save(folder, base="some/base")
    for name in ("tree.json", "accuracy.json"):
        (folder / name).write_text(json.dumps({"paths": [[seed]]}))
    provenance.write(str(folder), {"seed": seed}, {"base": "some/base"})
    record = provenance.read(str(folder)) or {}
    provenance.write_json(str(folder / "provenance.json"), record | {"command": ["medusa-ray", "train"]})
    return folder


def make_shards(folder: Path) -> Path:
    """Heads as other engines keep them, in two parts of different size."""
    folder.mkdir()
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    tensors = MedusaHeads(1, 1, hidden_size=64, vocab_size=128).state_dict()
    weight_map = {f"medusa_heads.{name}": names["linear" not in name] for name in tensors}
    for part in names:
        held = [name for name, file in weight_map.items() if file == part]
        save_file({name: tensors[name.removeprefix("medusa_heads.")] for name in held}, folder / part)
    (folder / layouts.MODEL_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"vocab_size": 128}')
    return folder


def push(folder: Path, api: HfApi, *, revision: str = "main", public: bool = False) -> str | None:
    return hub.push(
        hub.plan(str(folder), REPO, revision, public=public, must_see=True, api=api), "new heads", api
    )


def contents(folder: Path, names: set[str] = FILES) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def without_git(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != ".gitattributes"}


# ------------------------------------------------------------------------------------------------------- push


def test_a_push_puts_the_listed_files_into_a_private_repo_in_one_commit(
    fake: FakeHub, api: HfApi, folder: Path
) -> None:
    commit = push(folder, api)
    repo = fake.repos[REPO]
    assert repo.is_private
    assert repo.branches == {"main": commit}
    assert without_git(repo.files()) == contents(folder)
    assert repo.messages == ["initial commit", "new heads"]


def test_a_plan_asks_but_sends_nothing(fake: FakeHub, api: HfApi, folder: Path) -> None:
    """A repo made by a look would be as bad as one that was sent to."""
    hub.plan(str(folder), REPO, api=api)
    fake.make(REPO, {})
    hub.plan(str(folder), REPO, api=api)
    assert fake.requests
    assert fake.writes() == []


def test_a_plan_tells_new_changed_and_same_files_apart(fake: FakeHub, api: HfApi, folder: Path) -> None:
    """Equal sizes are not equal files, neither small ones (git's digest) nor large ones (sha256)."""
    files = contents(folder)
    (folder / "tree.json").write_text('{"paths": [[9]]}')
    other_weights = bytearray(files[WEIGHTS])
    other_weights[-1] ^= 1
    fake.make(REPO, {**files, WEIGHTS: bytes(other_weights)})
    del fake.repos[REPO].files()["accuracy.json"]
    plan = hub.plan(str(folder), REPO, api=api)
    assert {file.name: plan.state(file) for file in plan.files} == {
        WEIGHTS: "changed",
        "accuracy.json": "new",
        "config.json": "same",
        "provenance.json": "same",
        "tree.json": "changed",
    }


def test_a_second_push_of_the_same_makes_no_commit(fake: FakeHub, api: HfApi, folder: Path) -> None:
    push(folder, api)
    fake.requests.clear()
    assert push(folder, api) is None
    assert fake.writes() == []


def test_a_changed_file_alone_is_sent_again(fake: FakeHub, api: HfApi, folder: Path) -> None:
    push(folder, api)
    fake.requests.clear()
    (folder / "tree.json").write_text("[[7]]")
    push(folder, api)
    assert without_git(fake.repos[REPO].files()) == contents(folder)
    assert fake.uploads() == []


@pytest.mark.parametrize(
    "name",
    [".env", "token", "training/step-1/state.safetensors", "training.jsonl", "notes.txt", "hub.json", "x.pt"],
)
def test_what_is_not_on_the_list_stays_at_home_and_is_named(
    name: str, fake: FakeHub, api: HfApi, folder: Path
) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("private")
    plan = hub.plan(str(folder), REPO, api=api)
    assert [left.rstrip("/") for left in plan.left_out] == [name.split("/")[0]]
    push(folder, api)
    assert set(without_git(fake.repos[REPO].files())) == FILES


def test_a_link_is_sent_only_when_it_leads_to_a_listed_file_of_the_folder(
    fake: FakeHub, api: HfApi, folder: Path, tmp_path: Path
) -> None:
    """README.md -> .env stays in the folder, and would still publish it."""
    (tmp_path / "secret.json").write_text('"elsewhere"')
    (folder / ".env").write_text("PIN=1")
    (folder / "tree.json").unlink()
    (folder / "tree.json").symlink_to(tmp_path / "secret.json")
    (folder / "README.md").symlink_to(".env")
    (folder / WEIGHTS).rename(folder / "model.safetensors")
    (folder / WEIGHTS).symlink_to("model.safetensors")
    push(folder, api)
    sent = without_git(fake.repos[REPO].files())
    assert set(sent) == FILES - {"tree.json"} | {"model.safetensors"}
    assert sent[WEIGHTS] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("provenance.json", {"inputs": {"base": "s3://me:pass/word@store/base"}}, "inputs.base"),
        ("provenance.json", {"command": ["x", "https://me:pw@host/a"]}, "command[1]"),
        ("provenance.json", {"command": ["x", "--token", "opensesame"]}, "command[2]"),
        ("provenance.json", {"command": ["x", "--api-key=opensesame"]}, "command[1]"),
        ("provenance.json", {"config": {"hub": [{"hf_token": "opensesame"}]}}, "config.hub[0].hf_token"),
        ("provenance.json", {"config": {"WANDB_API_KEY": "opensesame"}}, "config.WANDB_API_KEY"),
        ("provenance.json", {"inputs": {f"read with {TOKEN}": "x"}}, "a key of inputs"),
        ("provenance.json", {"a": "az://c@account/x?sv=1&sig=abcdef"}, "a"),
        ("provenance.json", {"a": "hf_" + "Z" * 34}, "a"),
        ("config.json", {"a": ["ghp_" + "Z" * 36]}, "a[0]"),
        ("README.md", f"# Heads\nserve with {TOKEN}\n", "line 2"),
    ],
)  # fmt: skip
def test_a_secret_in_a_text_is_refused_by_its_key_before_the_hub_is_asked(
    name: str, value: object, key: str, fake: FakeHub, api: HfApi, folder: Path
) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(UserError) as refused:
        push(folder, api)
    assert f"{name}: {key} has" in str(refused.value)
    assert "opensesame" not in str(refused.value)
    assert TOKEN not in str(refused.value)
    assert fake.requests == []


def test_a_token_that_has_no_known_form_is_found_too(fake: FakeHub, folder: Path) -> None:
    fake.users["plain-words-as-token"] = "ann"
    api = HfApi(endpoint=fake.url, token="plain-words-as-token")
    (folder / "accuracy.json").write_text('["see plain-words-as-token"]')
    with pytest.raises(UserError, match=r"accuracy.json: \[0\] has"):
        push(folder, api)


def test_ordinary_provenance_is_no_secret_but_its_places_are_noted(api: HfApi, folder: Path) -> None:
    """What names tokens of a vocabulary, containers of Azure or ports must pass, or nobody could push."""
    config = {
        "eos_token": "</s>",
        "pad_token_id": 0,
        "data": "abfss://box@account.dfs.core.windows.net/x",
        "token": "",
    }
    config |= {
        "url": "http://localhost:8000/v1/users/@me",
        "cache": "/home/ann/hf_internal_cache_directory/sk-learn-x",
    }
    config |= {"overrides": ["output=/home/ann/runs"]}
    provenance.write(str(folder), config, {"base": "/home/ann/base"})
    notes = hub.plan(str(folder), REPO, api=api).notes
    for key in ("config.cache", "config.overrides[0]", "inputs.base"):
        assert f"provenance.json: {key}" in notes[0]


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def cut_short(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 300)


def not_finite(folder: Path) -> None:
    heads = MedusaHeads.load(folder)
    with torch.no_grad():
        heads.output_weight(1)[3, 3] = float("nan")
    heads.save(folder, base="some/base")


def a_whole_model(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)}, folder / "model.safetensors")


def no_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def no_json(folder: Path) -> None:
    (folder / "tree.json").write_text("[[")


@pytest.mark.parametrize("spoil", [empty, cut_short, not_finite, a_whole_model, no_folder, no_json])
def test_a_folder_that_holds_no_sound_heads_is_refused_before_the_hub_is_asked(
    spoil: Callable[[Path], None], fake: FakeHub, api: HfApi, folder: Path
) -> None:
    spoil(folder)
    with pytest.raises(UserError):
        push(folder, api)
    assert fake.requests == []


def test_parts_of_another_engines_layout_go_together_or_not_at_all(
    fake: FakeHub, api: HfApi, tmp_path: Path
) -> None:
    folder = make_shards(tmp_path / "shards")
    push(folder, api)
    assert set(without_git(fake.repos[REPO].files())) == {path.name for path in folder.iterdir()}
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002"):
        push(folder, api)


@pytest.mark.parametrize("layout", ["own", "shared", "lowrank"])
@pytest.mark.parametrize("token_map_M", [None, torch.tensor([1, 5, 9])])
def test_heads_of_every_layout_travel(
    layout: str, token_map_M: torch.Tensor | None, fake: FakeHub, api: HfApi, tmp_path: Path
) -> None:
    heads = MedusaHeads(2, 1, hidden_size=8, vocab_size=32, layout=layout, rank=2, token_map_M=token_map_M)
    heads.save(tmp_path / "mine", base="some/base")
    push(tmp_path / "mine", api)
    hub.pull(REPO, str(tmp_path / "got"), api=api)
    assert pulled(tmp_path / "got") == pulled(tmp_path / "mine")


@pytest.mark.parametrize("format_", ["tgi", "vllm", "trtllm", "fasterdecoding"])
def test_what_was_exported_travels(
    format_: str, fake: FakeHub, api: HfApi, folder: Path, tmp_path: Path
) -> None:
    exchange.export(str(folder), str(tmp_path / "mine"), format_)
    push(tmp_path / "mine", api)
    hub.pull(REPO, str(tmp_path / "got"), api=api)
    assert pulled(tmp_path / "got") == pulled(tmp_path / "mine")


def test_a_public_repo_takes_heads_only_from_who_says_public(fake: FakeHub, api: HfApi, folder: Path) -> None:
    fake.make(REPO, {}, is_private=False)
    with pytest.raises(UserError, match="ann/heads is public"):
        push(folder, api)
    assert fake.writes() == []
    push(folder, api, public=True)
    assert without_git(fake.repos[REPO].files()) == contents(folder)


def test_a_private_repo_stays_private_whatever_is_said(fake: FakeHub, api: HfApi, folder: Path) -> None:
    fake.make(REPO, {})
    assert hub.plan(str(folder), REPO, public=True, api=api).visibility() == "private, as the repo is now"
    push(folder, api, public=True)
    assert fake.repos[REPO].is_private


def test_a_new_repo_is_public_when_that_is_said(fake: FakeHub, api: HfApi, folder: Path) -> None:
    push(folder, api, public=True)
    assert not fake.repos[REPO].is_private


def test_a_hub_that_makes_a_private_repo_public_gets_no_file(fake: FakeHub, api: HfApi, folder: Path) -> None:
    """As a mirror does that knows no private repos."""
    fake.makes_public = True
    with pytest.raises(UserError, match="made ann/heads public"):
        push(folder, api)
    assert set(fake.repos[REPO].files()) == {".gitattributes"}
    assert fake.uploads() == []


@pytest.mark.parametrize("stranger", ["tree.json", "model-00001-of-00004.safetensors"])
def test_heads_are_not_put_among_files_of_other_heads_or_of_a_model(
    stranger: str, fake: FakeHub, api: HfApi, folder: Path
) -> None:
    """An old tree beside new weights would be served; a base's config.json would be written over."""
    fake.make(REPO, {stranger: b"[]", "README.md": b"# mine", "config.json": b"{}"})
    (folder / "tree.json").unlink()
    with pytest.raises(UserError, match=stranger):
        push(folder, api)
    assert fake.writes() == []


def test_a_revision_is_made_and_main_stays_as_it_was(fake: FakeHub, api: HfApi, folder: Path) -> None:
    push(folder, api)
    before = fake.repos[REPO].files()
    make_heads(folder, seed=1)
    commit = push(folder, api, revision="seed/1")
    assert fake.repos[REPO].files() == before
    assert fake.repos[REPO].branches["seed/1"] == commit
    assert without_git(fake.repos[REPO].files("seed/1")) == contents(folder)


def test_a_push_of_somebody_else_meanwhile_is_not_written_over(
    fake: FakeHub, api: HfApi, folder: Path
) -> None:
    plan = hub.plan(str(folder), REPO, must_see=True, api=api)
    fake.make(REPO, {})
    plan = hub.plan(str(folder), REPO, must_see=True, api=api)
    theirs = fake.repos[REPO].commit("main", {"config.json": b"theirs"}, "theirs")
    with pytest.raises(UserError, match="Somebody else has pushed"):
        hub.push(plan, "mine", api)
    assert fake.repos[REPO].branches["main"] == theirs


def test_a_file_that_the_hub_leaves_out_is_told(fake: FakeHub, api: HfApi, folder: Path) -> None:
    """A .gitignore there makes the library skip it, and the reader would have heads without a tree."""
    fake.ignores = "tree.json"
    with pytest.raises(UserError, match=r"without tree\.json.*\.gitignore"):
        push(folder, api)


# ----------------------------------------------------------------------------------------------------- faults


def test_after_a_cut_only_what_is_missing_is_sent_and_no_reader_saw_half(
    fake: FakeHub, api: HfApi, tmp_path: Path
) -> None:
    folder = make_shards(tmp_path / "shards")
    first, second = (
        hashlib.sha256((folder / f"model-0000{part}-of-00002.safetensors").read_bytes()).hexdigest()
        for part in (1, 2)
    )
    fault = Fault("PUT", second, cut_after=1000)
    fake.faults.append(fault)
    with pytest.raises(UserError, match="whole files that have arrived are not sent again"):
        push(folder, api)
    assert set(fake.repos[REPO].files()) == {".gitattributes"}
    assert fake.uploads().count(f"/large/{second}") > 1, "the library tries again by itself"
    fake.faults.remove(fault)
    fake.requests.clear()
    push(folder, api)
    assert fake.uploads() == [f"/large/{second}"]
    assert first in fake.large
    assert without_git(fake.repos[REPO].files()) == contents(folder, {path.name for path in folder.iterdir()})
    assert fake.repos[REPO].messages == ["initial commit", "new heads"]


def test_a_cut_answer_to_the_commit_leaves_nothing_to_do(fake: FakeHub, api: HfApi, folder: Path) -> None:
    fake.faults.append(Fault("POST", "/commit/", cut_after=0, times=1))
    with pytest.raises(UserError, match="Run it again"):
        push(folder, api)
    push(folder, api)
    assert without_git(fake.repos[REPO].files()) == contents(folder)
    assert fake.repos[REPO].messages == ["initial commit", "new heads"]


def test_large_files_go_in_parts_where_the_hub_asks_for_them(fake: FakeHub, api: HfApi, folder: Path) -> None:
    fake.part_size = 500
    push(folder, api)
    assert len(fake.uploads()) == -(-(folder / WEIGHTS).stat().st_size // 500)
    assert fake.repos[REPO].files()[WEIGHTS] == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_trouble_of_the_hub_is_waited_out(
    status: int, fake: FakeHub, api: HfApi, folder: Path
) -> None:
    fake.faults += [
        Fault("PUT", "/large/", status=status, headers={"Retry-After": "3"}, times=2),
        Fault("POST", "/preupload/", status=status, times=1),
    ]
    push(folder, api)
    assert without_git(fake.repos[REPO].files()) == contents(folder)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Fault("POST", "/api/repos/create", status=401, message="bad"), "401.*hf auth login"),
        (Fault("POST", "/api/repos/create", status=403, message="no right"), "403.*no right.*may not write to ann"),
        (Fault("POST", "/api/repos/create", status=409, message="exists"), "409.*The name is taken"),
        (Fault("POST", "/preupload/", status=404, message="gone"), "404.*cannot see it"),
        (Fault("POST", "/preupload/", status=429, message="slow down"), "429.*Wait some minutes"),
        (Fault("POST", "/commit/", status=500, message="oh"), "500.*oh.*Run it again"),
        (
            Fault("POST", "objects/batch", status=403, message="Private repository storage limit reached"),
            "403.*storage limit reached.*no room",
        ),
        (Fault("PUT", "/large/", status=403, message="expired"), "403.*expired"),
    ],
)  # fmt: skip
def test_each_refusal_of_a_hub_says_what_came_and_what_to_do(
    fault: Fault, told: str, fake: FakeHub, api: HfApi, folder: Path
) -> None:
    fake.faults.append(fault)
    with pytest.raises(UserError, match=told):
        push(folder, api)
    if REPO in fake.repos:
        assert set(fake.repos[REPO].files()) == {".gitattributes"}


def test_a_name_that_another_holds_is_told(fake: FakeHub, api: HfApi, folder: Path) -> None:
    """Its private repo looks to us as if there were none."""
    fake.make("bob/heads", {"config.json": b"bob's"})
    with pytest.raises(UserError, match=r"403.*may not write to bob/heads"):
        hub.push(hub.plan(str(folder), "bob/heads", api=api), "mine", api)
    assert fake.repos["bob/heads"].messages == ["initial commit"]


def test_without_a_token_a_push_ends_before_the_hub_is_asked_and_a_plan_does_not(
    fake: FakeHub, folder: Path
) -> None:
    api = HfApi(endpoint=fake.url)
    with pytest.raises(UserError, match="hf auth login"):
        push(folder, api)
    assert fake.requests == []
    assert hub.plan(str(folder), REPO, api=api).notes == [
        "ann/heads is not there, or this token cannot see it: it would be made"
    ]


def test_a_hub_that_is_not_there_is_a_note_to_a_plan_and_the_end_of_a_push(folder: Path) -> None:
    api = HfApi(endpoint="http://127.0.0.1:9", token=TOKEN)
    plan = hub.plan(str(folder), REPO, api=api)
    assert {plan.state(file) for file in plan.files} == {"?"}
    assert "Check the network and HF_ENDPOINT" in plan.notes[0]
    with pytest.raises(UserError, match="Check the network"):
        push(folder, api)


def test_a_hub_without_xet_is_told_how_to_be_used(
    fake: FakeHub, api: HfApi, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library asks for Xet storage wherever its package is installed, and has no way back."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(UserError, match="set HF_HUB_DISABLE_XET=1"):
        push(folder, api)


def test_offline_mode_is_named_as_what_stops_a_push(
    api: HfApi, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(folder, api)


@pytest.mark.parametrize("repo", ["heads", "a/b/c", "ann/..", "", "https://ann:pw@hub/ann/heads"])
def test_a_repo_that_is_no_owner_and_name_is_refused(repo: str, api: HfApi, folder: Path) -> None:
    with pytest.raises(UserError, match="OWNER/NAME"):
        hub.plan(str(folder), repo, api=api)
    with pytest.raises(UserError, match="OWNER/NAME") as refused:
        hub.pull(repo, "somewhere", api=api)
    assert "pw" not in str(refused.value)


def test_no_log_and_no_message_has_the_token_or_a_signature(
    fake: FakeHub, api: HfApi, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library writes whole addresses, and a server may give back what it was sent."""
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    for name in ("huggingface_hub", "httpx2", "httpcore2"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        caplog.set_level(logging.DEBUG, name)
    factory = logging.getLogRecordFactory()
    fake.faults.append(
        Fault("PUT", "/large/", status=403, message=f"no {TOKEN} no ?X-Amz-Signature={SIGNATURE}")
    )
    with pytest.raises(UserError) as refused:
        push(folder, api)
    fake.faults = [Fault("PUT", "/large/", cut_after=10, times=2)]
    push(folder, api)
    for server_says in ("nobody", TOKEN):
        stranger = HfApi(endpoint=fake.url, token=TOKEN[::-1])
        fake.faults = [
            Fault("GET", "/api/models", status=401, message=f"Invalid: {server_says} {TOKEN[::-1]}")
        ]
        with pytest.raises(UserError) as second:
            push(folder, stranger)
    seen = caplog.text + str(refused.value) + str(second.value) + repr(refused.value.__cause__)
    assert "X-Amz-Signature" not in caplog.text
    assert "/large/" in caplog.text, "else nothing was logged, and nothing shown"
    assert SIGNATURE not in caplog.text
    assert TOKEN not in seen
    assert TOKEN[::-1] not in seen
    assert logging.getLogRecordFactory() is factory


# ------------------------------------------------------------------------------------------------------- pull


@pytest.fixture
def pushed(fake: FakeHub, folder: Path) -> dict[str, bytes]:
    files = contents(folder)
    fake.make(REPO, {**files, ".gitattributes": b"", "evil.py": b"import os", "training.jsonl": b"{}"})
    return files


def pulled(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != hub.RECORD}


def test_a_pull_gives_the_listed_files_to_the_byte_and_says_from_where(
    fake: FakeHub, api: HfApi, pushed: dict[str, bytes], tmp_path: Path
) -> None:
    done = hub.pull(REPO, str(tmp_path / "got"), api=api)
    assert pulled(tmp_path / "got") == pushed
    record = json.loads((tmp_path / "got" / hub.RECORD).read_text())
    assert done.commit == record["commit"] == fake.repos[REPO].branches["main"]
    assert (record["repo"], record["revision"]) == (REPO, "main")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got", "heads"]
    assert MedusaHeads.load(tmp_path / "got").num_heads == 2


def test_a_second_pull_takes_nothing(
    fake: FakeHub, api: HfApi, pushed: dict[str, bytes], tmp_path: Path
) -> None:
    assert hub.pull(REPO, str(tmp_path / "got"), api=api).is_news
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "got").iterdir()}
    fake.requests.clear()
    assert not hub.pull(REPO, str(tmp_path / "got"), api=api).is_news
    assert not [path for _, path in fake.requests if "/resolve/" in path]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "got").iterdir()} == before


def test_a_pull_of_newer_heads_takes_the_place_of_older_ones(
    fake: FakeHub, api: HfApi, pushed: dict[str, bytes], tmp_path: Path
) -> None:
    first = hub.pull(REPO, str(tmp_path / "got"), api=api)
    newer = contents(make_heads(tmp_path / "newer", seed=1), FILES - {"tree.json"})
    fake.repos[REPO].commit("main", newer, "newer")
    hub.pull(REPO, str(tmp_path / "got"), api=api)
    assert pulled(tmp_path / "got") == newer
    hub.pull(REPO, str(tmp_path / "got"), revision=first.commit, api=api)
    assert pulled(tmp_path / "got") == pushed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got", "heads", "newer"]


@pytest.mark.parametrize("change", ["tree.json", "more.json"])
def test_a_folder_with_work_of_somebody_is_never_written_over(
    change: str, fake: FakeHub, api: HfApi, pushed: dict[str, bytes], tmp_path: Path
) -> None:
    hub.pull(REPO, str(tmp_path / "got"), api=api)
    (tmp_path / "got" / change).write_text("mine")
    fake.repos[REPO].commit("main", {**pushed, "config.json": b"{}"}, "newer")
    for target in (tmp_path / "got", tmp_path / "heads"):
        with pytest.raises(UserError, match="Nothing was changed"):
            hub.pull(REPO, str(target), api=api)
    assert (tmp_path / "got" / change).read_text() == "mine"


def test_a_file_that_was_deleted_comes_back(api: HfApi, pushed: dict[str, bytes], tmp_path: Path) -> None:
    hub.pull(REPO, str(tmp_path / "got"), api=api)
    (tmp_path / "got" / "tree.json").unlink()
    hub.pull(REPO, str(tmp_path / "got"), api=api)
    assert pulled(tmp_path / "got") == pushed


def test_after_a_cut_a_pull_goes_on_where_it_was_and_no_folder_was_there_meanwhile(
    fake: FakeHub, api: HfApi, pushed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what it holds back of a stream
    fake.faults = [
        Fault("GET", f"/{WEIGHTS}", cut_after=1000, times=1),
        Fault("GET", f"/{WEIGHTS}", status=403),
    ]
    with pytest.raises(UserError, match="403"):
        hub.pull(REPO, str(tmp_path / "got"), api=api)
    assert not (tmp_path / "got").exists()
    fake.faults.clear()
    fake.requests.clear()
    fake.ranges.clear()
    hub.pull(REPO, str(tmp_path / "got"), api=api)
    assert pulled(tmp_path / "got") == pushed
    assert fake.ranges == ["bytes=1000-"]
    hub.pull(REPO, str(tmp_path / "again"), api=api)
    assert pulled(tmp_path / "again") == pushed


def test_a_file_that_is_not_what_was_listed_is_thrown_away(
    fake: FakeHub, api: HfApi, pushed: dict[str, bytes], tmp_path: Path
) -> None:
    for name in (WEIGHTS, "tree.json"):
        fake.served = {name: bytes(len(pushed[name]))}
        with pytest.raises(UserError, match=f"{name} came with the digest"):
            hub.pull(REPO, str(tmp_path / name), api=api)
        assert not (tmp_path / name).exists()
    fake.served = {}
    hub.pull(REPO, str(tmp_path / WEIGHTS), api=api)
    assert pulled(tmp_path / WEIGHTS) == pushed


def test_no_more_is_written_than_was_listed(
    fake: FakeHub, api: HfApi, pushed: dict[str, bytes], tmp_path: Path
) -> None:
    """A hub may say 100 bytes and go on sending until the disk is full."""
    fake.served = {"tree.json": pushed["tree.json"] + bytes(2**20)}
    with pytest.raises(UserError, match="more came"):
        hub.pull(REPO, str(tmp_path / "got"), api=api)
    written = sum(path.stat().st_size for path in tmp_path.rglob(".got*/tree.json"))
    assert written <= len(pushed["tree.json"])


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        ({"path": "../tree.json"}, "leads out of its folder"),
        ({"path": "/etc/tree.json"}, "leads out of its folder"),
        ({"path": "a\\tree.json"}, "leads out of its folder"),
        ({"size": -1}, "size -1"),
        ({"size": "12"}, "size '12'"),
        ({"size": 2**40}, "tree.json has 1,099,511,627,776 bytes"),
        ({"oid": "../../x"}, "digest '../../x'"),
    ],
)
def test_names_and_sizes_that_could_harm_are_refused_before_anything_is_taken(
    lie: dict[str, object], told: str, fake: FakeHub, api: HfApi, pushed: dict[str, bytes], tmp_path: Path
) -> None:
    fake.lie = {"tree.json": lie}
    with pytest.raises(UserError, match=told):
        hub.pull(REPO, str(tmp_path / "got"), api=api)
    assert not [path for _, path in fake.requests if "/resolve/" in path]


def test_a_disk_without_room_is_told_before_anything_is_taken(
    fake: FakeHub, api: HfApi, pushed: dict[str, bytes], tmp_path: Path
) -> None:
    fake.lie = {WEIGHTS: {"size": 2**60}}
    with pytest.raises(UserError, match="Make room there"):
        hub.pull(REPO, str(tmp_path / "got"), api=api)
    assert not [path for _, path in fake.requests if "/resolve/" in path]


@pytest.mark.parametrize(
    ("repo", "revision", "told"),
    [
        ("ann/none", "main", "not there"),
        (REPO, "nowhere", "not there"),
        ("ann/data", "main", "holds no heads"),
    ],
)
def test_what_is_not_there_or_has_no_heads_is_told(
    repo: str, revision: str, told: str, fake: FakeHub, api: HfApi, pushed: dict[str, bytes], tmp_path: Path
) -> None:
    fake.make("ann/data", {"config.json": b"{}"})
    with pytest.raises(UserError, match=told):
        hub.pull(repo, str(tmp_path / "got"), revision, api=api)
    assert not (tmp_path / "got").exists()


def test_a_pickle_stays_a_file(fake: FakeHub, api: HfApi, tmp_path: Path) -> None:
    """It would print when unpickled, by whomever."""
    fake.make(REPO, {"medusa_lm_head.pt": b"cos\nabort\n(tR.", "config.json": b"{}"})
    hub.pull(REPO, str(tmp_path / "got"), api=api)
    assert pulled(tmp_path / "got") == fake.repos[REPO].files()


# ---------------------------------------------------------------------------------------- the command itself


@pytest.fixture
def medusa_ray(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: its exit code and what it wrote."""
    monkeypatch.setattr("huggingface_hub.HfApi", partial(HfApi, endpoint=fake.url, token=TOKEN))

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medusa-ray", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return (code, *capsys.readouterr())

    return call


def process(fake: FakeHub, tmp_path: Path, *arguments: object) -> subprocess.Popen[str]:
    """The command in a process of its own, which logs all that it can."""
    environment = {"HF_ENDPOINT": fake.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")} | {
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "medusa_ray.cli", *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_command_shows_then_sends_then_fetches(
    fake: FakeHub, medusa_ray: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    (folder / ".env").write_text("PIN=1")
    code, shown, _ = medusa_ray("push", folder, REPO, "--message", "two words", "--revision", "v1")
    assert code == 0
    assert fake.writes() == []
    for text in (WEIGHTS, "new", "visibility  private", "left out    .env"):
        assert text in shown
    does = shown.split("This does: ")[1].strip()
    assert does == f"medusa-ray push {folder} {REPO} --yes --revision v1 --message 'two words'"
    code, sent, _ = medusa_ray(*shlex.split(does)[1:])
    assert code == 0
    assert fake.repos[REPO].branches["v1"] in sent
    assert fake.repos[REPO].messages[1:] == ["two words"]
    assert "nothing to send" in medusa_ray(*shlex.split(does)[1:])[1]
    assert medusa_ray("pull", REPO, tmp_path / "got", "--revision", "v1")[0] == 0
    assert pulled(tmp_path / "got") == contents(folder)


def test_a_mistake_ends_the_command_with_2_and_a_message(
    fake: FakeHub, medusa_ray: Callable[..., tuple[int, str, str]], folder: Path
) -> None:
    fake.make(REPO, {}, is_private=False)
    code, _, told = medusa_ray("push", folder, REPO, "--yes")
    assert code == 2
    assert told.startswith("medusa-ray: ann/heads is public")
    assert fake.writes() == []


def test_a_push_killed_in_an_upload_is_finished_by_the_same_command_and_neither_logs_a_token(
    fake: FakeHub, tmp_path: Path
) -> None:
    folder = make_shards(tmp_path / "shards")
    weights = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    last = hashlib.sha256(weights["model-00002-of-00002.safetensors"]).hexdigest()
    fake.faults = [Fault("PUT", last, cut_after=1000, stall=True)]
    killed = process(fake, tmp_path, "push", folder, REPO, "--yes")
    assert fake.stalled.wait(60)
    assert fake.kept.wait(60), "the other part goes over another connection"
    killed.kill()
    logs = killed.communicate()[0]
    assert set(fake.repos[REPO].files()) == {".gitattributes"}
    fake.faults.clear()
    fake.requests.clear()
    again = process(fake, tmp_path, "push", folder, REPO, "--yes")
    logs += again.communicate(timeout=60)[0]
    assert again.returncode == 0, logs
    assert fake.uploads() == [f"/large/{last}"]
    assert fake.repos[REPO].messages == ["initial commit", "Medusa heads"]
    assert {name: fake.repos[REPO].files()[name] for name in weights} == weights
    assert "/large/" in logs
    assert TOKEN not in logs
    assert SIGNATURE not in logs


# ----------------------------------------------------------------------------------------------------- prompts


def test_prompts_become_a_private_data_set_in_one_commit(fake: FakeHub, api: HfApi, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(f'{{"prompt": "{split}"}}\n')
    (tmp_path / "notes.txt").write_text("not for others")
    commit = hub.push_prompts(str(tmp_path), REPO, api)
    repo = fake.repos[REPO]
    assert repo.is_private
    assert repo.branches["main"] == commit
    assert without_git(repo.files()) == {
        f"{split}.jsonl": f'{{"prompt": "{split}"}}\n'.encode() for split in ("train", "test")
    }
    (tmp_path / "test.jsonl").write_text('{"prompt": "another"}\n')
    hub.push_prompts(str(tmp_path), REPO, api)
    assert repo.files()["test.jsonl"] == b'{"prompt": "another"}\n'


def test_prompts_go_to_nothing_that_others_can_read(fake: FakeHub, api: HfApi, tmp_path: Path) -> None:
    fake.make(REPO, {}, is_private=False)
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=f"the data set {REPO} is public. Nothing was sent"):
        hub.push_prompts(str(tmp_path), REPO, api)
    assert not fake.repos[REPO].files()
    with pytest.raises(UserError, match="has no JSON lines on this machine"):
        hub.push_prompts("s3://bucket/export", REPO, api)
