"""Two processes with a shard of the base each say what one with all of it says."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_heads import OracleHeads
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_ray.medusa import base
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.engine import Engine, Request
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.sharded import Shards, follow
from medusa_ray.medusa.tree import Tree

TREE = Tree.from_paths([(0,), (1,), (0, 0), (2,), (0, 1), (1, 0), (0, 0, 0), (1, 0, 1)])
PATIENCE_S = 300  # processes import torch, on a machine that may have much else to do
SIZES = {
    "vocab_size": 263,  # odd: the last shard of the vocabulary is shorter
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def requests_of(prompts: list[list[int]]) -> list[Request]:
    """Greedy ones, whose walks a pass moves itself, and others, whose walks the leader has everybody move."""
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "top_p": 0.9},
        {"frequency_penalty": 0.7},
        {"logprobs": 2, "temperature": 0.5},
    ]
    return [Request(p, 30, seed=i, ignore_eos=True, **settings[i % 4]) for i, p in enumerate(prompts)]


def replies_of(engine: Engine, requests: list[Request]) -> list[list[int]]:
    sequences = [engine.add(request) for request in requests]
    while engine.scheduler.num_open:
        engine.step()
    return [sequence.token_ids for sequence in sequences]


def all_replies(backbone: Backbone, prompts: list[list[int]], shards: Shards | None) -> dict[str, Any]:
    """By arm: greedy ones alone, then all kinds together."""
    greedy, mixed = [Request(p, 30, ignore_eos=True) for p in prompts], requests_of(prompts)
    options: dict[str, Any] = {"max_batch_size": 5, "max_total_tokens": 256, "shards": shards}
    engine = Engine(backbone, **options)
    plain = [replies_of(engine, requests) for requests in (greedy, mixed)]
    replies: dict[str, Any] = {"baseline": plain}
    heads = MedusaHeads(3, 1, hidden_size=32, vocab_size=backbone.vocab_size, layout="shared")
    heads.init_from(backbone.output_weight_VC)
    engine = Engine(backbone, heads, TREE, **options)
    replies["random heads"] = [replies_of(engine, requests) for requests in (greedy, mixed)]
    replies["oracle"] = []
    oracle = OracleHeads(backbone.hidden_size, backbone.vocab_size, skill=0.8)
    oracle.engine = engine = Engine(backbone, oracle, TREE, **options)
    for requests, known in zip((greedy, mixed), plain, strict=True):
        oracle.replies = {tuple(r.prompt_ids): reply for r, reply in zip(requests, known, strict=True)}
        replies["oracle"].append(replies_of(engine, requests))
    replies["accepted"] = engine.counters.num_accepted_tokens
    return replies


def lead(port: int, folder: str, prompts: list[list[int]], output: str) -> None:
    torch.set_num_threads(1)
    shards = Shards.join(dist.TCPStore("127.0.0.1", port), 0, 2)
    backbone = Backbone.load(folder, torch.float32, "cpu", num_shards=2)
    replies = all_replies(backbone, prompts, shards)
    replies["kv_heads"] = [shape.num_heads for shape in backbone.kv_shapes]
    Path(output).write_text(json.dumps(replies))


def follow_it(port: int, folder: str) -> None:
    torch.set_num_threads(1)
    shards = Shards.join(dist.TCPStore("127.0.0.1", port), 1, 2)
    with pytest.raises(RuntimeError):  # when the leader has gone
        follow(Backbone.load(folder, torch.float32, "cpu", num_shards=2), shards)


def lead_for_ever(port: int, folder: str, output: str) -> None:
    torch.set_num_threads(1)
    shards = Shards.join(dist.TCPStore("127.0.0.1", port), 0, 2)
    engine = Engine(Backbone.load(folder, torch.float32, "cpu", num_shards=2), shards=shards)
    try:
        while True:
            engine.generate([[1, 7]], 20)
            Path(output).write_text("answered")
    except RuntimeError as error:
        Path(output).write_text(str(error))


@contextmanager
def two_processes(leader: Any, folder: str, *args: Any) -> Iterator[tuple[Any, Any]]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start = partial(get_context("spawn").Process, daemon=True)
    both = (
        start(target=leader, args=(store.port, folder, *args)),
        start(target=follow_it, args=(store.port, folder)),
    )
    for process in both:
        process.start()
    try:
        yield both
        for process in both:
            process.join(PATIENCE_S)
    finally:
        for process in both:
            process.kill()


@pytest.mark.parametrize(("family", "is_tied"), [("llama", False), ("qwen2", True), ("qwen3", False)])
def test_two_shards_say_what_one_says(
    tmp_path: Path, prompts: list[list[int]], family: str, is_tied: bool
) -> None:
    """Followers that miss a move of keys and values spoil the next step's logits of all."""
    torch.manual_seed(0)
    folder, output = str(tmp_path / "base"), str(tmp_path / "replies.json")
    config = AutoConfig.for_model(family, **SIZES, tie_word_embeddings=is_tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with two_processes(lead, folder, prompts, output) as both:
        one = all_replies(Backbone.load(folder, torch.float32, "cpu"), prompts, None)
    assert [process.exitcode for process in both] == [0, 0]
    two = json.loads(Path(output).read_text())
    assert two.pop("kv_heads") == [1, 1]
    assert two == one
    assert one["baseline"] == one["random heads"] == one["oracle"]
    assert one["accepted"] > 200


@pytest.mark.parametrize("victim", [0, 1], ids=["leader", "follower"])
def test_when_one_shard_dies_the_other_does_not_hang(tiny_base: Path, tmp_path: Path, victim: int) -> None:
    said = tmp_path / "said"
    with two_processes(lead_for_ever, str(tiny_base), str(said)) as both:
        deadline_s = time.monotonic() + PATIENCE_S
        while not said.exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        os.kill(both[victim].pid, signal.SIGKILL)
        survivor = both[1 - victim]
        survivor.join(30)
        assert survivor.exitcode == 0
        assert victim == 0 or said.read_text() != "answered"


@pytest.mark.parametrize(
    ("family", "changes", "num_shards", "says"),
    [
        ("llama", {}, 4, "has 2 num_key_value_heads, which do not divide"),
        ("llama", {}, 3, "has 4 num_attention_heads, which do not divide"),
        ("opt", {"num_key_value_heads": None}, 2, "no tensor-parallel plan for opt"),
    ],
)
def test_a_base_that_cannot_be_split_is_refused_before_it_is_loaded(
    tmp_path: Path, family: str, changes: dict[str, Any], num_shards: int, says: str
) -> None:
    AutoConfig.for_model(family, **(SIZES | changes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says):
        Backbone.load(str(tmp_path), torch.float32, "cpu", num_shards=num_shards)
    with pytest.raises(ValueError, match="quantized, and only plain weights"):
        base.check_shards(str(tmp_path), 2, None, "4bit")
