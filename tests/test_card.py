"""Runs as the stages leave them -> a card that the hub can read, whose figures are those of the files."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from test_report import WINNING, traffic_rows, write_run

from medusa_ray import card, provenance, report
from medusa_ray.config import CardConfig, ServeConfig, parse
from medusa_ray.medusa import layouts
from medusa_ray.medusa.heads import MedusaHeads

CHAIN, AWAY = [0.6431, 0.3722, 0.2013], [0.4114, 0.1555, 0.0616]
ACCURACY = {
    "heads": {"top1": [0.531, 0.432, 0.334], "top5": [0.811, 0.682, 0.553]},
    "acceptance": {"chain": 1.971, "calibrated_8": 2.214, "out_of_domain_chain": 1.628},
    "accepted_per_position": {"chain": CHAIN, "out_of_domain_chain": AWAY},
    "prompts": {"scored": 150, "out_of_domain": 80},
}
TRAIN = {
    "num_workers": 2, "epochs": 3, "batch_size": 128, "gradient_accumulation_steps": 4, "learning_rate": 2e-3,
    "lr_scheduler": "cosine", "warmup_steps": 20, "head_weight": 0.8, "labels": "soft", "dtype": "bfloat16", "seed": 7,
}  # fmt: skip
JOINT = {
    "epochs": 1, "batch_size": 16, "gradient_accumulation_steps": 1, "learning_rate": 5e-4, "rank": 32, "alpha": 16,
    "heads_learning_rate": 2e-3, "heads_weight": 0.1, "targets": "all-linear",
}  # fmt: skip


def finished(
    run: Path,
    base: str = "acme/sql-8b",
    sources: list[str] | None = None,
    joint: dict[str, Any] | None = None,
) -> Path:
    """The stages' files beside those of `write_run`; returns heads/."""
    folder = run / "heads"
    MedusaHeads(3, 1, hidden_size=8, vocab_size=50).save(folder, base)
    provenance.write_json(f"{folder}/accuracy.json", ACCURACY)
    sources = sources or ["hf://datasets/acme/chats@v1/train.jsonl"]
    provenance.write(f"{run}/prompts", {"loss_on": "assistant"}, {}, sources={"train": sources})
    distill = {"replies": "generate", "temperature": 0.3, "top_p": 0.9}
    inputs = {"prompts": provenance.digest(f"{run}/prompts")}
    rows = {"in": 1700, "good": 1600, "errors": {"long": 100}}
    provenance.write(f"{run}/distilled", {"distill": distill}, inputs, rows=rows, num_reply_tokens=50_447)
    inputs = {"distilled": provenance.digest(f"{run}/distilled")}
    provenance.write(f"{run}/hidden", {}, inputs)
    if not joint:
        inputs = {"hidden": provenance.digest(f"{run}/hidden")}
    config = {"revision": "abc123", "train": TRAIN, "joint": joint}
    provenance.write(str(folder), config, inputs, num_steps=573)
    provenance.write(f"{run}/evaluation", {}, {"heads": provenance.digest(str(folder))})
    return folder


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    """Of a run that has no report yet."""
    return finished(write_run(tmp_path / "run", traffic_rows(WINNING)))


def read(heads: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    _, front, text = (heads / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def cells(text: str, first: str) -> list[str]:
    """The row of a table that begins with this cell."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return row.strip("| ").split(" | ")


def test_the_hub_reads_the_front_matter(heads: Path) -> None:
    card.write(str(heads), CardConfig(license="apache-2.0").model_dump())
    front, _ = read(heads)
    assert front == {
        "base_model": "acme/sql-8b",
        "base_model_relation": "adapter",
        "license": "apache-2.0",
        "datasets": ["acme/chats"],
        "library_name": "medusa_ray",
        "pipeline_tag": "text-generation",
        "tags": ["medusa", "speculative-decoding"],
    }
    theirs = ModelCard.load(heads / "README.md").data
    assert theirs.to_dict() == front
    assert (theirs.base_model, theirs.license, theirs.library_name) == (
        "acme/sql-8b",
        "apache-2.0",
        "medusa_ray",
    )


def test_figures_are_those_of_the_files(heads: Path) -> None:
    card.write(str(heads))
    _, text = read(heads)
    for head in range(3):
        figures = [*(ACCURACY["heads"][k][head] for k in ("top1", "top5")), CHAIN[head], AWAY[head]]
        assert cells(text, str(head + 1))[2:] == [f"{figure:.3f}" for figure in figures]
    assert cells(text, "a chain of the heads' best guesses (n = 150 prompts)")[1] == "1.97"
    assert cells(text, "a tree of 8 guesses (n = 150 prompts)")[1] == "2.21"
    assert cells(text, "the chain, out of domain (n = 80 prompts)")[1] == "1.63"
    num_parameters = 3 * (8 * 8 + 8 + 50 * 8)
    assert cells(text, "parameters")[1] == f"{num_parameters:,}, float32"
    assert cells(text, "base")[1] == "`acme/sql-8b`; revision `abc123`"
    assert "on 200 of 200 held-out prompts (float32)" in text
    assert "1,600 of 1,700, 50,447 tokens of replies" in text
    assert "(self-distillation), temperature 0.3, top-p 0.9." in text
    assert "the base's likeliest tokens, of all assistant turns." in text
    assert "3 epochs in steps of 1,024 positions; learning rate 0.002, cosine, 20 steps of warm-up" in text
    assert "Steps: 573" in text


def test_a_report_brings_speedup_beside_acceleration_with_n_and_hardware(heads: Path) -> None:
    card.write(str(heads))
    _, before = read(heads)
    assert "**Speed was not measured.**" in before
    written = report.run(str(heads.parent))
    _, text = read(heads)
    assert "Speed was not measured" not in text
    acceleration = written["arms"]["medusa"]["acceleration"]
    assert (
        f"at an acceleration of {acceleration:.2f} tokens per step, on AMD EPYC 9R14, 2 cores, 15.6 GiB"
        in text
    )
    for load, ratio in written["speedup"].items():
        arms = [written["arms"][arm]["load"][load] for arm in ("baseline", "medusa")]
        assert cells(text, load)[1:] == [
            str(arms[1]["requests"]),
            *(f"{arm['output_tokens_per_s']:.0f}" for arm in arms),
            f"{ratio['output_tokens_per_s']:.2f}x",
            "{:.2f}x [{:.2f}, {:.2f}]".format(ratio["tpot"], *ratio["ci95"]),
        ]
    assert written["verdict"]["reason"] in text
    key = provenance.digest(str(heads))
    assert provenance.read(f"{heads.parent}/evaluation")["inputs"]["heads"] == key, (
        "the card made them other heads"
    )


def test_figures_of_other_heads_are_not_taken(heads: Path) -> None:
    """Heads trained anew lie beside the report and the parity of the old ones until these are made anew, too."""
    report.run(str(heads.parent))
    provenance.write_json(f"{heads}/accuracy.json", {**ACCURACY, "heads": {"top1": [0.1], "top5": [0.2]}})
    record = provenance.read(str(heads))
    provenance.write(str(heads), {"train": TRAIN}, record["inputs"], num_steps=600)
    provenance.write(
        f"{heads.parent}/distilled", {"distill": {"replies": "given"}}, {}, rows={"in": 9, "good": 9}
    )
    card.write(str(heads))
    _, text = read(heads)
    assert "**Speed was not measured.**" in text
    assert "was not checked for these heads" in text
    assert "Replies: not on record" in text
    # Nor once the new replies have their states, which the heads have not seen yet.
    provenance.write(
        f"{heads.parent}/hidden", {}, {"distilled": provenance.digest(f"{heads.parent}/distilled")}
    )
    card.write(str(heads))
    assert "Replies: not on record" in read(heads)[1]


def test_nothing_of_the_machine_that_trained_them_is_told(tmp_path: Path) -> None:
    private = tmp_path / "secret-place"
    base = private / "base"
    base.mkdir(parents=True)
    sources = [f"file://{private}/chats/train.jsonl", "s3://secret-place/more.parquet"]
    heads = finished(write_run(private / "run", traffic_rows(WINNING)), str(base), sources)
    report.run(str(heads.parent))
    front, text = read(heads)
    assert "base_model" not in front
    assert "datasets" not in front
    assert "secret" not in text
    assert not re.findall(r"(?<![\w.<:/])/\w+/|file:|s3:", text)
    assert "`base` (a local folder), which is not on the hub" in text
    assert "`train.jsonl`, which is not public, `more.parquet`, which is not public" in text
    card.write(str(heads), CardConfig(base_model="acme/sql-8b").model_dump())
    front, text = read(heads)
    assert front["base_model"] == "acme/sql-8b"
    assert 'Engine.load("acme/sql-8b", heads="HEADS"' in text
    assert "local folder" not in text


def test_what_nobody_stated_is_not_made_up_and_what_was_stated_stays(heads: Path) -> None:
    card.write(str(heads), CardConfig().model_dump())
    front, text = read(heads)
    assert "license" not in front
    assert cells(text, "licence of the heads")[1] == "not stated; the base keeps its own"
    assert "Licence of the data: not stated" in text
    stated = CardConfig(license="mit", data_license="cc-by-4.0", description="For *SQL* only.")
    card.write(str(heads), stated.model_dump())
    report.run(str(heads.parent))  # which knows no run.yaml
    front, text = read(heads)
    assert front["license"] == "mit"
    assert "Licence of the data: cc-by-4.0" in text
    assert "\n\nFor *SQL* only.\n\n" in text


def test_heads_alone_make_a_card_of_what_is_known(tmp_path: Path) -> None:
    MedusaHeads(2, 2, hidden_size=8, vocab_size=50, layout="shared").save(tmp_path, "acme/sql-8b")
    card.write(str(tmp_path))
    front, text = read(tmp_path)
    assert front["base_model"] == "acme/sql-8b"
    assert cells(text, "heads")[1] == "2, each of 2 residual block(s) and the base's output layer"
    assert cells(text, "they guess")[1] == "all 50 tokens of the base"
    for sentence in (
        "The heads were not evaluated",
        "Speed was not measured",
        "was not checked for these heads",
        "There is no record of how the heads were trained",
    ):
        assert sentence in text
    # The same where a run got as far as old files, which have no acceptance by position.
    provenance.write_json(f"{tmp_path}/accuracy.json", {"heads": {"top1": [0.5], "top5": [0.6]}})
    card.write(str(tmp_path))
    assert cells(read(tmp_path)[1], "1")[2:] == ["0.500", "0.600", "not measured", "not measured"]
    with pytest.raises(FileNotFoundError, match="has no safetensors file"):
        card.write(str(tmp_path / "nowhere"))


def test_medusa_2_says_that_the_base_changed(tmp_path: Path) -> None:
    adapter = tmp_path / "run/adapter"
    provenance.write_json(f"{adapter}/adapter_config.json", {"base_model_name_or_path": "acme/sql-8b"})
    heads = finished(write_run(tmp_path / "run", []), f"file://{adapter}", joint=JOINT)
    card.write(str(heads))
    front, text = read(heads)
    assert front["base_model"] == "acme/sql-8b"
    assert front["tags"] == ["medusa", "speculative-decoding", "medusa-2"]
    assert "**The base has changed.**" in text
    assert "`adapter` (a local folder), which is not on the hub, an adapter on acme/sql-8b" in text
    assert "1 epochs in steps of 32 rows; LoRA of rank 32, alpha 16, on all-linear" in text
    assert "add `--with-base` to the export" in text


def test_a_difference_is_called_a_fault(heads: Path) -> None:
    provenance.write_json(
        f"{heads.parent}/evaluation/evaluation.json",
        {"parity": {"prompts": 200, "token_exact": 195, "near_ties": 3}},
    )
    card.write(str(heads))
    _, text = read(heads)
    assert "on 195 of 200 held-out prompts." in text
    assert "On 3 more they part only where the base's two best scores all but coincide." in text
    assert "**On 2 they differ, which is a fault" in text


def test_its_serve_yaml_and_its_commands_are_valid(heads: Path) -> None:
    card.write(str(heads))
    _, text = read(heads)
    served = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    engine = parse(ServeConfig, served, "card").applications[0].args
    assert (engine.base, engine.heads, engine.tree) == ("acme/sql-8b", "HEADS", "auto")
    speculation = json.loads(re.search(r"--speculative-config '(.*)'", text)[1])
    assert speculation == {"method": "medusa", "model": "OUT", "num_speculative_tokens": 3}
    assert "--num_medusa_heads 3" in text


@pytest.mark.parametrize(
    ("layout", "num_layers", "num_tokens", "as_is", "needs_words", "cannot"),
    [
        ("own", 1, None, "tgi vllm trtllm modelopt fasterdecoding", "", ""),
        ("own", 2, None, "tgi vllm trtllm modelopt fasterdecoding", "", ""),
        ("shared", 1, None, "tgi vllm", "trtllm modelopt fasterdecoding", ""),
        ("shared", 2, None, "vllm", "tgi trtllm modelopt fasterdecoding", ""),
        ("lowrank", 1, None, "", "tgi vllm trtllm modelopt fasterdecoding", ""),
        ("own", 1, 20, "vllm", "", "tgi trtllm modelopt fasterdecoding"),
        ("shared", 1, 20, "vllm", "tgi trtllm modelopt fasterdecoding", ""),
        ("lowrank", 1, 20, "", "vllm", "tgi trtllm modelopt fasterdecoding"),
    ],
)
def test_each_server_is_told_what_it_can_hold(
    tmp_path: Path,
    layout: str,
    num_layers: int,
    num_tokens: int | None,
    as_is: str,
    needs_words: str,
    cannot: str,
) -> None:
    token_map_M = None if num_tokens is None else torch.arange(num_tokens)
    heads = MedusaHeads(
        2, num_layers, hidden_size=8, vocab_size=50, layout=layout, rank=4, token_map_M=token_map_M
    )
    heads.save(tmp_path, "acme/sql-8b")
    heads.init_from(torch.zeros(50, 8))
    card.write(str(tmp_path))
    _, text = read(tmp_path)
    shape = card.Shape.read(str(tmp_path))
    assert (shape.num_heads, shape.num_layers, shape.layout) == (2, num_layers, layout)
    assert (shape.rank, shape.draft_vocab_size) == (4 if layout == "lowrank" else 0, num_tokens)
    # What the export itself says is the oracle of the table above.
    for servers, refuses, helps in ((as_is, False, True), (needs_words, True, True), (cannot, True, False)):
        for server in servers.split():
            for materialise, expects in ((False, refuses), (True, not helps)):
                with pytest.raises(ValueError, match="cannot hold") if expects else nullcontext():
                    layouts.fitted(heads, server, torch.zeros(50, 8), materialise)
    for server in as_is.split():
        assert f"--format {server} --materialise" not in text
        assert (f"export HEADS OUT --format {server}" in text) == (server != "tgi")
    for server in needs_words.split():
        assert f"medusa-ray export HEADS OUT --format {server} --materialise" in text
    for server in cannot.split():
        assert f"--format {server}" not in text
    assert text.count("cannot hold heads that guess 20 tokens only") == len(cannot.split())
