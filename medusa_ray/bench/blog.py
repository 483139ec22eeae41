"""The command line of GuideLLM that the blog post has -> the traffic file that does the same, for a message.

GuideLLM itself takes these flags no longer: `guidellm --target ...` of 0.2 became `guidellm run --backend ...` in 0.8.
"""

import re
import shlex

import yaml

RATES = {"constant": "constant", "poisson": "poisson", "concurrent": "concurrency"}
HUB_PARQUET = "refs%2Fconvert%2Fparquet"  # where the hub keeps any data set as Parquet


def is_old_line(words: list[str]) -> bool:
    """Whether the words after `medusa-ray bench` are GuideLLM's."""
    return words[0] == "guidellm" or (words[0].startswith("--") and "target" in _flags(words))


def answer(words: list[str]) -> str:
    """What to put into a file instead, and how to run it."""
    flags = _flags(words)
    output = re.sub(r"\.\w+$", "", flags.pop("output-path", flags.pop("output-dir", "bench")))
    url = re.sub(r"/v1/?$", "", flags.pop("target", "http://localhost:8080"))
    kind, rate = flags.pop("rate-type", "sweep"), flags.pop("rate", "")
    loads = ["synchronous", "throughput"]
    if kind in RATES:
        loads = [f"{RATES[kind]}={number.strip()}" for number in rate.split(",") if number.strip()]
    elif kind in loads:
        loads = [kind]
    data = flags.pop("data", "prompts.jsonl")
    if flags.pop("data-type", None) == "transformers" or re.fullmatch(r"[\w.-]+/[\w.-]+", data):
        data = f"hf://datasets/{data}@{HUB_PARQUET}/default/test"
    traffic = {
        "output": output,
        "prompts": data,
        "targets": {"medusa": {"url": url, "model": flags.pop("model", "tgi")}},
        "loads": loads,
        "num_requests": yaml.safe_load(flags.pop("max-requests", "200")),
        "max_seconds": yaml.safe_load(flags.pop("max-seconds", "60")),
    }
    left = f"Nothing takes the place of {', '.join('--' + flag for flag in flags)}.\n" if flags else ""
    return (
        "this is GuideLLM's old command line, which neither `medusa-ray bench` nor GuideLLM 0.8 takes. Put this into "
        f"traffic.yaml:\n\n{yaml.safe_dump(traffic, sort_keys=False)}\nand run: medusa-ray bench traffic.yaml\n{left}"
        "A second target under `targets`, the server without heads named baseline, gets the same requests in turn, and "
        "only that makes a speedup. Rows with `messages` go to the chat endpoint and into the server's template; rows "
        "with `text` are taken to be in it already, and go to /v1/completions."
    )


def _flags(words: list[str]) -> dict[str, str]:
    """--name value and --name=value; a line copied with its backslashes and its `guidellm benchmark` too."""
    parts = [word for word in shlex.split(" ".join(map(shlex.quote, words))) if word.strip("\\\n ")]
    flags, name = {}, None
    for part in parts:
        if part.startswith("--"):
            name, _, value = part[2:].partition("=")
            flags[name] = value
        elif name:
            flags[name] = part
    return flags
