"""Medusa-2: the base and the heads trained together."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from medusa_ray import evaluate, hidden, parts, provenance, records, train
from medusa_ray.chat import Chat
from medusa_ray.config import RunConfig, UserError, parse
from medusa_ray.medusa import base as base_of
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.loss import IGNORED
from medusa_ray.medusa.states import has_plain_logits, logits_of
from medusa_ray.train import checkpoints, joint
from medusa_ray.train.joint import JointJob, JointTrainer, RowForm, Rows
from medusa_ray.train.journal import CURVE, read_curve
from medusa_ray.train.watch import judge
from medusa_ray.train.worker import Run

V, H = 262, 2


def write_run(
    folder: Path,
    base: Path,
    num_rows: int = 24,
    heads: dict[str, Any] | None = None,
    top_k: int = 0,
    **settings: Any,
) -> RunConfig:
    """distilled/, of tokens that count on, and fresh heads where warm ones belong."""
    draw = np.random.default_rng(0)
    rows = []
    for row in range(num_rows):
        num_prompt, num_reply = draw.integers(3, 9), draw.integers(5, 12)
        ids = [6 + (7 * row + 5 * place) % 250 for place in range(num_prompt + num_reply)]
        rows.append({
            "id": f"{row}/0/0", "prompt_ids": ids[:num_prompt], "reply_ids": ids[num_prompt:],
            "finish_reason": "stop", "error": None,
        })  # fmt: skip
    rows.append({"id": "x/0/0", "prompt_ids": [], "reply_ids": [], "finish_reason": None, "error": "broken"})
    for part in range(2):
        table = pa.Table.from_pylist(rows[part::2], records.DISTILLED)
        parts.write(str(folder / "distilled"), parts.part_name(part), table)
    provenance.write(str(folder / "distilled"), {}, {})
    raw = {
        "output": str(folder),
        "model": {"base": str(base), "device": "cpu", "dtype": "float32"},
        "data": {"train": "unused"},
        "hidden": {"top_k": top_k},
        "heads": {"num_heads": H, **(heads or {})},
        "train": {
            "num_workers": 1,
            "dtype": "float32",
            "held_out": 0,
            "logging_steps": 1,
            "epochs": 1,
            "batch_size": 64,
        },
        "joint": {
            "batch_size": 3,
            "warmup_steps": 2,
            "learning_rate": 0.005,
            "heads_learning_rate": 0.02,
            **settings,
        },
    }
    raw["train"] |= {
        key: raw["joint"].pop(key)
        for key in ("num_workers", "held_out", "save_steps", "labels")
        if key in raw["joint"]
    }
    config = parse(RunConfig, raw, "test")
    layout = config.heads.model_dump(exclude={"draft_vocab_size"})
    torch.manual_seed(0)  # low-rank terms begin at random
    warm = MedusaHeads(**layout, hidden_size=32, vocab_size=V)
    warm.init_from(base_of.output_weight(str(base)))
    warm.save(folder / "warm_heads", str(base))
    return config


def job_of(config: RunConfig) -> tuple[JointJob, list[Any]]:
    counts, held_out = joint.survey(config.artifact("distilled"), config)
    return JointJob.of_rows(config, counts, held_out, "cpu"), counts


def rows_of(config: RunConfig) -> Rows:
    folder = config.artifact("distilled")
    tables = [parts.read(folder, name) for name in parts.names(folder)]
    good = [row for table in tables for row in table.to_pylist() if row["error"] is None]
    return RowForm(H, "last").batch(pa.Table.from_pylist(good, records.DISTILLED))


def jolted(model: JointTrainer) -> JointTrainer:
    """With an adapter that changes something, as after training."""
    torch.manual_seed(1)
    for name, weight in model.base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


# ------------------------------------------------------------------------------------------------ rows


def test_rows_ask_the_base_for_the_next_token_and_each_head_for_a_later_one() -> None:
    row = {
        "id": "a",
        "prompt_ids": [10, 11],
        "reply_ids": [12, 13, 14],
        "finish_reason": "stop",
        "error": None,
    }
    table = pa.Table.from_pylist([row], records.DISTILLED)
    (last,), (every,) = (RowForm(2, loss_on).batch(table).rows for loss_on in ("last", "all"))
    assert list(last.position) == [1, 2, 3]
    assert last.labels_NW.tolist() == [[12, 13, 14], [13, 14, IGNORED], [14, IGNORED, IGNORED]]
    assert list(every.position) == [0, 1, 2, 3]
    assert every.labels_NW[0].tolist() == [11, 12, 13]


def test_rows_without_labels_and_held_out_chats_are_not_trained_on(tiny_base: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, tiny_base, held_out=0.3)
    job, counts = job_of(config)
    num_held = sum(len(row_R) for _, row_R in job.held_out)
    assert 2 <= num_held <= 14
    assert sum(count_R.sum() for count_R in counts) == job.num_positions == 24 - num_held


# ------------------------------------------------------------------------------------------------ module


@pytest.mark.parametrize("layout", ["own", "shared", "lowrank"])
def test_a_fresh_adapter_neither_diverges_nor_wants_to(layout: str, tiny_base: Path, tmp_path: Path) -> None:
    """The divergence's own gradient, that of the heads left out."""
    job, _ = job_of(config := write_run(tmp_path, tiny_base, heads={"layout": layout}))
    model = job.new_model(None)
    weight_W = torch.tensor([1.0, 0.0, 0.0])
    result = model(rows_of(config), weight_W, True)
    assert result.loss.item() == result.loss_sum_H[0].item() == 0
    assert result.loss_sum_H[1:].min() > 0
    result.loss.backward()
    gradients = [weight.grad.abs().max().item() for weight in model.base.parameters() if weight.requires_grad]
    assert max(gradients) < 1e-5  # rounding of softmax; measured 1e-6
    model.zero_grad()
    model(rows_of(config), torch.tensor([0.0, 1.0, 1.0]), False).loss.backward()
    assert any(
        weight.grad.abs().max() > 1e-3 for name, weight in model.base.named_parameters() if "lora_B" in name
    )
    assert not any(
        weight.grad is not None for name, weight in model.base.named_parameters() if "lora" not in name
    )


def test_without_the_adapter_the_base_is_itself_to_the_bit(tiny_base: Path, tmp_path: Path) -> None:
    job, _ = job_of(config := write_run(tmp_path, tiny_base))
    model = jolted(job.new_model(None))
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for row in rows_of(config).rows[:4]:
        ids, first = torch.tensor([row.input_ids]), row.position.start
        expected = plain(ids, output_hidden_states=True)
        with torch.no_grad(), model._without_adapter():
            own_NC = model.states(Rows([row]))
            changed = plain.lm_head(own_NC)
        assert torch.equal(own_NC, expected.hidden_states[-1][0, first:-1])
        assert torch.equal(changed, expected.logits[0, first:-1])
        assert not torch.allclose(model.states(Rows([row])), own_NC, atol=0.1)


def loss_of(head_V: torch.Tensor, label: int, own_V: torch.Tensor, labels: str) -> torch.Tensor:
    """Of what a head says of a label, where the base itself says own_V: KL(base || head), the base's four likeliest
    tokens one by one and all others as one."""
    if labels == "hard":
        return -head_V[label].log()
    named = own_V.argsort()[-4:].tolist()
    others = [token for token in range(V) if token not in named]
    base, head = ([*(p_V[token] for token in named), p_V[others].sum()] for p_V in (own_V, head_V))
    return sum(p * (p / q).log() for p, q in zip(base, head, strict=True))


@pytest.mark.parametrize(
    ("labels", "is_packable"), [("hard", True), ("hard", False), ("soft", True), ("soft", False)]
)
def test_the_loss_is_that_of_plain_passes_one_row_at_a_time(
    labels: str, is_packable: bool, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing, positions and labels are all in it. The oracle knows none of them."""
    job, _ = job_of(config := write_run(tmp_path, tiny_base, labels=labels, top_k=4))
    model = jolted(job.new_model(None)).eval()
    model.is_packable = is_packable
    rows = rows_of(config)
    weight_W = torch.tensor([1.0, 0.3, 0.2])
    found = model(rows, weight_W, True)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    sums_W, top1 = torch.zeros(3), 0
    for row in rows.rows:
        ids, first = torch.tensor([row.input_ids]), row.position.start
        with torch.no_grad():
            own = plain(ids).logits[0, first:-1].softmax(-1)
            adapted = model.base(ids, output_hidden_states=True)
            mine = adapted.logits[0, first:-1].softmax(-1)
            sums_W[0] += (own * (own / mine).log()).sum()
            top1 += int((mine.argmax(-1) == ids[0, first + 1 :]).sum())
            logits_NHV = model.heads(adapted.hidden_states[-1][0])
            for head in range(H):
                for t in range(first, len(row.input_ids) - 2 - head):
                    asked = t + 2 + head
                    said_V, own_V = logits_NHV[t, head].softmax(-1), own[asked - 1 - first]
                    sums_W[1 + head] += loss_of(said_V, row.input_ids[asked], own_V, labels)
    assert torch.allclose(found.loss_sum_H, sums_W, rtol=1e-4)
    assert found.loss.item() == pytest.approx((sums_W @ weight_W).item(), rel=1e-4)
    assert found.top1_H[0] == top1
    assert model.num_losses(rows).tolist() == found.num_labels_H.tolist()
    monkeypatch.setattr(joint.dist, "all_reduce", lambda *_: None)
    held_out = [judge(model.heads, batch)[0] for batch, _ in model.seen([rows])]
    assert torch.allclose(sum(held_out)[0], sums_W[1:], rtol=1e-4)


def test_full_logits_never_exist(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = job_of(config := write_run(tmp_path, tiny_base))
    model = jolted(job.new_model(None)).eval()
    whole = model(rows_of(config), torch.ones(3), True)
    sizes = []
    logits = model._logits
    model._logits = lambda states_NC: sizes.append(len(states_NC)) or logits(states_NC)
    monkeypatch.setattr(joint, "LOGITS_AT_ONCE", 5 * V)
    pieces = model(rows_of(config), torch.ones(3), True)
    assert max(sizes) == 5
    assert torch.allclose(whole.loss_sum_H, pieces.loss_sum_H, rtol=1e-5)


def write_deep_base(folder: Path) -> Path:
    """Eight layers that are large beside what else there is."""
    shape = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=8)).save_pretrained(folder)
    return folder


def test_layers_computed_again_give_the_same_gradients_and_leave_little_behind(tmp_path: Path) -> None:
    """With dropout, which has to be repeated. The profiler knows what of the forward pass is still allocated."""
    base = write_deep_base(tmp_path / "base")
    gradients, num_bytes = [], []
    for is_on in (True, False):
        (folder := tmp_path / str(is_on)).mkdir()
        config = write_run(folder, base, num_rows=60, dropout=0.1, gradient_checkpointing=is_on)
        model, rows = jolted(job_of(config)[0].new_model(None)), rows_of(config)
        torch.manual_seed(2)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            result = model(rows, torch.ones(1 + H), False)
        num_bytes.append(sum(event.self_cpu_memory_usage for event in profile.events()))
        result.loss.backward()
        gradients.append(
            {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        )
    assert all((gradients[0][name] - own).abs().max() <= 1e-6 for name, own in gradients[1].items())
    assert num_bytes[0] < num_bytes[1] / 5  # measured: an eighth, for eight layers


# ------------------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("targets", "message"), [(["q_prj"], "q_prj"), (["q_proj", "lm_head"], "the output layer is among them")]
)
def test_targets_that_cannot_be_adapted_are_refused_before_training(
    targets: list[str], message: str, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"joint.targets is .*{message}"):
        train.run(write_run(tmp_path, tiny_base, targets=targets))


def test_a_base_whose_layers_cannot_be_computed_again_is_refused_before_training(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.modeling_layers.GradientCheckpointingLayer", type("Unknown", (), {}))
    with pytest.raises(UserError, match=r"joint.gradient_checkpointing is on.*Set it to false"):
        train.run(write_run(tmp_path, tiny_base))


GEMMA = {"head_dim": 8, "pad_token_id": 0}
KINDS = {
    "gemma2": ("gemma2", GEMMA | {"final_logit_softcapping": 3.0}),
    "gemma2, uncapped": ("gemma2", GEMMA | {"final_logit_softcapping": None}),
    "granite": ("granite", {"logits_scaling": 3.0}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "phi, whose output layer has a bias": ("phi", {}),
    "qwen3_moe, whose body says more": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gpt2, whose body says more": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 1}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_done_to_logits_is_found_without_weights_and_refused_where_weights_are_sharded(
    kind: str, tmp_path: Path, tiny_base: Path
) -> None:
    """In the folder of the base is a config, and nothing else."""
    model_type, more = KINDS[kind]
    shape = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 4, "num_hidden_layers": 1}
    config = AutoConfig.for_model(model_type, **shape | more)
    config.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_config(config).eval()
    output = model.get_output_embeddings()
    states_NC = 10 * torch.randn(4, 32)
    with torch.no_grad():
        if output.bias is not None:
            output.bias.fill_(1.0)
        is_plain = torch.allclose(logits_of(model, states_NC), states_NC @ output.weight.T, atol=1e-4)
    assert is_plain == (kind.split(",")[0] in ("qwen3_moe", "gpt2") or "uncapped" in kind)
    assert has_plain_logits(model) == is_plain
    for stage in (2, 3):
        run = write_run(tmp_path, tiny_base, zero_stage=stage, dropout=0)  # without which peft adapts experts
        run = run.model_copy(update={"model": run.model.model_copy(update={"base": str(tmp_path / "base")})})
        if stage == 3 and not is_plain:
            with pytest.raises(UserError, match=r"joint.zero_stage is 3, but .* Set joint.zero_stage to 2"):
                train.run(run)
        else:
            joint.check(run)


def test_a_base_that_is_an_adapter_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tiny_base)})
    )
    with pytest.raises(UserError, match="an adapter, and joint training would put another one on top"):
        train.run(
            write_run(tmp_path, tiny_base).model_copy(
                update={
                    "model": parse(
                        RunConfig,
                        {"output": "x", "model": {"base": str(tmp_path / "adapter")}, "data": {"train": "x"}},
                        "",
                    ).model
                }
            )
        )


# ------------------------------------------------------------------------------------------------ runs


def all_runs(rank: int, meeting: Path, runs: list[tuple[RunConfig, int]]) -> None:
    """What Ray Train starts, without Ray: each run for so many epochs, of those that its config says."""
    num_workers = runs[0][0].train.num_workers
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_workers)}
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=num_workers)
    for config, epochs in runs:
        job, counts = job_of(config)
        run = Run(job, rank, None, counts)
        last = run._num_steps() * epochs // config.joint.epochs
        take = run._step

        def step(batches: Any, is_logged: bool, run: Run = run, take: Any = take, last: int = last) -> Any:
            outcome = take(batches, is_logged)
            return outcome._replace(must_stop=run.state.step + 1 == last)

        run._step = step
        run.take_steps()
        if run.journal:
            run.journal.write()
        run.write_heads()


def spawn(tmp_path: Path, runs: list[tuple[RunConfig, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    start(all_runs, tmp_path, runs, runs[0][0].train.num_workers, monkeypatch)


def start(rank_main: Any, tmp_path: Path, work: Any, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHDYNAMO_DISABLE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    torch.multiprocessing.spawn(rank_main, (tmp_path / "meeting", work), nprocs=num_ranks)


def tensors_of(config: RunConfig) -> dict[str, torch.Tensor]:
    return checkpoints.newest(config.artifact("joint_training")).tensors


@pytest.mark.timeout(600)
def test_a_resumed_run_is_the_same_run_and_keeps_nothing_of_the_base(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, with dropout; the stages of ZeRO agree but for rounding."""
    runs, folders = [], []
    for stage in range(4):
        for kind in ("whole", "resumed"):
            (folder := tmp_path / f"{kind}{stage}").mkdir()
            folders.append(
                write_run(
                    folder,
                    tiny_base,
                    num_workers=2,
                    batch_size=2,
                    zero_stage=stage,
                    dropout=0.1,
                    held_out=0.2,
                )
            )
        runs += [(folders[-2], 2), (folders[-1], 1), (folders[-1], 2)]
    spawn(tmp_path, runs, monkeypatch)
    final = [tensors_of(config) for config in folders]
    for whole, resumed in zip(final[::2], final[1::2], strict=True):
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert all("lora" in name or "/heads." in name for name in whole)
    for other in final[2::2]:
        assert all(torch.allclose(final[0][name], other[name], atol=1e-4) for name in other)
    curve = read_curve(f"{folders[0].artifact('heads')}/{CURVE}")
    assert len(curve) == curve[-1]["of"]
    assert curve[-1]["held_out"]["base_kl"] > 0
    assert curve[0]["base_kl"] == 0

    # What is written is what was trained, for whoever loads a base.
    for config in folders[::2]:
        check_adapter(config)


def sharded_model(rank: int, meeting: Path, config: RunConfig) -> None:
    """Counts numbers of the base that this rank has, whenever it makes room for some or reads some."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    plain = AutoModelForCausalLM.from_pretrained(config.model.base, dtype=torch.float32)
    whole, largest = plain.num_parameters(), max(weight.numel() for weight in plain.parameters())
    load, read = base_of.load, torch.nn.Module._load_from_state_dict
    weights: list[Any] = []
    counts = []

    def count(*_: Any) -> None:
        nothing = torch.empty(0)
        counts.append(sum(own.numel() + getattr(own, "ds_tensor", nothing).numel() for own in weights))

    def made(_: Any, name: str, weight: torch.nn.Parameter) -> None:
        weights.append(weight)
        count()

    def counted(*arguments: Any) -> Any:
        handle = register_module_parameter_registration_hook(made)
        torch.nn.Module._load_from_state_dict = lambda *arguments: count() or read(*arguments)
        loaded = load(*arguments)
        torch.nn.Module._load_from_state_dict = read
        handle.remove()
        return loaded

    base_of.load = counted
    model = job_of(config)[0].new_model(None)
    count()
    assert len(counts) > len(weights) > 0
    assert whole / 2 <= counts[-1] < 0.51 * whole
    assert max(counts) <= 0.51 * whole + 2 * largest
    assert torch.equal(model.output_VC, plain.get_output_embeddings().weight)


@pytest.mark.timeout(600)
def test_no_rank_ever_holds_a_whole_base_that_is_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-3 would take it apart later too, where it would no longer help."""
    config = write_run(tmp_path, write_deep_base(tmp_path / "base"), zero_stage=3, num_workers=2)
    start(sharded_model, tmp_path, config, 2, monkeypatch)


def check_adapter(config: RunConfig) -> None:
    job, _ = job_of(config)
    model = job.new_model(None).eval()
    weights = {
        name.removeprefix("weight/"): value
        for name, value in tensors_of(config).items()
        if name.startswith("weight/")
    }
    model.load_state_dict(weights, strict=False)
    served = config.served_model
    assert served.base == config.artifact("adapter")
    merged = base_of.load(served.base, torch.float32, "cpu")
    rows = rows_of(config)
    states_NC = model.states(rows)
    expected = [
        merged(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states[-1][
            0, row.position.start : -1
        ]
        for row in rows.rows
    ]
    assert torch.allclose(states_NC, torch.cat(expected), atol=1e-5)
    assert Chat.load(served.base).tokenizer.get_vocab() == Chat.load(config.model.base).tokenizer.get_vocab()
    heads = MedusaHeads.load(config.artifact("heads"))
    assert all(
        torch.equal(heads.state_dict()[name.removeprefix("heads.")], value)
        for name, value in weights.items()
        if name.startswith("heads.")
    )


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_run_warms_the_heads_trains_both_and_is_judged_by_the_adapted_base(
    ray_cluster: None, tiny_base: Path, tmp_path: Path
) -> None:
    """Rows are learnt: the loss falls, and the base stays near itself."""
    config = write_run(tmp_path, tiny_base, num_rows=60, epochs=4, held_out=0.2)
    config = config.model_copy(update={"hidden": config.hidden.model_copy(update={"mode": "compute"})})
    hidden.run(config)
    train.run(config)
    curve = read_curve(f"{config.artifact('heads')}/{CURVE}")
    assert curve[0]["base_kl"] == 0
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
    assert 0 < curve[-1]["held_out"]["base_kl"] < 0.5
    assert read_curve(f"{config.artifact('warm_heads')}/{CURVE}")
    written = {name: provenance.read(config.artifact(name)) for name in ("warm_heads", "adapter", "heads")}
    train.run(config)
    assert written == {name: provenance.read(config.artifact(name)) for name in written}

    ids = [[1, *range(6 + row, 30 + row)] for row in range(6)]
    prompts = [
        {
            "id": f"{row}/0",
            "messages": None,
            "prompt_ids": own,
            "reference": "x",
            "reference_ids": [],
            "error": None,
        }
        for row, own in enumerate(ids)
    ]
    table = pa.Table.from_pylist(prompts, records.PROMPTS)
    parts.write(f"{config.artifact('prompts')}/test", parts.part_name(0), table)
    settings = {"num_speed": 0, "compile": False, "num_parity": 6, "max_new_tokens": 12}
    evaluate.run(config.model_copy(update={"evaluate": config.evaluate.model_copy(update=settings)}))
    found = pq.read_table(f"{config.artifact('evaluation')}/replies.parquet")["reply"].to_pylist()
    merged = base_of.load(config.artifact("adapter"), torch.float32, "cpu")
    said = [
        merged.generate(torch.tensor([own]), max_new_tokens=12, do_sample=False)[0, len(own) :] for own in ids
    ]
    assert found == [Chat.load(str(tiny_base)).text(reply.tolist()) for reply in said]
