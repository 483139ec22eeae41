"""Tokens per second of the engine beside transformers' `generate`, on bases of three sizes, in one run.

    python tests/engine_speed.py --heads medusa-demo/heads --prompts medusa-demo/prompts/test --num-prompts 250

The base that ships with the package answers real prompts with real heads. A smaller and a larger one have random
weights, which cost the same; there an oracle guesses as often right as the demo's heads do, at the cost of real ones.
"""

import argparse
import json
import logging
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from medusa_ray import profile, provenance
from medusa_ray.demo.quality import BASE
from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.heads import HeadStack, MedusaHeads
from medusa_ray.medusa.tree import Tree

VOCAB_SIZE, MAX_NEW_TOKENS, NUM_EOS = 1024, 64, 30  # so that replies end, after 30 tokens in the mean
SHIPPED = "8 M, the shipped base"
SHAPES = {"0.9 M": (128, 3, 4, 352), "16 M": (512, 5, 8, 1376)}  # hidden, layers, heads, ffn
# Of each head, the chance that its best and its second guess are right where its elders were: the demo's.
SKILL = [(0.72, 0.10), (0.60, 0.10), (0.55, 0.10)]
TREE = Tree.from_paths([(0,), (0, 0), (1,), (0, 0, 0), (0, 1), (1, 0), (2,), (0, 0, 1)])


true_clock = time.perf_counter
seconds_away = 0.0  # that oracles took


def clock() -> float:
    return true_clock() - seconds_away


class Oracle(MedusaHeads):
    """Real heads, so that they cost what heads cost, whose guesses are then replaced while the clock stands still."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=VOCAB_SIZE)
        self.replies: dict[tuple[int, ...], list[int]] = {}
        self.engine: Engine | None = None
        self.random = random.Random(0)

    def stack(self) -> "Oracle":  # type: ignore[override]  # the engine asks it for topk only
        self.real: HeadStack = super().stack()
        return self

    def topk(self, hidden_BC: Tensor, k: int) -> Tensor:
        guess_BHK = self.real.topk(hidden_BC, k)
        if self.engine is None:  # while step times are measured
            return guess_BHK
        global seconds_away
        asked = true_clock()
        assert self.engine._batch is not None
        lengths = self.engine._batch.ahead.length_B.tolist()  # the host may not have read the last step yet
        for row, sequence in enumerate(self.engine.scheduler.running[: len(hidden_BC)]):
            prompt = sequence.request.prompt_ids
            coming = self.replies[tuple(prompt)][lengths[row] + 1 - len(prompt) :]
            for head, token in enumerate(coming[: self.num_heads]):
                draw = self.random.random()
                best, second = SKILL[head]
                guess_BHK[row, head] = -1
                rank = int(draw >= best)
                if draw < best + second and rank < k:
                    guess_BHK[row, head, rank] = token
        guess_BHK.clamp_min_(0)
        seconds_away += true_clock() - asked
        return guess_BHK


def random_base(name: str, folder: str) -> str:
    hidden_size, num_layers, num_heads, ffn_size = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=ffn_size,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    eos_ids = random.Random(0).sample(range(1, VOCAB_SIZE), NUM_EOS)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=eos_ids)
    model.save_pretrained(folder)
    print(f"{name}: {model.num_parameters():,} parameters", flush=True)
    return folder


def with_an_oracle(base: str, num_prompts: int, batch_sizes: list[int]) -> dict[int, dict[str, float]]:
    """As profile.run's `replies`, for a base of random weights."""
    draw = random.Random(0)
    prompts = [
        [draw.randrange(6, VOCAB_SIZE) for _ in range(draw.randrange(60, 110))] for _ in range(num_prompts)
    ]
    longest = max(map(len, prompts)) + MAX_NEW_TOKENS

    def load(tree: Any, compile: Any = "wait") -> Engine:
        heads = Oracle(int(LlamaConfig.from_pretrained(base).hidden_size)) if tree else None
        rows = max(batch_sizes)
        return Engine.load(
            base,
            heads,
            tree,
            max_batch_size=rows,
            max_total_tokens=longest,
            compile=compile,
            shares_prefixes=False,
        )

    engines = {"plain, eager": load(None, "no"), "plain": load(None)}
    replies = [done.token_ids for done in engines["plain"].generate(prompts, MAX_NEW_TOKENS)]
    for size in (2, 4, 8):
        engines[f"tree of {size}"] = load(TREE.paths[:size])
    heads = Oracle(engines["plain"].hidden_size)
    engines["adaptive"] = Engine(
        engines["plain, eager"].backbone, heads, TREE, max(batch_sizes), longest, True, shares_prefixes=False
    )
    engines["adaptive"].compile(base, "float32")
    engines["adaptive"].measure()
    for engine in engines.values():
        if isinstance(engine.heads, Oracle):
            engine.heads.engine = engine
            engine.heads.replies = {tuple(p): r for p, r in zip(prompts, replies, strict=True)}
    return {
        batch_size: profile.compare(profile.arms_of(engines, batch_size, MAX_NEW_TOKENS, True), prompts)
        for batch_size in batch_sizes
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Engine speed beside transformers, on three sizes of base.")
    parser.add_argument("--heads", required=True, help="heads of the shipped base, as the demo trains them")
    parser.add_argument("--prompts", required=True, help="prompts of the demo's test split")
    parser.add_argument("--num-prompts", type=int, default=250)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--base", action="append", choices=[*SHAPES, SHIPPED], help="default: all of them")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    time.perf_counter = clock  # for all that measures here
    batch_sizes = args.batch or [1, 4, 8, 16, 32]
    found = {}
    bases = args.base or [*SHAPES, SHIPPED]
    for name in filter(SHAPES.__contains__, bases):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = with_an_oracle(random_base(name, folder), args.num_prompts, batch_sizes)
            show(name, found[name])
    if SHIPPED in bases:
        real = profile.run(
            str(BASE), args.heads, args.prompts, args.num_prompts, tuple(batch_sizes), 128, True
        )
        found[SHIPPED] = real["replies"]
        show(SHIPPED, real["replies"])
        shares = ", ".join(f"{share:.1%} at batch {size}" for size, share in real["outside_share"].items())
        print(f"  of a step outside base and heads: {shares}")
    if args.out:
        record = {"replies": found, "hardware": provenance.hardware(), "versions": provenance.versions()}
        args.out.write_text(json.dumps(record, indent=1))


def show(name: str, replies: dict[int, dict[str, float]]) -> None:
    print(f"\n{name}: tokens/s at batch {', '.join(map(str, replies))}")
    for arm in next(iter(replies.values())):
        print(
            f"  {arm:26}"
            + "".join(f"{rates[arm]:9.0f} {rates[arm] / rates['plain']:5.2f}x" for rates in replies.values())
        )


if __name__ == "__main__":
    main()
