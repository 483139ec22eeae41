import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from medusa_ray.config import SweepConfig, UserError, parse
from medusa_ray.evaluate import (
    accepted_per_position,
    by_batch,
    check_parity,
    compare_speed,
    is_near_tie,
    ranks_of,
    sweep,
    tokens_per_step,
    top_accuracy,
)
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.engine import Engine
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.replies import Completion
from medusa_ray.medusa.tree import Tree
from medusa_ray.records import SWEEP


def reply_of(tokens: list[int]) -> Completion:
    """A reply whose hidden states are just the numbers of their positions."""
    return Completion(tokens, "stop", 0, [], torch.arange(len(tokens))[:, None].float())


def heads_that_guess(table: list[list[list[int]]]) -> SimpleNamespace:
    """Heads that answer state number t with table[t][head], best first."""
    return SimpleNamespace(
        num_heads=len(table[0]),
        draft_vocab_size=100,
        topk=lambda hidden_TC, k: torch.tensor(table)[hidden_TC[:, 0].long(), :, :k],
    )


def test_ranks_say_where_each_head_had_the_token_that_came():
    # Reply 5 6 7. At state 0 the heads guess tokens 1 and 2 of the reply, at state 1 token 2 and nothing.
    heads = heads_that_guess([[[6, 9], [8, 7]], [[1, 2], [3, 4]], [[0, 0], [0, 0]]])
    rank_TH = ranks_of(heads, reply_of([5, 6, 7]))
    assert rank_TH.tolist() == [[0, 1], [-1, -2]]
    assert top_accuracy(rank_TH) == {"top1": [0.5, 0.0], "top5": [0.5, 1.0]}


def test_tokens_per_step_counts_what_the_tree_would_have_accepted():
    # Seven tokens after the prefill's. A chain takes 3 + 1 of them at root 0, then 0 + 1 at 4, 1 + 1 at 5: 3 steps.
    rank_TH = torch.tensor(
        [[0, 0, 0], [9, 9, 9], [9, 9, 9], [9, 9, 9], [1, 0, -2], [0, -2, -2], [-2, -2, -2]]
    )
    assert tokens_per_step([rank_TH], Tree.chain(3)) == pytest.approx(7 / 3)
    # With rank 1 and what follows it in the tree, the second step takes the rest.
    tree = Tree.from_paths([*Tree.chain(3).paths, (1,), (1, 0)])
    assert tokens_per_step([rank_TH], tree) == pytest.approx(7 / 2)
    assert tokens_per_step([rank_TH, rank_TH], Tree()) == 1.0
    assert tokens_per_step([], Tree()) == 0.0
    # Of the chain's three steps two accept its first guess, one the others; of the tree's two, both and then one.
    assert accepted_per_position([rank_TH], Tree.chain(3)) == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert accepted_per_position([rank_TH], tree) == pytest.approx([1, 1, 1 / 2])
    assert accepted_per_position([], Tree.chain(2)) == [0.0, 0.0]


def test_simulated_and_served_acceleration_agree(tiny_base):
    """Trees are chosen by simulation, so a simulation that flatters would choose the wrong one."""
    torch.manual_seed(0)
    backbone = Backbone.load(str(tiny_base), torch.float32, "cpu")
    weight_HVC = torch.stack([torch.roll(backbone.output_weight_VC, k, 0) for k in range(2)])

    def topk(hidden_BC, k):
        return torch.einsum("bc,hvc->bhv", hidden_BC, weight_HVC).topk(k, -1).indices

    sizes = {"num_heads": 2, "hidden_size": 32, "vocab_size": 262, "draft_vocab_size": 262}
    heads = SimpleNamespace(**sizes, topk=topk, stack=lambda: heads)
    prompts = [[1, *torch.randint(6, 262, (9,)).tolist()] for _ in range(6)]
    replies = Engine(backbone, max_total_tokens=128).generate(prompts, 60, capture_hidden=True)
    ranks = [ranks_of(heads, reply) for reply in replies]
    tree = Tree.calibrated(torch.cat(ranks), 6)
    served = Engine(backbone, heads, tree, max_total_tokens=128).generate(prompts, 60)
    steps, tokens = sum(d.num_steps for d in served), sum(len(d.token_ids) - 1 for d in served)
    assert tokens_per_step(ranks, tree) == pytest.approx(tokens / steps, abs=1e-6)
    accepted = [sum(sum(d.accepted_histogram[k:]) for d in served) / steps for k in range(1, tree.depth + 1)]
    assert accepted_per_position(ranks, tree) == pytest.approx(accepted)
    assert tokens / steps > 1.0


def test_parity_counts_a_wrong_token_and_forgives_only_near_ties(tiny_base):
    model = Backbone.load(str(tiny_base), torch.float32, "cpu").model
    prompts = [[1, 50, 60, 70], [1, 80], [1, 90, 91]]
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    right = [
        plain.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False)[0, len(p) :].tolist()
        for p in prompts
    ]
    assert check_parity(prompts, right, right, model, 12) == {"prompts": 3, "token_exact": 3, "near_ties": 0}
    wrong = [right[0], [*right[1][:5], (right[1][5] + 1) % 262, *right[1][6:]], right[2]]
    assert check_parity(prompts, wrong, right, model, 12) == {"prompts": 3, "token_exact": 2, "near_ties": 0}
    assert not is_near_tie(model, prompts[1], wrong[1], right[1])
    # Two rows of the output layer that are alike make every choice between their tokens a tie.
    first, other = right[1][5], wrong[1][5]
    with torch.no_grad():
        model.lm_head.weight[other] = model.lm_head.weight[first]
    assert is_near_tie(model, prompts[1], wrong[1], right[1])


def test_speed_is_measured_on_all_arms_and_the_engine_keeps_its_attention(tiny_base):
    backbone = Backbone.load(str(tiny_base), torch.float32, "cpu")
    baseline = Engine(backbone, max_total_tokens=128)
    speed = compare_speed(baseline, baseline, [[1, 50, 60], [1, 70]], 8)
    assert speed["prompts"] == 2
    assert {"baseline", "medusa", "transformers"} <= speed.keys()
    assert all(speed[arm]["tokens_per_s"] > 0 for arm in ("baseline", "medusa", "transformers"))
    assert len(baseline.generate([[1, 5]], 4)[0].token_ids) == 4


def test_predicted_speedup_is_tokens_per_step_over_what_a_step_costs(tiny_base):
    """Steps that sleep cost what they sleep, and a machine that is busy with other things adds to both."""
    backbone = Backbone.load(str(tiny_base), torch.float32, "cpu")
    prompts = [[1, 50 + i, 60] for i in range(5)]

    def slow(seconds):
        engine = Engine(backbone, max_total_tokens=128)
        step = engine._move_on
        engine._move_on = lambda: (time.sleep(seconds) if engine.num_running else None, step())[1]
        return engine

    found = by_batch(slow(0.04), slow(0.12), prompts, [1, 2, 8], 6)
    assert list(found) == ["1", "2"]  # there are no eight prompts
    for figures in found.values():
        assert figures["acceleration"] == 1.0
        assert 1.3 < figures["step_cost_ratio"] < 3.2
        assert figures["predicted"] == 1 / figures["step_cost_ratio"]
        # The prefills that are taken out were measured apart, which a busy machine tells.
        assert figures["measured"] == pytest.approx(figures["predicted"], rel=0.3)
        assert figures["baseline"] * figures["measured"] == pytest.approx(figures["medusa"])


def test_a_sweep_has_a_row_for_every_combination_and_a_plot(tiny_base, tmp_path):
    torch.manual_seed(0)
    backbone = Backbone.load(str(tiny_base), torch.float32, "cpu")
    heads = MedusaHeads(num_heads=2, num_layers=1, hidden_size=32, vocab_size=262).eval().requires_grad_(False)
    heads.init_from(backbone.output_weight_VC)
    prompts = [[1, 50 + i, 60] for i in range(6)]
    replies = Engine(backbone, max_total_tokens=128).generate(prompts, 12, capture_hidden=True)
    ranks = [ranks_of(heads.stack(), reply) for reply in replies]
    trees = {"chain": Tree.chain(2), "6": Tree.calibrated(torch.cat(ranks), 6)}
    config = SweepConfig(
        trees=list(trees), temperatures=[0, 1.5], acceptance=["exact", "typical=0.5/0.5", "typical=0.0/0.0"]
    )
    splits = {"test": sweep.Split(prompts, ranks), "out_of_domain": sweep.Split([], [])}
    rows = sweep.measure(
        config, trees, lambda tree: Engine(backbone, heads, tree, max_total_tokens=128), splits, "own", 12
    )
    sweep.write(rows, str(tmp_path))
    table = pq.read_table(tmp_path / "sweep.parquet")
    assert table.schema.equals(SWEEP)
    found = {(row["tree"], row["temperature"], row["acceptance"]): row for row in table.to_pylist()}
    assert len(found) == len(rows) == 2 * (1 + 3)  # greedy is always exact
    greedy = found["6", 0.0, "exact"]
    assert greedy["tokens_per_step"] == pytest.approx(tokens_per_step(ranks, trees["6"]))
    assert greedy["low"] <= greedy["tokens_per_step"] <= greedy["high"]
    assert (greedy["nodes"], greedy["seconds"], greedy["prompts"]) == (6, None, 6)
    # A threshold of nothing takes every guess of the chain.
    lax, strict = (found["chain", 1.5, f"typical={value}"]["tokens_per_step"] for value in ("0.0/0.0", "0.5/0.5"))
    assert lax > 2.5 > strict
    assert found["chain", 1.5, "exact"]["seconds"] > 0
    assert Path(tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert "</svg>" in (tmp_path / "sweep.svg").read_text()


def test_an_interval_of_tokens_per_step_is_a_bootstrap_over_prompts():
    assert sweep.interval([(10, 5)] * 4) == (2.0, None, None)
    assert sweep.interval([(10, 5)] * 20) == (2.0, 2.0, 2.0)
    point, low, high = sweep.interval([(10, 5), (30, 5)] * 50)
    assert point == 4.0
    assert 3.5 < low < 3.8 < 4.2 < high < 4.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trees": ["0"]}, "trees has '0'"),
        ({"acceptance": ["typical=0.1"]}, "acceptance has 'typical=0.1'"),
        ({"acceptance": ["typical"]}, "Add a temperature above 0"),
    ],
)
def test_a_sweep_that_cannot_be_measured_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        parse(SweepConfig, changes, "run.yaml")
