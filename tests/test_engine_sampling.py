"""Settings of requests through the whole engine: with any tree a reply is what the base alone would have said."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_heads import OracleHeads
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.engine import Engine, Request
from medusa_ray.medusa.replies import Delta
from medusa_ray.medusa.scheduler import Sequence
from medusa_ray.medusa.sizing import TreeSizer
from medusa_ray.medusa.tree import Tree

V = 262
TREES = {
    "chain": Tree.chain(3),
    "tree": Tree.from_paths([(0,), (1,), (0, 0), (2,), (0, 1), (1, 0), (0, 0, 0), (1, 0, 1)]),
}


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


@pytest.fixture
def engine_of(tiny_base: Path):
    def build(tree: Tree | None = None, **options) -> Engine:
        backbone = Backbone.load(str(tiny_base), torch.float32, "cpu")
        heads = OracleHeads(backbone.hidden_size, V) if tree else None
        engine = Engine(backbone, heads, tree, **{"max_total_tokens": 128, "max_batch_size": 12, **options})
        if heads:
            heads.engine = engine
        return engine

    return build


def prompts_of(num: int, seed: int = 0) -> list[list[int]]:
    """Distinct ones: the heads know each reply by its prompt."""
    rng = random.Random(seed)
    return [[1, *(rng.randrange(6, V) for _ in range(rng.randint(3, 40)))] for _ in range(num)]


def run(engine: Engine, requests: list[Request], known: list[list[int]] | None = None) -> list[Sequence]:
    """All requests in one continuous batch. known: the replies that the heads may guess."""
    if engine.heads is not None:
        engine.heads.replies = {tuple(r.prompt_ids): k for r, k in zip(requests, known, strict=True)}
    sequences = [engine.add(request) for request in requests]
    while not all(sequence.finish_reason for sequence in sequences):
        engine.step()
    assert engine.cache.num_free_pages == len(engine.cache.keys[0]) // 64 - 1, "pages were not given back"
    return sequences


def accepted_per_step(sequences: list[Sequence]) -> float:
    return sum(len(s.token_ids) for s in sequences) / sum(s.num_steps for s in sequences)


class Residues:
    """A grammar: after a token with the remainder r of 3 comes one with another remainder."""

    def __call__(self, token_ids: list[int]) -> Tensor:
        allowed_V = torch.ones(V, dtype=torch.bool)
        if token_ids:
            allowed_V[token_ids[-1] % 3 :: 3] = False
        return allowed_V


def mixed_requests(temperature: float, num: int) -> list[Request]:
    """Most use one or two settings; some are plain, and some greedy."""
    rng = random.Random(int(temperature * 10))
    requests = []
    for i, prompt in enumerate(prompts_of(num, seed=int(temperature * 10))):
        choices = {
            "top_p": rng.uniform(0.5, 0.98),
            "min_p": rng.uniform(0.01, 0.3),
            "top_k": rng.randint(2, 60),
            "repetition_penalty": rng.uniform(1.05, 2),
            "presence_penalty": rng.uniform(-2, 2),
            "frequency_penalty": rng.uniform(-2, 2),
            "logit_bias": {rng.randrange(V): rng.uniform(-10, 3) for _ in range(20)},
            "allowed_tokens": Residues(),
        }
        names = rng.sample(sorted(choices), rng.choice([0, 1, 2, 4]))
        fields = {name: choices[name] for name in names}
        requests.append(Request(prompt, 12, temperature=0 if i % 9 == 8 else temperature, seed=i, **fields))
    return requests


@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.2])
def test_seeded_replies_of_mixed_batches_are_the_baselines(engine_of, temperature):
    """A penalty that sees a sibling's tokens, or the root's history only, changes a reply in a hundred."""
    requests = mixed_requests(temperature, 168)
    alone = [s.token_ids for s in run(engine_of(max_batch_size=5), requests)]
    sequences = run(engine_of(TREES["tree"]), requests, alone)
    assert [s.token_ids for s in sequences] == alone
    assert accepted_per_step(sequences) > 1.3, "the guesses were not accepted, so acceptance was not tested"


@pytest.mark.parametrize("lags", [False, True])
def test_the_tree_may_change_at_each_step_and_prompts_come_in_pieces(engine_of, monkeypatch, lags):
    """A history that is counted by the tree of another step gives other replies, but only sometimes. With three rows
    some batches are read one behind, and then somebody joins whose grammar or penalties need all that was said."""
    requests = mixed_requests(0.8, 60)
    alone = [s.token_ids for s in run(engine_of(), requests)]
    monkeypatch.setattr("medusa_ray.medusa.engine.PREFILL_TOKENS", 16)
    engine, rng = engine_of(TREES["tree"], is_adaptive=True, max_batch_size=3, lags=lags), random.Random(0)
    monkeypatch.setattr(engine, "_pick_tree", lambda: rng.choice(list(engine.trees.values())))
    sequences = run(engine, requests, alone)
    assert [s.token_ids for s in sequences] == alone
    assert accepted_per_step(sequences) > 1.2


@pytest.mark.parametrize("tree", [None, *TREES])
def test_greedy_replies_with_a_repetition_penalty_equal_those_of_generate(engine_of, model, tree):
    prompts = prompts_of(10)
    plain = [
        model.generate(torch.tensor([p]), max_new_tokens=40, do_sample=False, repetition_penalty=1.3)
        for p in prompts
    ]
    plain = [reply[0, len(p) :].tolist() for p, reply in zip(prompts, plain, strict=True)]
    without = engine_of().generate(prompts, 40)
    assert sum(w.token_ids != p for w, p in zip(without, plain, strict=True)) > 5, (
        "the penalty changed nothing"
    )
    requests = [Request(p, 40, repetition_penalty=1.3) for p in prompts]
    sequences = run(engine_of(TREES.get(tree)), requests, plain)
    assert [s.token_ids for s in sequences] == plain
    if tree:
        assert accepted_per_step(sequences) > 1.3


# ------------------------------------------------------------------------------------ without speculation


@pytest.mark.parametrize("is_adaptive", [False, True])
def test_requests_without_speculation_say_the_same_in_steps_of_one_token(engine_of, monkeypatch, is_adaptive):
    """A guess taken for one of them shows in no reply, only in its steps, and in what is believed of the heads."""
    requests = mixed_requests(0.8, 60)
    alone = [s.token_ids for s in run(engine_of(), requests)]
    # Asked for typical acceptance, which changes replies, it says without guesses what the baseline says.
    asked = [
        replace(r, speculates=bool(i % 3), acceptance="exact" if i % 3 else "typical")
        for i, r in enumerate(requests)
    ]
    engine, learnt = engine_of(TREES["tree"], max_batch_size=5, is_adaptive=is_adaptive), []
    if is_adaptive:
        engine.sizer = TreeSizer(engine.tree, {1: dict.fromkeys(engine.trees, 1.0)})
        learn = engine.sizer.learn
        monkeypatch.setattr(
            engine.sizer, "learn", lambda size, ends: (learnt.extend(ends), learn(size, ends))
        )
    sequences = run(engine, asked, alone)
    assert [s.token_ids for s in sequences] == alone
    plain = [s for s in sequences if not s.request.speculates]
    for s in plain:
        assert (s.num_guesses, s.accepted_histogram) == (0, [s.num_steps] if s.num_steps else [])
        assert s.num_steps == len(s.token_ids) - 1
    guessing = [s for s in sequences if s.request.speculates]
    assert accepted_per_step(guessing) > 1.3
    counters = engine.counters
    assert counters.num_drafts <= sum(s.num_steps for s in guessing)
    assert counters.num_draft_tokens == sum(s.num_guesses for s in guessing)
    assert counters.num_steps == sum(s.num_steps for s in sequences)
    if is_adaptive:
        assert len(learnt) == sum(s.num_steps for s in guessing)


def test_heads_are_asked_for_nothing_where_nobody_wants_guesses(engine_of, monkeypatch):
    engine = engine_of(TREES["tree"], is_adaptive=True)
    engine.sizer = TreeSizer(engine.tree, {1: dict.fromkeys(engine.trees, 1.0)})
    before = list(engine.sizer.chances)
    monkeypatch.setattr(engine.heads, "topk", lambda *_: pytest.fail("the heads were asked"))
    sizes, run_pass = [], engine._run
    monkeypatch.setattr(engine, "_run", lambda *t: (sizes.append(len(t[3])), run_pass(*t))[1])
    prompts = prompts_of(4)
    done = engine.generate(prompts, 12, speculates=False)
    assert [d.token_ids for d in done] == [d.token_ids for d in engine_of().generate(prompts, 12)]
    assert sizes[1:] == [1] * (len(sizes) - 1)  # the first is the prompts' pass
    assert engine.sizer.chances == before


# ---------------------------------------------------------------------------------------------- logprobs


@pytest.mark.parametrize("tree", [None, *TREES])
def test_logprobs_are_those_of_a_plain_forward(engine_of, model, tree):
    """Off by one inside an accepted run they still look like log-probabilities."""
    settings = [
        {"logprobs": 5},
        {},
        {"logprobs": 0, "temperature": 1.2, "seed": 1},
        {"logprobs": 20, "temperature": 0.8, "seed": 2, "presence_penalty": 1, "min_p": 0.1},
        {"logprobs": 2, "logit_bias": {7: 100}, "top_k": 3},
    ]
    requests = [
        Request(p, 20, ignore_eos=True, **settings[i % len(settings)]) for i, p in enumerate(prompts_of(15))
    ]
    alone = [s.token_ids for s in run(engine_of(), requests)]
    sequences = run(engine_of(TREES.get(tree), max_batch_size=4), requests, alone)
    for request, sequence in zip(requests, sequences, strict=True):
        if request.logprobs is None:
            assert sequence.logprobs == []
            continue
        with torch.inference_mode():
            logits_TV = model(torch.tensor([request.prompt_ids + sequence.token_ids])).logits[0]
        plain_TV = logits_TV.log_softmax(-1)[len(request.prompt_ids) - 1 : -1]
        assert [entry.token_id for entry in sequence.logprobs] == sequence.token_ids
        for plain_V, entry in zip(plain_TV, sequence.logprobs, strict=True):
            top = plain_V.topk(request.logprobs)
            assert entry.logprob == pytest.approx(float(plain_V[entry.token_id]), abs=1e-4)
            assert [token for token, _ in entry.top] == top.indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    if tree:
        assert accepted_per_step(sequences) > 1.3


def test_deltas_and_completions_carry_the_logprobs_of_their_own_tokens(engine_of):
    prompts = prompts_of(3)
    done = engine_of().generate(prompts, 12, logprobs=1)
    engine = engine_of(TREES["tree"])
    engine.heads.replies = {tuple(p): d.token_ids for p, d in zip(prompts, done, strict=True)}
    sequences = [engine.add(Request(p, 12, logprobs=1)) for p in prompts]
    deltas: dict[Sequence, list[Delta]] = {s: [] for s in sequences}
    while not all(s.finish_reason for s in sequences):
        for sequence, delta in engine.step():
            deltas[sequence].append(delta)
    for sequence, completion in zip(sequences, done, strict=True):
        for delta in deltas[sequence]:
            assert [entry.token_id for entry in delta.logprobs] == delta.token_ids
        values = [entry.logprob for delta in deltas[sequence] for entry in delta.logprobs]
        assert values == pytest.approx([entry.logprob for entry in completion.logprobs], abs=1e-4)
    assert engine_of().generate(prompts, 3)[0].logprobs is None


# -------------------------------------------------------------------------------------------- adversarial


@pytest.mark.parametrize("only_the_best", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
@pytest.mark.parametrize("tree", [None, *TREES])
def test_filters_that_leave_one_token_are_greedy_at_any_temperature(engine_of, only_the_best, tree):
    prompts = prompts_of(6)
    greedy = [d.token_ids for d in engine_of().generate(prompts, 12)]
    requests = [Request(p, 12, temperature=100, **only_the_best) for p in prompts]
    assert [s.token_ids for s in run(engine_of(TREES.get(tree)), requests, greedy)] == greedy


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_bias_of_100_commands_and_one_of_minus_100_forbids(engine_of, temperature):
    prompts = prompts_of(4)
    plain = engine_of().generate(prompts, 12, temperature=temperature, seed=1)
    often = plain[0].token_ids[3]
    forbidden = run(
        engine_of(TREES["tree"]),
        [Request(p, 12, temperature=temperature, seed=1, logit_bias={often: -100}) for p in prompts],
        [d.token_ids for d in plain],
    )
    assert all(often not in s.token_ids for s in forbidden)
    commanded = [Request(p, 12, temperature=temperature, logit_bias={77: 100}) for p in prompts]
    assert all(s.token_ids == [77] * 12 for s in run(engine_of(TREES["tree"]), commanded, [[77] * 12] * 4))


@pytest.mark.parametrize(
    "limits",
    [
        {"repetition_penalty": 100.0},
        {"repetition_penalty": 0.01},
        {"presence_penalty": 2, "frequency_penalty": 2},
        {"presence_penalty": -2, "frequency_penalty": -2},
        {"repetition_penalty": 0.01, "frequency_penalty": -2, "temperature": 1e-9},
        {"temperature": 100, "top_k": 2**31 - 1, "logit_bias": dict.fromkeys(range(V), 100)},
    ],
)
def test_penalties_at_their_limits_are_the_baselines_too(engine_of, limits):
    requests = [
        Request(p, 16, **{"temperature": 0.8 * (i % 2), "seed": i, **limits})
        for i, p in enumerate(prompts_of(6))
    ]
    alone = [s.token_ids for s in run(engine_of(), requests)]
    assert [s.token_ids for s in run(engine_of(TREES["tree"]), requests, alone)] == alone


def test_a_mask_that_allows_one_token_dictates_the_reply(engine_of):
    def dictated(token_ids: list[int]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor((7 * len(token_ids)) % 200 + 6), V).bool()

    prompts = prompts_of(6)
    reply = [(7 * i) % 200 + 6 for i in range(20)]
    requests = [Request(p, 20, temperature=i % 2, allowed_tokens=dictated) for i, p in enumerate(prompts)]
    sequences = run(engine_of(TREES["tree"]), requests, [reply] * 6)
    assert [s.token_ids for s in sequences] == [reply] * 6
    assert accepted_per_step(sequences) > 1.3


@pytest.mark.parametrize("num_allowed", [0, 1, 5])
@pytest.mark.parametrize("tree", [None, *TREES])
def test_where_nothing_may_follow_the_reply_ends(engine_of, num_allowed, tree):
    """A row that has no next token must neither pass one on nor disturb its neighbours."""

    def until(token_ids: list[int]) -> Tensor:
        return torch.full((V,), len(token_ids) < num_allowed)

    prompts = prompts_of(6)
    plain = [d.token_ids for d in engine_of().generate(prompts, 12, ignore_eos=True)]
    masks = [until, None] * 3
    engine = engine_of(TREES.get(tree))
    requests = [
        Request(p, 12, ignore_eos=True, capture_hidden=True, logprobs=1, allowed_tokens=mask)
        for p, mask in zip(prompts, masks, strict=True)
    ]
    sequences = run(engine, requests, plain)
    for sequence, mask, reply in zip(sequences, masks, plain, strict=True):
        expected = (reply[:num_allowed], "stop") if mask else (reply, "length")
        assert (sequence.token_ids, sequence.finish_reason) == expected
        assert len(torch.cat(sequence.hidden_parts)) == len(sequence.logprobs) == len(sequence.token_ids)


def test_typical_acceptance_keeps_to_masks_and_leaves_its_neighbours_alone(engine_of):
    prompts = prompts_of(16)
    exact = [Request(p, 30, temperature=0.8, seed=i, ignore_eos=True) for i, p in enumerate(prompts)]
    alone = [s.token_ids for s in run(engine_of(), exact)]
    likely = [d.token_ids for d in engine_of().generate(prompts, 30, ignore_eos=True)]
    mixed = [
        Request(
            p, 30, temperature=0.8, seed=i, ignore_eos=True, acceptance="typical" if i % 2 else "exact",
            typical_threshold=0.05, typical_alpha=0.2, allowed_tokens=Residues() if i % 4 == 3 else None,
        )
        for i, p in enumerate(prompts)
    ]  # fmt: skip
    known = [likely[i] if i % 2 else alone[i] for i in range(16)]
    sequences = run(engine_of(TREES["tree"]), mixed, known)
    for i, sequence in enumerate(sequences):
        if i % 2 == 0:
            assert sequence.token_ids == alone[i]
        if i % 4 == 3:
            tokens = sequence.token_ids
            assert all(a % 3 != b % 3 for a, b in itertools.pairwise(tokens))
    assert sum(s.token_ids != alone[i] for i, s in enumerate(sequences) if i % 2) > 4


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([5], temperature=-1), "temperature is -1; expected 0 to 100"),
        (Request([5], logprobs=21), "logprobs is 21; expected 0 to 20"),
        (Request([5], logit_bias={262: 1}), r"outside 0 \.\.\. 261"),
        (Request([5], stop_ids=(262,)), r"stop_ids have the token id 262, outside 0 \.\.\. 261"),
        (Request([5], top_k=1.5), "top_k is 1.5; expected 0 to 2147483647, a whole number"),
        (Request([5], seed=0.5), "seed is 0.5"),
        (Request([5], temperature="1"), "temperature is '1'; expected 0 to 100"),
        (Request([5], top_p="1"), "top_p is '1'"),
        (Request([5], logit_bias={1.5: 1}), r"token id 1.5, outside 0 \.\.\. 261"),
        (Request([5], logit_bias={1: "1"}), "logit_bias of token 1 is '1'"),
        (Request([5], acceptance="typically"), "acceptance is 'typically'"),
    ],
)
def test_settings_out_of_range_are_refused_before_they_reach_the_batch(engine_of, request_, message):
    """In a step they would end the engine for everybody."""
    with pytest.raises(ValueError, match=message):
        engine_of().add(request_)
