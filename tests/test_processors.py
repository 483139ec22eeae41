"""Processors at the nodes of a tree. The oracle is transformers' own, called node by node with the node's own path."""

import random

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from medusa_ray.medusa.processors import History, allowed_masks, keep_likely, process
from medusa_ray.medusa.sampling import Sampling, Settings
from medusa_ray.medusa.tree import Tree

CPU = torch.device("cpu")
V = 12  # few tokens, so that prompt, reply and path have many in common
TREES = {
    "root": Tree(),
    "chain": Tree.chain(4),
    "tree": Tree.from_paths([(0,), (1,), (0, 0), (2,), (0, 1), (1, 0), (0, 0, 0), (1, 0, 1), (0, 0, 0, 2)]),
}


class FewTokens:
    """A grammar in which what may follow depends on everything before, and always something may."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, token_ids: list[int]) -> Tensor:
        return torch.tensor([hash((*token_ids, t)) % 3 != 0 or t == 0 for t in range(self.vocab_size)])


def path_of(tree: Tree, node: int, tokens: list[int]) -> list[int]:
    """Tokens from below the root to the node."""
    path = tree.paths[node - 1] if node else ()
    return [tokens[tree.paths.index(path[:depth]) + 1] for depth in range(1, len(path) + 1)]


def random_settings(rng: random.Random) -> Settings:
    """Each setting is used by half of the requests or so."""

    def maybe(value, neutral):
        return value if rng.random() < 0.5 else neutral

    return Settings(
        temperature=maybe(rng.choice([0.3, 0.8, 1.2]), 0.0),
        top_p=maybe(rng.uniform(0.3, 0.99), 1.0),
        top_k=maybe(rng.randint(1, V + 3), 0),
        min_p=maybe(rng.uniform(0.01, 0.5), 0.0),
        repetition_penalty=maybe(rng.choice([0.5, 1.3, 2.0]), 1.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        logit_bias=maybe({rng.randrange(V): rng.uniform(-5, 5) for _ in range(3)}, {}),
        allowed_tokens=maybe(FewTokens(V), None),
    )


def plain_scores(logits_V: Tensor, settings: Settings, prompt: list[int], reply: list[int]) -> Tensor:
    """What one sequence alone gets, by transformers' processors in the order of ours."""
    before = LogitsProcessorList()
    if settings.logit_bias:
        before.append(SequenceBiasLogitsProcessor({(t,): float(b) for t, b in settings.logit_bias.items()}))
    if settings.repetition_penalty != 1:
        before.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    ids = torch.tensor([prompt + reply])
    scores_V = before(ids, logits_V[None].float())[0]
    for token in range(V):  # OpenAI's formula, which transformers does not have
        count = reply.count(token)
        scores_V[token] -= settings.frequency_penalty * count + settings.presence_penalty * (count > 0)
    after = LogitsProcessorList()
    if settings.allowed_tokens is not None:
        allowed = settings.allowed_tokens(reply).nonzero().flatten().tolist()
        after.append(PrefixConstrainedLogitsProcessor(lambda batch, sent: allowed, 1))
    if settings.temperature:
        after.append(TemperatureLogitsWarper(settings.temperature))
        for warper, value in (
            (MinPLogitsWarper, settings.min_p),
            (TopKLogitsWarper, settings.top_k),
            (TopPLogitsWarper, settings.top_p),
        ):
            if value not in (0, 1.0) or (warper is TopKLogitsWarper and value):
                after.append(warper(value))
    return after(ids, scores_V[None])[0]


@pytest.mark.parametrize("tree", TREES)
def test_each_node_gets_the_scores_that_its_own_path_has(tree):
    """With the root's history at every node only penalised and constrained replies differ, and they still read well."""
    tree, rng = TREES[tree], random.Random(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        settings = [random_settings(rng) for _ in range(5)]
        prompts = [[rng.randrange(V) for _ in range(rng.randint(1, 6))] for _ in settings]
        replies = [[rng.randrange(V) for _ in range(rng.randint(1, 6))] for _ in settings]
        token_BN = torch.randint(0, V, (5, len(tree)), generator=generator)
        token_BN[:, 0] = torch.tensor([reply[-1] for reply in replies])
        logits_BNV = torch.randn(5, len(tree), V, generator=generator) * 3
        sampling = Sampling.of(settings, [0] * 5, V, CPU)
        histories = [
            [reply + path_of(tree, node, tokens) for node in range(len(tree))]
            for reply, tokens in zip(replies, token_BN.tolist(), strict=True)
        ]
        # Every node is asked here: nothing is known to be out of reach for the oracle either.
        anything = torch.ones(V, dtype=torch.bool)
        masks = [
            [one.allowed_tokens(h) if one.allowed_tokens else anything for h in of_row]
            for one, of_row in zip(settings, histories, strict=True)
        ]
        allowed_BNV = torch.stack([torch.stack(of_row) for of_row in masks])
        scores_BNV = process(
            logits_BNV, token_BN, tree, sampling, History.of(prompts, replies, V, CPU), allowed_BNV
        )
        for row, one in enumerate(settings):
            for node in range(len(tree)):
                expected_V = plain_scores(logits_BNV[row, node], one, prompts[row], histories[row][node])
                # float32, a few operations in another order; scores reach 100
                torch.testing.assert_close(scores_BNV[row, node].float(), expected_V, atol=1e-4, rtol=0)


def test_rows_without_penalties_are_the_same_bits_beside_rows_with_them():
    logits_BNV = torch.randn(2, 9, V, generator=torch.Generator().manual_seed(1))
    token_BN = torch.randint(0, V, (2, len(TREES["tree"])), generator=torch.Generator().manual_seed(2))
    logits_BNV = logits_BNV.repeat(1, 2, 1)[:, : token_BN.shape[1]]
    plain = Settings(temperature=0.7)
    others = Settings(
        presence_penalty=1, repetition_penalty=1.5, logit_bias={3: 1}, min_p=0.2, top_p=0.8, top_k=3
    )
    history = History.of([[1, 2], [3]], [[4, 4], [5]], V, CPU)
    alone = process(logits_BNV[:1], token_BN[:1], TREES["tree"], Sampling.of([plain], [0], V, CPU))
    mixed = process(
        logits_BNV, token_BN, TREES["tree"], Sampling.of([plain, others], [0, 0], V, CPU), history
    )
    assert mixed[:1].equal(alone)


def test_a_history_that_is_added_to_is_that_of_the_whole_reply():
    committed_BD = torch.tensor([[5, 5, 7, 9], [2, 3, 3, 3], [1, -1, 0, 0]])
    history = History.of([[1], [2, 2], [3]], [[5], [4], [6]], V, CPU)
    history.add(committed_BD, torch.tensor([3, 1, 2]))
    whole = History.of([[1], [2, 2], [3]], [[5, 5, 5, 7], [4, 2], [6, 1]], V, CPU)
    assert history.count_BV.equal(whole.count_BV)
    assert history.in_prompt_BV.equal(whole.in_prompt_BV)


def test_top_p_and_top_k_keep_the_likely_tokens_only():
    scores_BNV = torch.log(torch.tensor([[[0.1, 0.5, 0.25, 0.15]]]))

    def kept(top_p: float, top_k: int) -> list[int]:
        out = keep_likely(scores_BNV, torch.tensor([top_k]), torch.tensor([top_p]))
        return out[0, 0].isfinite().nonzero().flatten().tolist()

    assert kept(1.0, 0) == [0, 1, 2, 3]
    assert kept(1.0, 2) == [1, 2]
    assert kept(0.7, 0) == [1, 2]
    assert kept(0.76, 0) == [1, 2, 3]
    assert kept(1e-9, 0) == [1]


def test_of_equal_tokens_the_first_ones_stay_whatever_the_shape_of_the_batch():
    """bfloat16 logits tie often; a sort that orders ties by chance breaks seeds once the tree changes size."""
    scores_BNV = torch.zeros(3, 50, 700)
    kept_BNV = keep_likely(scores_BNV, torch.tensor([5, 5, 5]), None).isfinite()
    assert kept_BNV[..., :5].all()
    assert not kept_BNV[..., 5:].any()


def test_a_grammar_is_asked_for_what_it_allows_and_for_nothing_behind_the_end():
    """Grammar libraries raise when they are fed a token that they forbid."""
    tree, end = TREES["tree"], 11
    rng = random.Random(3)
    for _ in range(200):
        asked: list[list[int]] = []
        few = FewTokens(V)

        def grammar(token_ids: list[int], asked=asked, few=few) -> Tensor:
            asked.append(token_ids)
            return few(token_ids)

        reply = [rng.randrange(V - 1) for _ in range(3)]
        tokens = [reply[-1], *(rng.randrange(V) for _ in range(len(tree) - 1))]
        allowed_BNV = allowed_masks([None, grammar], [[], reply], [(), {end}], [tokens, tokens], tree, V)
        assert allowed_BNV[0].all()
        for node in range(len(tree)):
            path = path_of(tree, node, tokens)
            history = [*reply, *path]
            fits = end not in path and all(few(history[:i])[history[i]] for i in range(3, len(history)))
            assert (history in asked) == fits
            assert allowed_BNV[1, node].equal(few(history) if fits else torch.ones(V, dtype=torch.bool))
