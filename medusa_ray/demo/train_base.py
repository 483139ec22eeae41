"""Chats -> a small Llama base: an ordinary transformers folder. Ray Train runs it.

    python -m medusa_ray.demo.train_base --out DIR --size 8m

trains the base that ships with the package, on fresh generated chats in one pass. The demo calls `train_base`
with the user's own chats. Order and weights follow from the chats, the recipe and its seed, and the newest
checkpoint is taken up again: a killed training that is called a second time goes on.

# B rows  T tokens  V vocabulary
"""

import argparse
import itertools
import json
import logging
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from medusa_ray import provenance
from medusa_ray.config import UserError
from medusa_ray.demo import chats as generator

log = logging.getLogger("medusa_ray")

VOCAB_SIZE = 1024
MAX_TOKENS = 1024
PROMPT_WEIGHT = 0.3  # guessing the prompt too makes the circuits that copy names form early
IGNORED = -100
STATE = "state.pt"
CURVE = "training.jsonl"  # step, num_tokens and seconds so far; loss and prompt_loss since the last line
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>")  # in the order of their ids
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('a role is ' ~ message.role ~ '; expected system, user or assistant') }}{% endif %}"
    "<|{{ message.role }}|>{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """One size of base and how it is trained."""

    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    learning_rate: float
    batch_size: int  # rows of all workers together
    num_samples: int  # chats to see, each as often as it takes
    autocast: bool  # bf16 matrix products only pay above some 1.5 M parameters
    warmup_steps: int = 100
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    seed: int = 0


RECIPES = {
    "0.9m": Recipe(128, 3, 4, 352, learning_rate=2e-3, batch_size=8, num_samples=25_000, autocast=False),
    "8m": Recipe(384, 4, 6, 1024, learning_rate=1.2e-3, batch_size=16, num_samples=64_000, autocast=True),
}


def train_base(
    chats: list[dict[str, Any]], out: str, size: str = "0.9m", num_workers: int = 2, **changes: Any
) -> dict[str, Any]:
    """Trains a base on the chats by one of RECIPES, into the local folder `out`; returns its provenance.

    `changes` replace fields of the recipe. Ray has to be initialised. Nothing is done when `out` holds this
    base already. Raises UserError when no chat is short enough, RuntimeError when the workers fail for good.
    """
    recipe = Recipe(**{**asdict(RECIPES[size]), **changes})
    config = {"size": size, "num_workers": num_workers, **asdict(recipe)}
    inputs = {"chats": provenance.key(chats, {})}
    if provenance.is_complete(out, config, inputs):
        return provenance.read(out) or {}
    work = Path(out) / "training" / provenance.key(config, inputs)[:12]
    if not (work / "rows.npz").exists():
        work.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(chats)
        tokenizer.save_pretrained(work / "tokenizer")
        write_rows(chats, tokenizer, work / "rows.npz")
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"recipe": asdict(recipe), "work": str(work.resolve())},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name="run",  # the same name and place: Ray Train goes on from the newest checkpoint there
            storage_path=str(work.resolve()),
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    with shown(work / CURVE):
        result = trainer.fit()
    if result.checkpoint is None or result.metrics is None:
        raise RuntimeError(f"training of the base ended without a checkpoint: {result.error}")
    Path(out, provenance.FILE).unlink(missing_ok=True)  # that of an earlier config, whose base this replaces
    with result.checkpoint.as_directory() as folder:
        export(Path(folder), recipe, work / "tokenizer", Path(out))
    shutil.copy(work / CURVE, Path(out) / CURVE)
    facts = {name: value for name, value in result.metrics.items() if name != "curve"}
    provenance.write(out, config, inputs, num_chats=len(chats), **facts)
    shutil.rmtree(Path(out) / "training")
    return provenance.read(out) or {}


@contextmanager
def shown(curve: Path) -> Iterator[None]:
    """Logs the lines that the workers, which are other processes, add to the curve meanwhile."""
    done = threading.Event()

    def lines() -> list[str]:
        return curve.read_text(encoding="utf-8").splitlines() if curve.exists() else []

    def follow(num_shown: int) -> None:
        while not done.wait(2):
            for line in lines()[num_shown:]:
                num_shown += 1
                log.info(" ".join(f"{name}={value:.7g}" for name, value in json.loads(line).items()))

    thread = threading.Thread(target=follow, args=[len(lines())], daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# ------------------------------------------------------------------------------------------ tokens


def train_tokenizer(chats: list[dict[str, Any]], num_chats: int = 8000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the first chats: no text is unknown to it, and every digit is its own token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*SPECIAL, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (message["content"] for chat in chats[:num_chats] for message in chat["messages"])
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL[PAD_ID],
        bos_token=SPECIAL[BOS_ID],
        eos_token=SPECIAL[EOS_ID],
        extra_special_tokens=list(ROLES),
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_rows(chats: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Token ids of all chats end to end, whether each is the assistant's, and where each row begins.

    Chats too long for the model or with other roles are left out; the log says how many.
    """
    ids: list[np.ndarray] = []
    is_reply: list[np.ndarray] = []
    usable = [chat for chat in chats if all(f"<|{m['role']}|>" in ROLES for m in chat["messages"])]
    for chunk in (usable[i : i + 1000] for i in range(0, len(usable), 1000)):
        rendered: Any = tokenizer.apply_chat_template(
            [chat["messages"] for chat in chunk], return_dict=True, return_assistant_tokens_mask=True
        )
        for row, mask in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True):
            if len(row) <= MAX_TOKENS and any(mask):
                ids.append(np.array(row, dtype=np.int16))
                is_reply.append(np.array(mask, dtype=bool))
    if not ids:
        raise UserError(
            f"none of the {len(chats)} chats can train a base: it takes chats of at most {MAX_TOKENS} tokens "
            "with an assistant's message, and the roles system, user and assistant. Give such chats."
        )
    log.info("chats=%d chats_left_out=%d tokens=%d", len(chats), len(chats) - len(ids), sum(map(len, ids)))
    starts = np.cumsum([0, *map(len, ids)])
    part = path.with_suffix(".part.npz")  # a killed process leaves no half a file under the right name
    np.savez(part, ids=np.concatenate(ids), is_reply=np.concatenate(is_reply), starts=starts)
    part.rename(path)


def batches(lengths: np.ndarray, batch_size: int, num_samples: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers of each step's global batch, rows of like length together, epochs one after another.

    The order depends on nothing but the arguments, so a resumed run skips to where it was.
    """
    num_left = num_samples // batch_size
    for epoch in itertools.count():
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(lengths))
        for block in np.array_split(order, max(1, round(len(order) / (batch_size * 64)))):
            block = block[np.argsort(lengths[block], kind="stable")]
            groups = [block[i : i + batch_size] for i in range(0, len(block), batch_size)]
            for index in rng.permutation(len(groups)):
                if num_left == 0:
                    return
                num_left -= 1
                yield groups[index]


def collate(rows: Mapping[str, np.ndarray], batch: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Rows -> ids_BT padded on the right, the labels_BT of a causal model, and is_reply_BT of each label."""
    starts = rows["starts"]
    width = max(int(starts[row + 1] - starts[row]) for row in batch)
    ids_BT = torch.full((len(batch), width), PAD_ID)
    labels_BT = torch.full((len(batch), width), IGNORED)
    is_reply_BT = torch.zeros((len(batch), width), dtype=torch.bool)
    for place, row in enumerate(batch):
        span = slice(int(starts[row]), int(starts[row + 1]))
        tokens = torch.from_numpy(rows["ids"][span].astype(np.int64))
        ids_BT[place, : len(tokens)] = tokens
        labels_BT[place, : len(tokens) - 1] = tokens[1:]
        is_reply_BT[place, : len(tokens) - 1] = torch.from_numpy(rows["is_reply"][span][1:])
    return ids_BT, labels_BT, is_reply_BT


# ------------------------------------------------------------------------------------------ training


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.ffn_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.04,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # on short rows the fused kernel's backward pass is slow on CPUs
    return model


def learning_rate(step: int, num_steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * step / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, num_steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)


def build_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim != 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def losses(
    model: torch.nn.Module, ids_BT: Tensor, labels_BT: Tensor, is_reply_BT: Tensor, autocast: bool
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the assistant's tokens, and of all others.

    Padding comes last and attention looks back only, so no row needs a mask.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    logits_BVT = logits_BTV.float().transpose(1, 2)
    loss_BT = F.cross_entropy(logits_BVT, labels_BT, ignore_index=IGNORED, reduction="none")
    is_prompt_BT = (labels_BT != IGNORED) & ~is_reply_BT
    return loss_BT[is_reply_BT].mean(), loss_BT[is_prompt_BT].mean()


def train_worker(config: dict[str, Any]) -> None:
    """The loop of one worker: its share of each global batch, gradients averaged over the workers."""
    recipe, work = Recipe(**config["recipe"]), Path(config["work"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(1)
    rows = dict(np.load(work / "rows.npz"))
    lengths = np.diff(rows["starts"])
    module = build_model(recipe)
    model = ray.train.torch.prepare_model(module)
    optimizer = build_optimizer(module, recipe)
    progress = restore(module, optimizer)
    first_step, seconds_before, started = progress["step"], progress["seconds"], time.monotonic()
    num_steps = recipe.num_samples // recipe.batch_size
    save_steps = max(50, num_steps // 25)
    recent: list[tuple[float, float]] = []

    steps = enumerate(batches(lengths, recipe.batch_size, recipe.num_samples, recipe.seed), start=1)
    for step, batch in itertools.islice(steps, first_step, None):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, recipe)
        share = batch[rank::world_size] if len(batch) >= world_size else batch
        reply_loss, prompt_loss = losses(model, *collate(rows, share), recipe.autocast)
        (reply_loss + PROMPT_WEIGHT * prompt_loss).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        recent.append((reply_loss.item(), prompt_loss.item()))
        progress["num_tokens"] += int(lengths[batch].sum())
        if step % save_steps == 0 or step == num_steps:
            progress["seconds"] = round(seconds_before + time.monotonic() - started, 1)
            progress["step"] = step
            progress["loss"], progress["prompt_loss"] = np.mean(recent, axis=0).tolist()
            progress["curve"].append({name: value for name, value in progress.items() if name != "curve"})
            recent.clear()
            save(module, optimizer, progress, rank, work)


def restore(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Takes up the newest checkpoint, if there is one; returns how far the training is."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return {"step": 0, "num_tokens": 0, "seconds": 0.0, "curve": []}
    with checkpoint.as_directory() as folder:
        state = torch.load(f"{folder}/{STATE}", weights_only=True)
    module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["progress"]


def save(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any], rank: int, work: Path
) -> None:
    """All workers report; the first, since all hold the same, adds a checkpoint and writes the curve."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            state = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "progress": progress}
            torch.save(state, f"{folder}/{STATE}")
            checkpoint = Checkpoint.from_directory(folder)
            lines = [json.dumps(row) + "\n" for row in progress["curve"]]
            part = work / f"{CURVE}.part"
            part.write_text("".join(lines), encoding="utf-8")
            part.rename(work / CURVE)
        ray.train.report(dict(progress), checkpoint=checkpoint)


def export(checkpoint: Path, recipe: Recipe, tokenizer: Path, out: Path) -> None:
    """A checkpoint and its tokenizer -> an ordinary transformers folder, its weights in bf16."""
    model = build_model(recipe)
    model.load_state_dict(torch.load(checkpoint / STATE, weights_only=True)["model"])
    transformers_logging.disable_progress_bar()  # of a second's work, on the stderr that has our own
    model.bfloat16().save_pretrained(out)
    GenerationConfig(pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID).save_pretrained(out)
    PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a text-to-SQL base on fresh generated chats.")
    parser.add_argument("--out", required=True, help="folder that takes the base")
    parser.add_argument("--size", choices=sorted(RECIPES), default="8m")
    parser.add_argument("--samples", type=int, help="chats to train on; the recipe's number when not given")
    parser.add_argument("--workers", type=int, default=2, help="Ray Train workers of one thread each")
    parser.add_argument("--seed", type=int, default=1, help="seed of the chats")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    num_samples = args.samples or RECIPES[args.size].num_samples
    chats = generator.chats("train", num_samples, args.seed)
    ray.init(
        num_cpus=args.workers, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1"
    )
    record = train_base(chats, args.out, args.size, args.workers, num_samples=num_samples)
    log.info("loss=%.4f seconds=%.0f out=%s", record["loss"], record["seconds"], args.out)


if __name__ == "__main__":
    main()
