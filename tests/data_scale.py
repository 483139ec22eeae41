"""Rows per second of the data stage and its driver's peak memory, at growing numbers of short rows.

    python -m tests.data_scale [--rows 10000 100000 1000000] [--cpus 2]

Each size runs in a process and a local Ray of its own, with a byte-level tokenizer. Both should be flat.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write_rows(file: Path, num_rows: int) -> None:
    with file.open("w", encoding="utf-8") as out:
        for i in range(num_rows):
            asked = {"role": "user", "content": f"What is {i} and {i * 7 % 1000}?"}
            told = {"role": "assistant", "content": f"It is {i + i * 7 % 1000}."}
            out.write(json.dumps({"id": f"r{i}", "messages": [asked, told]}) + "\n")


def write_base(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["<|end|>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=257, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        folder
    )


def measure(folder: Path, num_rows: int, num_cpus: int) -> None:
    """Prints a row of the table; in a process of its own, whose peak is this run's alone."""
    import ray

    from medusa_ray import data, provenance
    from medusa_ray.config import RunConfig

    config = RunConfig.model_validate(
        {
            "output": str(folder / "out"),
            "model": {"base": str(folder / "base")},
            "data": {"train": str(folder / "chats.jsonl")},
        }
    )
    ray.init(num_cpus=num_cpus, include_dashboard=False, object_store_memory=2**29, log_to_driver=False)
    start_s = time.monotonic()
    prompts = data.run(config)
    seconds = time.monotonic() - start_s
    splits = (provenance.read(prompts) or {})["splits"]
    good = sum(counts["good"] for counts in splits.values())
    assert good == num_rows, splits
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"| {num_rows:>9,} | {seconds:>7.1f} | {num_rows / seconds:>8,.0f} | {peak_gib:>6.2f} |", flush=True
    )
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder:
        measure(given.folder, given.rows[0], given.cpus)
        return
    print("|      rows | seconds |   rows/s | driver's peak GiB |\n|---|---|---|---|", flush=True)
    environment = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }
    for num_rows in given.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(folder / "chats.jsonl", num_rows)
            write_base(folder / "base")
            command = [sys.executable, "-m", "tests.data_scale", "--folder", name, "--rows", str(num_rows)]
            subprocess.run([*command, "--cpus", str(given.cpus)], check=True, env=environment)


if __name__ == "__main__":
    main()
