"""vLLM and our engine with the same heads, on the same prompts: the same tokens, and the same guesses accepted.

    python tests/vllm_acceptance.py --vllm VENV --run medusa-demo

VENV is a virtual environment that has vLLM, and --run a run's folder with heads/ and prompts/test. The heads are
exported as they are, and once more with LOUD times their biases: vLLM drops biases in silence that `medusa_fc_bias`
does not announce, trained ones are too small for that to show, and had it dropped these, it would accept as before.
Each prompt is sent alone, greedy, in float32, as token ids; a reply ends where the base's generation config says.

Acceptance of a position is the share of steps that committed a guess there. Both verify the first guesses in the step
after the prefill's, and neither verifies any after the last token. They differ in the step in which a reply ends:
vLLM's counters (`vllm:spec_decode_*`, read from /metrics before and after) take in guesses behind the last token, as
long as the base agrees with them, though no reply has them; and where the last token is itself a guess, the engine
counts it as the one token that each step brings anyway. So vLLM's figures are given twice: as it counts, and as we do,
for which it tells each reply's steps one by one (`--per-request-spec-decode-metrics detailed`) and the last of them is
cut to the tokens that came. What is left between the two are near ties of guesses: the engine's heads guess in bfloat16
where the processor multiplies that, vLLM's in float32.
"""

import argparse
import json
import re
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import peers
import pyarrow.parquet as pq
import torch

from medusa_ray import exchange, provenance
from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.heads import MedusaHeads

MAX_NEW_TOKENS, MAX_TOTAL_TOKENS = 128, 1024
LOUD = 30
WITHIN = 0.01  # of each position's acceptance, between vLLM and the engine
COUNTERS = ("num_drafts", "num_accepted_tokens_per_pos")


@dataclass
class Reply:
    token_ids: list[int]
    accepted: list[int]  # by step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True, help="virtual environment that has vLLM")
    parser.add_argument("--run", type=Path, required=True, help="folder of a run")
    parser.add_argument("--num-prompts", type=int, default=250)
    parser.add_argument("--core", type=int, default=0, help="the core that vLLM is bound to")
    given = parser.parse_args()
    torch.set_num_threads(1)
    prompts = [
        row["prompt_ids"]
        for row in pq.read_table(given.run / "prompts/test").sort_by("id").to_pylist()
        if row["error"] is None
    ][: given.num_prompts]
    base = provenance.read_json(f"{given.run}/heads/config.json")["base_model_name_or_path"]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, times in (("as trained", 1), (f"biases times {LOUD}", LOUD)):
            heads = MedusaHeads.load(given.run / "heads")
            for parameter, tensor in heads.state_dict().items():
                if parameter.endswith(".bias"):
                    tensor *= times
            ours, theirs = f"{folder}/{name}", f"{folder}/{name}, for vLLM"
            heads.save(ours, base)
            exchange.export(ours, theirs, "vllm")
            found[times] = compare(prompts, base, ours, theirs, heads.num_heads, given)
    apart = max(abs(a - b) for a, b in zip(found[1], found[LOUD], strict=True))
    print(f"\nloud biases change vLLM's acceptance of a position by up to {apart:.3f}")
    if apart < 10 * WITHIN:
        sys.exit("biases hardly change what vLLM accepts: it has not loaded them")


def compare(
    prompts: list[list[int]], base: str, ours: str, theirs: str, num_heads: int, given: argparse.Namespace
) -> list[float]:
    """Prints a table of one pair of heads folders; returns vLLM's acceptance by position, as we count."""
    engine = Engine.load(base, ours, "chain", max_total_tokens=MAX_TOTAL_TOKENS)
    done = [engine.generate([prompt], MAX_NEW_TOKENS)[0] for prompt in prompts]
    options = ("--enforce-eager", "--max-num-seqs", "1", "--per-request-spec-decode-metrics", "detailed")
    server = peers.vllm(
        given.vllm, base, given.core, MAX_TOTAL_TOKENS, *options, heads=theirs, num_heads=num_heads
    )
    with server as url:
        before = counters(url)
        replies = [ask(url, prompt) for prompt in prompts]
        after = counters(url)
    raw = {name: [a - b for a, b in zip(after[name], before[name], strict=True)] for name in COUNTERS}
    steps = [accepted for reply in replies for accepted in reply.accepted]
    told = [sum(accepted > k for accepted in steps) for k in range(num_heads)]
    if raw["num_drafts"] != [len(steps)] or raw["num_accepted_tokens_per_pos"] != told:
        sys.exit(
            f"vLLM's counters say {raw}, its replies {len(steps)} steps with {told}: something else used it"
        )

    cut = [accepted for reply in replies for accepted in as_the_engine_counts(reply)]
    theirs_cut = [sum(accepted > k for accepted in cut) / len(cut) for k in range(num_heads)]
    num_steps = sum(reply.num_steps for reply in done)
    mine = [
        sum(sum(reply.accepted_histogram[k:]) for reply in done) / num_steps for k in range(1, num_heads + 1)
    ]
    same_tokens = sum(a.token_ids == b.token_ids for a, b in zip(done, replies, strict=True))
    same_steps = sum(
        a.accepted_histogram == histogram(as_the_engine_counts(b)) for a, b in zip(done, replies, strict=True)
    )
    tokens = sum(len(reply.token_ids) for reply in replies)
    print(f"\n{Path(ours).name}: n = {len(prompts)} prompts, {tokens} tokens")
    print(
        f"{'accepted at position':32}"
        + "".join(f"{k + 1:>9}" for k in range(num_heads))
        + "    steps  tokens/step"
    )
    for name, shares, number in (
        ("vLLM, its counters", [count / len(steps) for count in told], len(steps)),
        ("vLLM, to the last token", theirs_cut, len(cut)),
        ("medusa_ray, chain", mine, num_steps),
    ):
        print(f"{name:32}" + "".join(f"{x:9.4f}" for x in shares) + f"{number:9}{1 + sum(shares):13.3f}")
    print(f"the same tokens on {same_tokens} of {len(prompts)} prompts, the same steps on {same_steps}")
    apart = max(abs(a - b) for a, b in zip(theirs_cut, mine, strict=True))
    if same_tokens < len(prompts) or apart > WITHIN:
        sys.exit(
            f"apart by {apart:.4f}, where {WITHIN} is allowed; {len(prompts) - same_tokens} replies differ"
        )
    return theirs_cut


def as_the_engine_counts(reply: Reply) -> list[int]:
    """Guesses committed by each step: one less than its tokens, of which the last step has what is left."""
    if not reply.accepted:
        return []
    *whole, _ = reply.accepted
    left = len(reply.token_ids) - 1 - sum(accepted + 1 for accepted in whole)
    assert 1 <= left <= reply.accepted[-1] + 1, reply
    return [*whole, left - 1]


def histogram(accepted: list[int]) -> list[int]:
    return [accepted.count(j) for j in range(max(accepted, default=-1) + 1)]


# ------------------------------------------------------------------------------------------------------- vLLM


def ask(url: str, prompt: list[int]) -> Reply:
    body = {
        "model": "base",
        "prompt": prompt,
        "max_tokens": MAX_NEW_TOKENS,
        "temperature": 0,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        told = json.load(response)
    speculation = (told.get("metrics") or {}).get("speculative_decoding") or {}
    return Reply(told["choices"][0]["token_ids"], speculation.get("per_step_accepted", []))


def counters(url: str) -> dict[str, list[int]]:
    """Values of vLLM's counters of speculation, by position where there are several."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    found = {}
    for name in COUNTERS:
        pattern = re.compile(rf"vllm:spec_decode_{name}_total\{{(.*)\}} (\S+)")
        matches = [match for line in lines if (match := pattern.match(line))]
        at = {re.search(r'position="(\d+)"', match[1]): float(match[2]) for match in matches}
        found[name] = [
            int(value) for _, value in sorted(at.items(), key=lambda item: int(item[0][1]) if item[0] else 0)
        ]
    return found


if __name__ == "__main__":
    main()
