import math
from dataclasses import replace

import pytest
import torch

from medusa_ray.medusa.acceptance import decide, unpack, walk
from medusa_ray.medusa.processors import History
from medusa_ray.medusa.sampling import Sampling, Settings
from medusa_ray.medusa.tree import Tree

CPU = torch.device("cpu")
TREE = Tree.from_paths([(0,), (1,), (0, 0), (1, 0), (1, 1)])
TOKENS = [7, 10, 11, 20, 30, 31]  # root; its children 10 and 11; 20 under 10; 30 and 31 under 11


@pytest.mark.parametrize(
    ("target", "node", "committed"),
    [
        ([99, 0, 0, 0, 0, 0], 0, [99]),  # never accepts: the root's own successor is all there is
        ([10, 20, 0, 55, 0, 0], 3, [10, 20, 55]),  # always accepts, along the first branch
        ([11, 20, 31, 0, 0, 66], 5, [11, 31, 66]),  # along the second
        ([11, 20, 77, 0, 0, 0], 2, [11, 77]),  # sometimes: one guess, then the base's own token
        ([99, 20, 31, 55, 0, 66], 0, [99]),  # children that agree count for nothing under one that does not
    ],
)
def test_the_walk_goes_as_far_as_the_base_agrees(target, node, committed):
    node_B, committed_BD = walk(torch.tensor([TOKENS]), torch.tensor([target]), TREE.shape)
    assert node_B.tolist() == [node]
    assert committed_BD[0, : len(committed)].tolist() == committed


def test_rows_of_a_batch_walk_apart():
    token_BN = torch.tensor([TOKENS, TOKENS])
    target_BN = torch.tensor([[10, 20, 0, 55, 0, 0], [99, 0, 0, 0, 0, 0]])
    node_B, _ = walk(token_BN, target_BN, TREE.shape)
    assert node_B.tolist() == [3, 0]


def test_random_trees_agree_with_a_slow_walk():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ranks = torch.randint(0, 3, (40, 3), generator=generator)
        tree = Tree.calibrated(ranks, int(torch.randint(1, 12, (1,), generator=generator)))
        token_BN = torch.zeros(1, len(tree), dtype=torch.long)
        for node, path in enumerate(tree.paths, 1):
            token_BN[0, node] = path[-1]  # siblings differ, cousins do not
        target_BN = torch.randint(0, 4, (1, len(tree)), generator=generator)
        path: tuple[int, ...] = ()
        committed = []
        while True:
            node = tree.paths.index(path) + 1 if path else 0
            said = int(target_BN[0, node])
            committed.append(said)
            if (*path, said) not in tree.paths:
                break
            path = (*path, said)
        node_B, committed_BD = walk(token_BN, target_BN, tree.shape)
        assert node_B.item() == node
        assert committed_BD[0, : len(committed)].tolist() == committed


# ------------------------------------------------------------------------------------------------ typical


def test_typical_acceptance_agrees_with_a_slow_walk_of_the_papers_rule():
    generator = torch.Generator().manual_seed(0)
    lengths = set()
    for _ in range(300):
        ranks = torch.randint(0, 3, (40, 3), generator=generator)
        tree = Tree.calibrated(ranks, int(torch.randint(1, 12, (1,), generator=generator)))
        token_BN = torch.tensor([[9, *(path[-1] for path in tree.paths)]])  # siblings differ, cousins do not
        logits_BNV = 3 * torch.randn(1, len(tree), 10, generator=generator)
        wants = Settings(temperature=0.8, acceptance="typical", typical_threshold=0.2, typical_alpha=0.5)
        verdict = decide(logits_BNV, token_BN, tree.depth_N[None], tree, Sampling.of([wants], [0], 10, CPU))

        chance_NV = (logits_BNV[0].double() / 0.8).softmax(-1)
        best = {(): 1.0}  # chance of each path that is taken
        for path in tree.paths:
            if path[:-1] in best:
                p_V = chance_NV[tree.paths.index(path[:-1]) + 1 if path[:-1] else 0]
                entropy = -sum(float(p) * math.log(p) for p in p_V)
                if p_V[path[-1]] > min(0.2, 0.5 * math.exp(-entropy)):
                    best[path] = best[path[:-1]] * float(p_V[path[-1]])
        end = max(best, key=lambda path: (len(path), best[path]))
        lengths.add(len(end))
        assert verdict.node_B.item() == (tree.paths.index(end) + 1 if end else 0)
        assert tuple(verdict.committed_BD[0, : len(end)].tolist()) == end
    assert lengths == {0, 1, 2, 3}


def test_a_batch_may_hold_typical_exact_and_greedy_rows():
    """A rule that leaks into another row changes that request's distribution silently."""
    generator = torch.Generator().manual_seed(1)
    token_BN = torch.tensor(TOKENS).expand(3, -1)
    settings = [
        Settings(temperature=1.0, acceptance="typical"),
        Settings(temperature=1.0),
        Settings(acceptance="typical"),
    ]
    went_apart = 0
    guessed_NV = torch.zeros(6, 40)
    guessed_NV[TREE.parent_N[1:], token_BN[0, 1:]] = 1  # so that walks get somewhere
    for _ in range(200):
        logits_BNV = 2 * torch.randn(1, 6, 40, generator=generator).expand(3, -1, -1)
        logits_BNV = logits_BNV + 3 * guessed_NV
        position_BN = TREE.depth_N.expand(3, -1)
        together = decide(logits_BNV, token_BN, position_BN, TREE, Sampling.of(settings, [7] * 3, 40, CPU))
        exact = [settings[0], settings[1], Settings()]
        for row, one in enumerate(exact):
            alone = decide(
                logits_BNV[:1], token_BN[:1], position_BN[:1], TREE, Sampling.of([one], [7], 40, CPU)
            )
            size = int(TREE.depth_N[alone.node_B[0]]) + 1
            assert together.node_B[row] == alone.node_B[0]
            assert together.committed_BD[row, :size].equal(alone.committed_BD[0, :size])
        went_apart += int(together.node_B[0] != together.node_B[1])
    assert went_apart > 20


# ----------------------------------------------------------------------------------------------- the joint

NUM_TOKENS, NUM_DRAWS = 5, 120_000
JOINT_TREE = Tree.from_paths([(0,), (1,), (0, 0), (2,), (1, 0), (0, 1)])


def p_value(seen_X: torch.Tensor, expected_X: torch.Tensor) -> float:
    """Of the chi-squared test, which needs some draws in each cell; cells that cannot occur must be empty."""
    possible_X = expected_X > 0
    assert not seen_X[~possible_X].any()
    assert expected_X[possible_X].min() > 5
    chi2 = ((seen_X - expected_X) ** 2 / expected_X)[possible_X].sum()
    freedom = possible_X.sum().double() - 1
    return float(torch.special.gammaincc(freedom / 2, chi2 / 2))


def joint_of_three(settings: Settings) -> torch.Tensor:
    """How often each triple follows [0 | 1], over many rows that each take the steps of a toy model they need."""
    table_VVV = toy_logits()
    tree = JOINT_TREE
    reply_BT = torch.ones(NUM_DRAWS, 1, dtype=torch.long)  # the root
    length_B = torch.ones(NUM_DRAWS, dtype=torch.long)
    before_B = torch.zeros(NUM_DRAWS, dtype=torch.long)  # the token before the root
    sampling = Sampling.of([settings] * NUM_DRAWS, range(NUM_DRAWS), NUM_TOKENS, CPU)
    history = History.of([[0]] * NUM_DRAWS, [[1]] * NUM_DRAWS, NUM_TOKENS, CPU)
    reply_BT = torch.cat([reply_BT, torch.zeros(NUM_DRAWS, 12, dtype=torch.long)], 1)
    row_B1 = torch.arange(NUM_DRAWS)[:, None]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):  # each commits one token or more
        root_B = reply_BT.gather(1, length_B[:, None] - 1)[:, 0]
        # Guesses at random, but apart among siblings, and the same whatever the base will say.
        order_BHV = torch.rand(NUM_DRAWS, 2, NUM_TOKENS, generator=generator).argsort(-1)
        token_BN = torch.cat([root_B[:, None], order_BHV[..., : tree.num_ranks].flatten(1)], 1)[
            :, tree.guess_N
        ]
        parent_BN = token_BN[:, tree.parent_N].clone()
        parent_BN[:, 0] = before_B
        position_BN = length_B[:, None] + tree.depth_N
        verdict = decide(table_VVV[parent_BN, token_BN], token_BN, position_BN, tree, sampling, history)
        num_B = tree.depth_N[verdict.node_B] + 1
        place_BD = length_B[:, None] + torch.arange(tree.depth + 1)
        reply_BT[row_B1, place_BD] = verdict.committed_BD  # what is behind num_B is written over
        history.add(verdict.committed_BD, num_B)
        length_B = length_B + num_B
        before_B = reply_BT.gather(1, length_B[:, None] - 2)[:, 0]
    first, second, third = reply_BT[:, 1:4].T
    return ((first * NUM_TOKENS + second) * NUM_TOKENS + third).bincount(minlength=NUM_TOKENS**3).double()


def toy_logits() -> torch.Tensor:
    """A model whose next token depends on the last two."""
    return 0.8 * torch.randn(NUM_TOKENS, NUM_TOKENS, NUM_TOKENS, generator=torch.Generator().manual_seed(4))


def expected_joint(settings: Settings) -> torch.Tensor:
    """By enumeration: one sequence, one token at a time, in doubles."""

    def chance_of(reply: list[int]) -> torch.Tensor:
        scores_V = toy_logits().double()[([0, *reply])[-2], reply[-1]]
        for token in range(NUM_TOKENS):
            if token in (0, *reply):
                penalty = settings.repetition_penalty
                scores_V[token] *= penalty if scores_V[token] < 0 else 1 / penalty
            scores_V[token] -= settings.frequency_penalty * reply.count(token)
            scores_V[token] -= settings.presence_penalty * (token in reply)
        chance_V = (scores_V / settings.temperature).softmax(-1)
        chance_V[chance_V < settings.min_p * chance_V.max()] = 0
        return chance_V / chance_V.sum()

    joint = []
    for first in range(NUM_TOKENS):
        for second in range(NUM_TOKENS):
            before = chance_of([1])[first] * chance_of([1, first])[second]
            joint.append(before * chance_of([1, first, second]))
    return torch.cat(joint) * NUM_DRAWS


SAMPLED = {
    "plain": Settings(temperature=1.0),
    "penalised": Settings(
        temperature=0.8, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=-0.4, min_p=0.1
    ),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_three_tokens_have_the_joint_distribution_of_plain_sampling(name):
    """An acceptance rule that prefers its guesses gives fluent text of another distribution."""
    settings = SAMPLED[name]
    assert p_value(joint_of_three(settings), expected_joint(settings)) > 0.001


def test_typical_acceptance_has_another_joint_distribution():
    """Also shows that the test above can fail."""
    settings = replace(SAMPLED["plain"], acceptance="typical")
    assert p_value(joint_of_three(settings), expected_joint(settings)) < 1e-6


# ------------------------------------------------------------------------------------------------ logprobs


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_a_packed_verdict_comes_out_as_it_went_in(num_top):
    """Token ids beyond 2^24 would not survive as float32, nor logprobs as anything shorter."""
    generator = torch.Generator().manual_seed(0)
    logits_BNV = torch.randn(4, 6, 40, generator=generator)
    token_BN, position_BN = torch.tensor(TOKENS).expand(4, -1), TREE.depth_N.expand(4, -1)
    settings = [Settings(), Settings(logprobs=num_top), Settings(temperature=1.0), Settings()]
    sampling = Sampling.of(settings, [0] * 4, 40, CPU)
    verdict = decide(logits_BNV, token_BN, position_BN, TREE, sampling)
    for row, packed in enumerate(verdict.pack().tolist()):
        node, committed, logprobs = unpack(packed, TREE.depth + 1)
        assert node == verdict.node_B[row]
        assert committed == verdict.committed_BD[row].tolist()
        for place, at in enumerate(TREE.walk_ND[node].tolist()):
            plain_V = logits_BNV[row, at].log_softmax(-1)
            entry = logprobs[place]
            assert entry.token_id == committed[place]
            assert entry.logprob == pytest.approx(float(plain_V[committed[place]]), abs=1e-6)
            top = plain_V.topk(num_top)
            assert [token for token, _ in entry.top] == top.indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(top.values.tolist(), abs=1e-6)
    unasked = decide(logits_BNV, token_BN, position_BN, TREE, Sampling.of([Settings()] * 4, [0] * 4, 40, CPU))
    assert unpack(unasked.pack()[0].tolist(), TREE.depth + 1)[2] is None


def test_a_decision_never_waits_for_the_device():
    """Tensors on `meta` have no values: whatever asks for one raises. A sync hides, and costs a step half its speed."""
    meta = torch.device("meta")
    everything = Settings(
        temperature=0.8, top_p=0.9, top_k=9, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.1,
        frequency_penalty=0.1, logit_bias={}, allowed_tokens=lambda _: torch.ones(40, dtype=torch.bool),
        logprobs=3, acceptance="typical",
    )  # fmt: skip
    token_BN, tree = torch.empty(2, 6, dtype=torch.long, device=meta), TREE.to("meta")
    sampling = Sampling.of([everything, Settings()], [0, 1], 40, meta)
    history = History.of([[1], [2]], [[3], [4]], 40, meta)
    logits_BNV, allowed_BNV = (
        torch.empty(2, 6, 40, device=meta),
        torch.empty(2, 6, 40, dtype=torch.bool, device=meta),
    )
    for one in (sampling, replace(sampling, typical=None)):
        verdict = decide(logits_BNV, token_BN, token_BN, tree, one, history, allowed_BNV)
        history.add(verdict.committed_BD, tree.depth_N[verdict.node_B] + 1)
        assert verdict.pack().shape == (2, 1 + 3 + 3 + 2 * 3 * 3)
