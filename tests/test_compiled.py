"""The compiled pass: the same replies as the eager one's, built once, and done without where it cannot be had."""

import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_heads import OracleHeads
from test_engine import TREES
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_ray.medusa import compiled
from medusa_ray.medusa.engine import Engine

pytestmark = pytest.mark.long
needs_compiler = pytest.mark.skipif(compiled.why_not("cpu") is not None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of compiled passes that lasts for this module."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield folder / "medusa_ray"
        torch.set_num_threads(num_threads)


def compiled_engine(base: Path, tree: str | None = None, **options) -> Engine:
    heads = OracleHeads(32, 262) if tree else None
    engine = Engine.load(str(base), max_total_tokens=256, **options)
    engine = Engine(engine.backbone, heads, TREES.get(tree), max_total_tokens=256, **options)
    engine.compile(str(base), "float32")
    if heads:
        heads.engine = engine
    return engine


@needs_compiler
@pytest.mark.parametrize("batch_size", [1, 2, 5, 12])
@pytest.mark.parametrize("tree", [None, "chain", "tree"])
def test_replies_equal_those_of_generate(cache, tiny_base, prompts, plain_replies, tree, batch_size):
    """One library serves all numbers of rows, nodes and pages: a number that was compiled in would show here."""
    engine = compiled_engine(tiny_base, tree, max_batch_size=batch_size)
    assert engine.mode == "compiled"
    if tree:
        engine.heads.replies = {tuple(p): r for p, r in zip(prompts, plain_replies, strict=True)}
    assert [d.token_ids for d in engine.generate(prompts, max_new_tokens=40)] == plain_replies


@pytest.fixture
def paged_base(tiny_base: Path, tmp_path: Path) -> Path:
    """As tiny_base, but with heads that the kernel for pages takes."""
    folder = tmp_path / "paged"
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_base, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@needs_compiler
def test_replies_of_a_base_whose_pages_are_read_in_place_equal_the_eager_ones(
    cache, paged_base, prompts, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # others count what is in the cache
    eager = Engine.load(str(paged_base), max_total_tokens=256).generate(prompts, max_new_tokens=40)
    replies = [done.token_ids for done in eager]
    for tree, batch_size in ((None, 5), ("chain", 1), ("tree", 12)):
        engine = compiled_engine(paged_base, tree, max_batch_size=batch_size)
        assert engine.mode == "compiled"
        if tree:
            engine.heads.replies = {tuple(p): r for p, r in zip(prompts, replies, strict=True)}
        assert [done.token_ids for done in engine.generate(prompts, max_new_tokens=40)] == replies


@needs_compiler
def test_sampled_replies_equal_the_eager_ones(cache, tiny_base, prompts):
    settings = {"max_new_tokens": 30, "temperature": 0.8, "top_p": 0.9, "seed": list(range(len(prompts)))}
    eager = Engine.load(str(tiny_base), max_total_tokens=256).generate(prompts, **settings)
    fast = compiled_engine(tiny_base, max_batch_size=5).generate(prompts, **settings)
    assert [d.token_ids for d in fast] == [d.token_ids for d in eager]


@needs_compiler
def test_other_threads_run_while_a_pass_does(cache, tiny_base):
    """A server's event loop is one: it would stand still for the whole of each pass, and streams would stutter."""
    engine = compiled_engine(tiny_base, max_batch_size=64)
    example, _ = compiled.example(engine.backbone)
    token_BN, length_B, table_BP, depth_N, mask_NN, every_BN, *others = example
    many = [tensor.repeat(200, 1) for tensor in (token_BN, table_BP, every_BN)]
    arguments = (many[0], length_B.repeat(200), many[1], depth_N, mask_NN, many[2], *others)
    begins, ran_at_s = threading.Event(), []
    thread = threading.Thread(target=lambda: begins.wait() and ran_at_s.append(time.perf_counter()))
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # so that only a call that lets go of Python's lock lets another thread run
    try:
        begins.set()
        with torch.inference_mode():
            started_s = time.perf_counter()
            engine._pass(*arguments)
            ended_s = time.perf_counter()
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert ran_at_s[0] < (started_s + ended_s) / 2, "it had to wait for the end of the pass"


def test_a_library_that_cannot_be_loaded_leaves_the_engine_eager(tmp_path, tiny_base, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "why_not", lambda device: None)
    monkeypatch.setattr(logging.getLogger("medusa_ray"), "propagate", True)
    library = compiled.library_of(str(tiny_base), "float32", None)
    library.parent.mkdir(parents=True)
    library.write_bytes(b"no library")
    engine = Engine.load(str(tiny_base), max_total_tokens=256, compile="wait")
    assert engine.mode == "eager"
    assert f"{library} cannot be loaded" in caplog.text


@needs_compiler
def test_a_pass_is_built_once_and_again_for_other_weights(cache, tiny_base, tmp_path, monkeypatch):
    """The weights are inside: a package found by the name of its folder alone would serve yesterday's."""
    compiled_engine(tiny_base)
    (library,) = cache.glob("*.so")
    assert compiled.library_of(str(tiny_base), "float32", None) == library
    monkeypatch.setattr(subprocess, "run", None)  # a second build would fail
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    assert compiled_engine(copy).mode == "compiled"

    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    names = {compiled.library_of(str(copy), dtype, None) for dtype in ("float32", "bfloat16")}
    assert library not in names
    assert len(names) == 2


@pytest.mark.parametrize("mistake", ["another row's pages", "not a number"])
def test_a_compiled_pass_that_says_something_else_is_not_taken(tiny_base, monkeypatch, caplog, mistake):
    """A compiler that takes a number for granted gives wrong text, not an error."""
    engine = Engine.load(str(tiny_base), max_total_tokens=256)
    eager = engine._pass

    def wrong(token_BN, length_B, table_BP, *rest):
        logits_BWV, *others = eager(token_BN, length_B, table_BP.flip(0), *rest)
        return (logits_BWV * torch.nan if mistake == "not a number" else logits_BWV, *others)

    monkeypatch.setattr(compiled, "why_not", lambda device: None)
    monkeypatch.setattr(compiled, "load_or_build", lambda *_: wrong)
    monkeypatch.setattr(logging.getLogger("medusa_ray"), "propagate", True)
    engine.compile(str(tiny_base), "float32")
    assert engine.mode == "eager"
    assert "the compiled pass of LlamaForCausalLM differs from the eager one by" in caplog.text


def test_a_loaded_model_has_no_folder_to_build_from(tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with pytest.raises(ValueError, match="base is a loaded LlamaForCausalLM"):
        Engine.load(model, compile="wait")


@needs_compiler
def test_an_engine_serves_eagerly_until_its_pass_is_built(cache, tiny_base, prompts, plain_replies):
    engine = Engine.load(str(tiny_base), max_total_tokens=256, compile="background")
    deadline = time.monotonic() + 60
    while engine.mode == "eager" and time.monotonic() < deadline:
        assert [d.token_ids for d in engine.generate(prompts[:3], max_new_tokens=40)] == plain_replies[:3]
    assert engine.mode == "compiled"
    assert [d.token_ids for d in engine.generate(prompts, max_new_tokens=40)] == plain_replies


def test_an_engine_without_a_compiler_runs_eagerly_and_says_so(cache, tiny_base, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(logging.getLogger("medusa_ray"), "propagate", True)
    engine = Engine.load(str(tiny_base), max_total_tokens=256, compile="wait")
    assert engine.mode == "eager"
    assert "runs eagerly: there is no C++ compiler" in caplog.text
    assert len(engine.generate([[1, 5, 6]], 5)[0].token_ids) <= 5


@needs_compiler
def test_a_build_that_fails_leaves_the_engine_eager(tmp_path, tiny_base, monkeypatch, caplog):
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, 1, stderr=b"no space left")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(logging.getLogger("medusa_ray"), "propagate", True)
    engine = Engine.load(str(tiny_base), max_total_tokens=256, compile="wait")
    assert engine.mode == "eager"
    assert "could not be compiled. Its last output:\nno space left" in caplog.text
    assert list(tmp_path.rglob("*.so")) == []
