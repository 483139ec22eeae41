"""Ours, vLLM, transformers' server and its `generate` on the demo's base: one benchmark, the arms in turns.

    python tests/peers_speed.py --run medusa-demo --vllm VENV

--run is the folder of a demo's run, with heads/ and prompts/test; vLLM gets the same heads, exported. The traffic is
`medusa-ray bench`'s own, and all servers are up from its beginning to its end, on one core, the client on another;
Ray's own processes run where they like. Greedy, float32, replies end where the base ends them.
"""

import argparse
import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import peers
import pyarrow.parquet as pq
from serve_speed import CLIENT_CORE, MAX_NEW_TOKENS, MAX_TOTAL_TOKENS, SERVER_CORE, engine_args, serving

from medusa_ray import bench, exchange, provenance
from medusa_ray.config import TargetConfig, TrafficConfig
from medusa_ray.demo.quality import BASE
from medusa_ray.report.numbers import measure_load
from medusa_ray.report.samples import Samples

NUM_LOOKUP = 3  # as many guesses as the demo's heads make


def targets(stack: ExitStack, heads: str, venv: Path | None) -> dict[str, TargetConfig]:
    """All servers, each started and answering, until the stack is closed."""
    base = str(BASE)
    arms = {"medusa": engine_args(base, heads=heads), "baseline": engine_args(base)}
    urls = stack.enter_context(serving(arms))
    found = {arm: TargetConfig(url=urls[arm]["replica's port"], model=arm) for arm in ("baseline", "medusa")}
    if venv:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        exchange.export(heads, f"{folder}/heads", "vllm")
        num_heads = provenance.read_json(f"{heads}/config.json")["medusa_num_heads"]
        options = ("--no-enable-prefix-caching", "--max-num-seqs", "32")
        common = (venv, base, SERVER_CORE, MAX_TOTAL_TOKENS, *options)
        url = stack.enter_context(peers.vllm(*common, heads=f"{folder}/heads", num_heads=num_heads))
        found["vLLM_medusa"] = TargetConfig(url=url, model="base")
        found["vLLM_base"] = TargetConfig(url=stack.enter_context(peers.vllm(*common)), model="base")
    url = stack.enter_context(peers.transformers_serve(base, SERVER_CORE))
    found["transformers_serve"] = TargetConfig(url=url, model=base)
    url = stack.enter_context(peers.transformers_generate(base, SERVER_CORE, NUM_LOOKUP))
    found["generate_lookup"] = TargetConfig(url=url, model="base")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a demo's run")
    parser.add_argument("--vllm", type=Path, help="virtual environment that has vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--out", type=Path, default=Path("peers"), help="folder that takes bench/")
    given = parser.parse_args()
    os.sched_setaffinity(0, {CLIENT_CORE})
    with ExitStack() as stack:
        arms = targets(stack, str((given.run / "heads").resolve()), given.vllm)
        config = TrafficConfig(
            output=str(given.out / "bench"),
            prompts=[str(given.run / "prompts/test")],
            targets=arms,
            loads=[f"concurrency={streams}" for streams in given.concurrency],
            external="vLLM_base" if given.vllm else "transformers_serve",
            num_requests=given.requests,
            num_warmup=32,
            rounds=given.rounds,
            max_seconds=600,
            max_tokens=MAX_NEW_TOKENS,
        )
        bench.run(config)
    show(config)


def show(config: TrafficConfig) -> None:
    samples = Samples(pq.read_table(f"{config.output}/requests.parquet").to_pylist())
    found = {
        load: {arm: measure_load(samples, arm, load, {}) for arm in config.targets} for load in config.loads
    }
    for load, arms in found.items():
        print(f"\n{load}, {arms['baseline']['requests']} requests of each arm in {config.rounds} rounds")
        rate = arms["baseline"]["output_tokens_per_s"]
        for arm, figures in arms.items():
            tpot = figures["tpot_ms"]
            print(
                f"  {arm:20}{figures['output_tokens_per_s'] or 0:9.0f} tokens/s"
                f"{(figures['output_tokens_per_s'] or 0) / rate:7.2f} of baseline   TPOT"
                f" {'' if tpot is None else format(tpot, '7.2f')} ms   failed {figures['failed']}"
            )
    record = {"load": found, "hardware": provenance.hardware(), "versions": provenance.versions()}
    Path(f"{config.output}/peers.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
