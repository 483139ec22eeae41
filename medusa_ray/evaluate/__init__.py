"""Heads and held-out prompts -> accuracy of the heads, a calibrated tree, parity and speed.

One pass of the base answers every held-out prompt and keeps its hidden states; all that heads and trees would have
done on those replies follows from them exactly. Some of the prompts shape the tree, the others score it. Medusa,
the baseline and transformers' own `generate` then answer the same prompts, and must say the same.

# T tokens of a reply   H heads   C hidden
"""

import logging
import statistics
from typing import Any

import pyarrow as pa
import ray
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from medusa_ray import card, parts, provenance
from medusa_ray.chat import Chat
from medusa_ray.config import RunConfig, UserError
from medusa_ray.evaluate import sweep
from medusa_ray.evaluate.speed import by_batch, compare_speed
from medusa_ray.medusa import reference
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.heads import HeadStack, MedusaHeads
from medusa_ray.medusa.ranks import (
    NUM_RANKS,
    accepted_per_position,
    ranks_in,
    tokens_per_step,
    top_accuracy,
)
from medusa_ray.medusa.reference import own_attention
from medusa_ray.medusa.replies import Completion
from medusa_ray.medusa.tree import Tree
from medusa_ray.records import PROMPTS, REPLIES, check_columns

log = logging.getLogger("medusa_ray")

BATCH_SIZE = 16
NEAR_TIE = 1e-4  # Two best scores nearer than this may come out either way.


def run(config: RunConfig) -> str:
    """Measures the run's heads on its held-out prompts, in a Ray task on a machine like those that serve.

    Writes tree.json, accuracy.json and the model card into heads/, and evaluation/. Raises UserError when there is
    nothing to measure on.
    """
    folder = config.artifact("evaluation")
    plain = {"model": config.model.model_dump(), "evaluate": config.evaluate.model_dump()}
    inputs = {name: provenance.digest(config.artifact(name)) for name in ("prompts", "heads")}
    if not provenance.is_complete(folder, plain, inputs):
        device = config.model.device
        if device == "auto":
            device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
        task = ray.remote(num_cpus=1, num_gpus=int(device == "cuda"), max_retries=1)(measure)
        facts = ray.get(task.remote(config, device))
        provenance.write(folder, plain, inputs, **facts)
    card.write(config.artifact("heads"), config.card.model_dump())
    return folder


def measure(config: RunConfig, device: str) -> dict[str, Any]:
    """All the measuring, in one process. Returns the main figures."""
    if device == "cpu":
        torch.set_num_threads(1)  # the task has one CPU
    settings = config.evaluate
    prompts = _prompts(config, "test")
    if len(prompts) < 2:
        raise UserError(
            f"{config.artifact('prompts')}/test has {len(prompts)} usable prompts; the tree is shaped on some and "
            "scored on others, so at least 2 are needed. Give data.test more chats."
        )
    dtype = getattr(torch, config.model.dtype)
    model = config.served_model
    backbone = Backbone.load(model.base, dtype, device, model.revision, model.quantization)
    heads = MedusaHeads.load(config.artifact("heads"), dtype=dtype, device=device)
    if heads.shares_output:
        heads.init_from(backbone.output_weight_VC)
    heads = heads.eval().requires_grad_(False)
    baseline = _engine(config, backbone)

    def answer(prompts: list[dict[str, Any]], engine: Engine, capture: bool = False) -> list[Completion]:
        ids = [row["prompt_ids"] for row in prompts]
        return engine.generate(ids, settings.max_new_tokens, capture_hidden=capture)

    replies = answer(prompts, baseline, capture=True)
    stack = heads.stack()
    ranks = [ranks_of(stack, reply) for reply in replies]
    num_calibrating = max(1, round(settings.calibration_share * len(prompts)))
    shaping, scoring = ranks[:num_calibrating], ranks[num_calibrating:]
    tree = Tree.calibrated(torch.cat(shaping), settings.tree_nodes)
    chain = Tree.chain(heads.num_heads)
    acceptance = {
        "chain": tokens_per_step(scoring, chain),
        f"calibrated_{settings.tree_nodes}": tokens_per_step(scoring, tree),
    }
    per_position = {"chain": accepted_per_position(scoring, chain)}
    if strangers := _prompts(config, "out_of_domain"):
        away = [ranks_of(stack, reply) for reply in answer(strangers, baseline, capture=True)]
        acceptance["out_of_domain_chain"] = tokens_per_step(away, chain)
        per_position["out_of_domain_chain"] = accepted_per_position(away, chain)
    accuracy = {
        "heads": top_accuracy(torch.cat(scoring)),
        "acceptance": acceptance,
        "accepted_per_position": per_position,
        "prompts": {"scored": len(scoring), "out_of_domain": len(strangers)},
    }
    log.info("stage=evaluate %s", " ".join(f"{name}={value:.3f}" for name, value in acceptance.items()))

    medusa = _engine(config, backbone, heads, tree)
    compared = prompts[: settings.num_parity]
    parity = check_parity(
        [row["prompt_ids"] for row in compared],
        [reply.token_ids for reply in answer(compared, medusa)],
        [reply.token_ids for reply in replies[: len(compared)]],
        backbone.model,
        settings.max_new_tokens,
    )
    log.info("stage=evaluate parity=%d/%d", parity["token_exact"], parity["prompts"])
    timed = [row["prompt_ids"] for row in prompts[-settings.num_speed :]] if settings.num_speed else []
    adaptive = _engine(config, backbone, heads, tree, is_adaptive=True)  # as servers run it
    speed = None
    if timed:
        speed = compare_speed(baseline, adaptive, timed, settings.max_new_tokens)
        speed["by_batch"] = by_batch(
            baseline, adaptive, timed, settings.batch_sizes, settings.max_new_tokens
        )

    chat = Chat.load(model.base, model.revision)
    texts = [chat.text(reply.token_ids) for reply in replies]
    exact = [
        text.strip() == row["reference"].strip()
        for text, row in zip(texts, prompts, strict=True)
        if row["reference"]
    ]
    evaluation = {
        "prompts": len(prompts),
        "quality": {"exact_match": statistics.fmean(exact)} if exact else {},
        "parity": parity,
        "engine": speed,
        "hardware": provenance.hardware(),
        "model": {"dtype": config.model.dtype, "num_parameters": backbone.model.num_parameters()},
    }
    heads_folder, folder = config.artifact("heads"), config.artifact("evaluation")
    paths = {"paths": tree.paths, "nodes": len(tree.paths), "calibrated_on": num_calibrating}
    provenance.write_json(f"{heads_folder}/tree.json", paths)
    provenance.write_json(f"{heads_folder}/accuracy.json", accuracy)
    provenance.write_json(f"{folder}/evaluation.json", evaluation)
    columns = [[row["id"] for row in prompts], texts, [row["reference"] for row in prompts]]
    parts.write(folder, "replies", pa.table(columns, schema=REPLIES))
    if settings.sweep:
        rows = {"test": prompts[num_calibrating:], "out_of_domain": strangers}
        if "train" in settings.sweep.splits:
            rows["train"] = _prompts(config, "train")
        splits: dict[str, sweep.Split] = {}
        for split in settings.sweep.splits:
            chosen = rows[split][: settings.sweep.num_prompts]
            found = [ranks_of(stack, reply) for reply in answer(chosen, baseline, capture=True)]
            splits[split] = sweep.Split([row["prompt_ids"] for row in chosen], found)
        known = {"chain": chain, "calibrated": tree}
        trees = {
            name: known[name] if name in known else Tree.calibrated(torch.cat(shaping), int(name))
            for name in settings.sweep.trees
        }

        def engine_of(tree: Tree) -> Engine:
            return _engine(config, backbone, heads, tree)

        measured = sweep.measure(
            settings.sweep, trees, engine_of, splits, heads.layout, settings.max_new_tokens
        )
        sweep.write(measured, folder)
    return {"acceptance": acceptance, "parity": parity, "speedup": speed["speedup"] if speed else None}


# ---------------------------------------------------------------------------------------- heads and trees


@torch.inference_mode()
def ranks_of(heads: HeadStack, reply: Completion) -> Tensor:
    """[T - 1, H]: the rank that head h, asked where reply token t was produced, gave token t + 1 + h."""
    assert reply.hidden_TC is not None
    guess_THK = heads.topk(reply.hidden_TC[:-1], min(NUM_RANKS, heads.draft_vocab_size)).cpu()
    token_T = F.pad(torch.tensor(reply.token_ids), (0, heads.num_heads), value=-1)
    columns = []
    for head in range(heads.num_heads):
        coming_T = token_T[1 + head :][: len(guess_THK)]
        columns.append(ranks_in(guess_THK[:, head], coming_T, coming_T >= 0))
    return torch.stack(columns, dim=1)


# ------------------------------------------------------------------------------------------------- parity


def check_parity(
    prompts: list[list[int]],
    medusa: list[list[int]],
    baseline: list[list[int]],
    model: PreTrainedModel,
    max_new_tokens: int,
) -> dict[str, int]:
    """Counts the prompts that Medusa, the baseline and `generate` answer with the same tokens.

    A reply that parts from `generate` where its two best scores lie within NEAR_TIE of each other counts as equal up to
    there, and is reported as a near tie.
    """
    replies = reference.generate(model, prompts, max_new_tokens, BATCH_SIZE)
    exact = near_ties = 0
    for prompt, said, plain, expected in zip(prompts, medusa, baseline, replies, strict=True):
        if said == plain == expected:
            exact += 1
        elif all(other == expected or is_near_tie(model, prompt, other, expected) for other in (said, plain)):
            near_ties += 1
    return {"prompts": len(prompts), "token_exact": exact, "near_ties": near_ties}


@torch.inference_mode()
def is_near_tie(model: PreTrainedModel, prompt: list[int], said: list[int], expected: list[int]) -> bool:
    """Whether the reference's two best scores nearly meet where the two replies part."""
    same = next((i for i, (a, b) in enumerate(zip(said, expected, strict=False)) if a != b), None)
    if same is None:
        return False
    ids = torch.tensor([prompt + expected[:same]], device=model.device)
    with own_attention(model):
        best = model(ids).logits[0, -1].float().topk(2).values
    return bool(best[0] - best[1] < NEAR_TIE)


# -------------------------------------------------------------------------------------------------- inputs


def _prompts(config: RunConfig, split: str) -> list[dict[str, Any]]:
    """Good rows of one split, in the order of their ids."""
    folder = f"{config.artifact('prompts')}/{split}"
    rows = [
        row
        for name in parts.names(folder)
        for row in check_columns(parts.read(folder, name), PROMPTS, f"{folder}/{name}.parquet").to_pylist()
        if row["error"] is None
    ]
    return sorted(rows, key=lambda row: row["id"])


def _engine(
    config: RunConfig,
    backbone: Backbone,
    heads: MedusaHeads | None = None,
    tree: Tree | None = None,
    is_adaptive: bool = False,
) -> Engine:
    longest = config.data.max_prompt_tokens + config.evaluate.max_new_tokens
    engine = Engine(backbone, heads, tree, BATCH_SIZE, longest, is_adaptive, shares_prefixes=False)
    if config.evaluate.compile:
        engine.compile(config.served_model.base, config.model.dtype, config.served_model.revision)
    return engine
