"""Labels and loss of the heads. A label off by one still trains; only acceptance drops.

pytest -m nightly tests/test_loss.py -s prints the memory that a loss of the size of Llama-3 takes: ten minutes.
"""

import math
import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from medusa_ray.medusa import loss as module
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.loss import (
    IGNORED,
    CrossEntropy,
    HeadLoss,
    Teacher,
    chunked_cross_entropy,
    cross_entropy_for,
    fused_cross_entropy,
    labels_for,
    medusa_loss,
    num_losses,
    places_in,
    teacher_for,
    whole_cross_entropy,
)

H, C, V, K = 3, 8, 20, 4
ONES = torch.ones(H)

TOKEN_MAP = torch.tensor([0, 2, 3, 9, 10, 11, 14, 18])

every_layout = pytest.mark.parametrize("layout", ["own", "shared", "lowrank"])
mapped_or_not = pytest.mark.parametrize("token_map_M", [None, TOKEN_MAP], ids=["whole", "mapped"])
hard_and_soft = pytest.mark.parametrize("num_named", [0, K], ids=["hard", "soft"])
has_fused = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")


def random_heads(
    dtype: torch.dtype = torch.float32, layout: str = "own", token_map_M: torch.Tensor | None = None
) -> MedusaHeads:
    shape = {"hidden_size": C, "vocab_size": V, "layout": layout, "rank": 4, "token_map_M": token_map_M}
    heads = MedusaHeads(H, 2, **shape, dtype=dtype)
    heads.init_from(torch.randn(V, C).to(dtype))
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    return heads


def random_batch(num_positions: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    labels_NH = torch.randint(0, V, (num_positions, H))
    labels_NH[torch.rand(num_positions, H) < 0.3] = IGNORED
    return torch.randn(num_positions, C), labels_NH


def random_teacher(num_positions: int = 30, num_named: int = K) -> Teacher:
    logprobs_NHK, ids_NHK = torch.randn(num_positions, H, V).log_softmax(-1).topk(num_named)
    return Teacher(ids_NHK, logprobs_NHK)


def slow_loss(logits_M: torch.Tensor, ids: list[int], label: int, teacher: dict[int, float]) -> torch.Tensor:
    """Of one label: ids are those of the logits, and teacher has the chances of the tokens that the base named."""
    share_of = dict(zip(ids, logits_M.double().softmax(0), strict=True))
    if not teacher:
        return -share_of[label].log()
    named = {token: share for token, share in teacher.items() if token in ids}
    others = [token for token in ids if token not in named]
    buckets = [(share, share_of[token]) for token, share in named.items()]
    buckets.append((1 - sum(teacher.values()), sum(share_of[token] for token in others)))
    known = sum(share for share, _ in buckets)
    return sum(share / known * (math.log(share / known) - q.log()) for share, q in buckets)


def chances(teacher: Teacher, n: int, k: int) -> dict[int, float]:
    return dict(
        zip(teacher.ids_NHK[n, k].tolist(), teacher.logprobs_NHK[n, k].double().exp().tolist(), strict=True)
    )


def result_of(
    heads: MedusaHeads, cross_entropy: CrossEntropy, **inputs
) -> tuple[HeadLoss, dict[str, torch.Tensor]]:
    """A loss and the gradients of all weights and of the hidden states."""
    heads.zero_grad()
    hidden_NC = inputs.pop("hidden_NC").clone().requires_grad_()
    result = medusa_loss(heads, hidden_NC, cross_entropy=cross_entropy, **inputs)
    result.loss.backward()
    return result, {
        "hidden": hidden_NC.grad,
        **{name: p.grad.clone() for name, p in heads.named_parameters()},
    }


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_labels_of_a_drawn_sequence() -> None:
    """Prompt 10 11 12, reply 13 14 15. The base, at the place of 12, predicts 13; head 0 there guesses 14."""
    ids, mask = torch.tensor([10, 11, 12, 13, 14, 15]), torch.tensor([False] * 3 + [True] * 3)
    assert labels_for(ids, mask, torch.tensor([2, 3]), 2).tolist() == [[14, 15], [15, IGNORED]]
    assert labels_for(ids, mask, torch.tensor([0, 1, 4, 5]), 2).tolist() == [
        [IGNORED, 13],  # 12 belongs to the prompt
        [13, 14],
        [IGNORED, IGNORED],
        [IGNORED, IGNORED],
    ]


def test_labels_equal_a_slow_loop() -> None:
    ids, mask = torch.randint(0, V, (40,)), torch.rand(40) < 0.7
    position = torch.randperm(40)[:25]
    expected = [
        [int(ids[t + k + 2]) if t + k + 2 < 40 and mask[t + k + 2] else IGNORED for k in range(5)]
        for t in position.tolist()
    ]
    assert labels_for(ids, mask, position, 5).tolist() == expected


def test_sequences_in_a_row_have_the_labels_and_the_teacher_that_each_has_alone() -> None:
    """A gap one token short, and the last position of a reply learns the first token of the next."""
    ids, masks, positions, alone, rows = [], [], [], [], []
    start, gap = 0, torch.full((H + 1,), 7)
    for length in (9, 2, 1, 14, 5):
        tokens, mask = torch.randint(0, V, (length,)), torch.rand(length) < 0.7
        mask[-1] = True
        position = torch.arange(length)
        said = random_teacher(int(mask.sum()))
        row = (said.ids_NHK[:, 0], said.logprobs_NHK[:, 0])
        alone.append((labels_for(tokens, mask, position, H), *teacher_for(*row, mask, position, H)))
        ids += [tokens, gap]
        masks += [mask, torch.zeros(H + 1, dtype=torch.bool)]
        positions.append(start + position)
        rows.append(row)
        start += length + H + 1
    inputs = (torch.cat(masks)[: -H - 1], torch.cat(positions), H)  # no gap after the last
    found_NH = labels_for(torch.cat(ids)[: -H - 1], *inputs)
    teacher = teacher_for(*(torch.cat(kind) for kind in zip(*rows, strict=True)), *inputs)
    labels_NH, ids_NHK, logprobs_NHK = (torch.cat(kind) for kind in zip(*alone, strict=True))
    assert torch.equal(found_NH, labels_NH)
    known_NH = labels_NH != IGNORED
    assert torch.equal(teacher.ids_NHK[known_NH], ids_NHK[known_NH])
    assert torch.equal(teacher.logprobs_NHK[known_NH], logprobs_NHK[known_NH])


def test_the_teacher_of_a_label_equals_a_slow_loop() -> None:
    """Each label's first named token is its own place, by which a row beside the right one would show."""
    mask, position = torch.rand(40) < 0.7, torch.randperm(40)[:25]
    places = mask.nonzero()
    teacher = teacher_for(places, places / 40, mask, position, 5)
    for n, t in enumerate(position.tolist()):
        for k in range(5):
            if t + k + 2 < 40 and mask[t + k + 2]:
                assert teacher.ids_NHK[n, k].tolist() == [t + k + 2]
                assert teacher.logprobs_NHK[n, k].item() == pytest.approx((t + k + 2) / 40)
            else:
                assert teacher.logprobs_NHK[n, k].exp() == 0


def test_a_teacher_that_lacks_a_row_is_refused() -> None:
    mask = torch.tensor([False, True, True])
    for ids_LK, logprobs_LK in (
        (torch.zeros(1, K), torch.zeros(1, K)),
        (torch.zeros(2, K), torch.zeros(2, K - 1)),
    ):
        with pytest.raises(ValueError, match=r"label_mask has 2 labels, and one row of each was expected"):
            teacher_for(ids_LK, logprobs_LK, mask, torch.arange(2), H)


@every_layout
@mapped_or_not
@hard_and_soft
def test_the_loss_equals_a_slow_loop(layout: str, token_map_M: torch.Tensor | None, num_named: int) -> None:
    """A place taken for an id, or the other way round, still trains."""
    heads, (hidden_NC, labels_NH) = random_heads(layout=layout, token_map_M=token_map_M), random_batch()
    teacher, weight_H = random_teacher(num_named=num_named), torch.tensor([0.5, 2.0, 0.0])
    result = medusa_loss(heads, hidden_NC, labels_NH, weight_H, whole_cross_entropy, teacher)

    logits_NHM, ids, expected = heads(hidden_NC), list(range(V)), []
    if token_map_M is not None:
        ids = token_map_M.tolist()
    for k in range(H):
        known = [(n, label) for n, label in enumerate(labels_NH[:, k].tolist()) if label != IGNORED]
        inside = [(n, label) for n, label in known if label in ids]
        assert 0 < len(inside) < len(known) or token_map_M is None
        losses = [slow_loss(logits_NHM[n, k], ids, label, chances(teacher, n, k)) for n, label in inside]
        expected.append(sum(losses).float())
        ranked = {n: [ids[place] for place in logits_NHM[n, k].argsort(descending=True)] for n, _ in known}
        assert result.top1_H[k] == sum(ranked[n][0] == label for n, label in known)
        assert result.top5_H[k] == sum(label in ranked[n][:5] for n, label in known)
        assert result.num_labels_H[k] == len(known)
        assert num_losses(heads, labels_NH)[k] == len(inside)
    torch.testing.assert_close(result.loss_sum_H, torch.stack(expected).detach())
    torch.testing.assert_close(result.loss, 0.5 * expected[0] + 2 * expected[1])
    assert not result.loss_sum_H.requires_grad


def test_a_step_has_one_loss_however_its_labels_fall_on_micro_batches() -> None:
    """A mean of means weighs a label in a batch of few others more."""
    heads, (hidden_NC, labels_NH) = random_heads(), random_batch()
    weight_H = 0.8 ** torch.arange(H) / num_losses(heads, labels_NH)
    whole, whole_grads = result_of(
        heads, whole_cross_entropy, hidden_NC=hidden_NC, labels_NH=labels_NH, weight_H=weight_H
    )
    pieces = [
        result_of(heads, whole_cross_entropy, hidden_NC=states, labels_NH=labels, weight_H=weight_H)
        for states, labels in zip(hidden_NC.split([1, 20, 9]), labels_NH.split([1, 20, 9]), strict=True)
    ]
    torch.testing.assert_close(sum(result.loss for result, _ in pieces), whole.loss)
    for name in dict(heads.named_parameters()):
        torch.testing.assert_close(sum(grads[name] for _, grads in pieces), whole_grads[name])


def test_places_in_a_token_map_equal_a_slow_loop() -> None:
    labels_NH, ids = torch.randint(0, V, (40, H)), TOKEN_MAP.tolist()
    labels_NH[::3] = IGNORED
    expected = [[ids.index(x) if x in ids else IGNORED for x in row] for row in labels_NH.tolist()]
    assert places_in(TOKEN_MAP, labels_NH).tolist() == expected


# ------------------------------------------------------------------------------------------------ soft labels


def loss_of_logits(
    logits_M: list[float], ids: list[int], logprobs: list[float]
) -> tuple[float, torch.Tensor]:
    logits_NM = torch.tensor([logits_M], requires_grad=True)
    asked = module.Asked(torch.tensor([0]), torch.tensor([ids]), torch.tensor([logprobs]))
    loss = module.divergence(logits_NM, asked)
    loss.backward()
    return loss.item(), logits_NM.grad[0]


@pytest.mark.parametrize("sure", [20.0, 100.0, 1e4, 1e30])
def test_a_head_that_is_sure_has_a_finite_loss_and_gradient(sure: float) -> None:
    """Where what a head leaves for the rest rounds to 0 in fp32, 1 minus the sum has no logarithm, and no gradient."""
    loss, gradient_M = loss_of_logits([sure, 0.0, 0.0, 0.0], [0], [math.log(0.75)])
    # 0.75 log(0.75 / 1) + 0.25 log(0.25 / (3 exp(-sure)))
    expected = 0.75 * math.log(0.75) + 0.25 * (math.log(0.25) - math.log(3) + sure)
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient_M, torch.tensor([0.25, -0.25 / 3, -0.25 / 3, -0.25 / 3]))


def test_a_teacher_that_is_sure_is_a_hard_label() -> None:
    """exp(0) is 1, or a little more when it was summed in another order: nothing is left for the rest."""
    for logprob in (0.0, 1e-7):
        loss, gradient_M = loss_of_logits([1.0, 2.0, 0.0], [1], [logprob])
        expected_M = torch.tensor([1.0, 2.0, 0.0]).softmax(0)
        assert loss == pytest.approx(-math.log(expected_M[1]))
        torch.testing.assert_close(gradient_M, expected_M - torch.tensor([0.0, 1.0, 0.0]))


def test_a_head_that_says_what_the_base_says_has_no_loss() -> None:
    logits_M = torch.randn(V)
    logprobs, ids = logits_M.log_softmax(0).topk(K)
    loss, gradient_M = loss_of_logits(logits_M.tolist(), ids.tolist(), logprobs.tolist())
    assert loss == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(gradient_M, torch.zeros(V), atol=1e-6, rtol=0)


def test_a_teacher_may_name_the_whole_vocabulary_or_nothing_that_a_head_knows() -> None:
    logits = [1.0, 2.0, 0.0]
    base_M = torch.tensor([0.2, 0.3, 0.5])
    loss, gradient_M = loss_of_logits(logits, [0, 1, 2], base_M.log().tolist())
    head_M = torch.tensor(logits).softmax(0)
    assert loss == pytest.approx((base_M * (base_M / head_M).log()).sum().item(), rel=1e-5)
    torch.testing.assert_close(gradient_M, head_M - base_M)
    loss, gradient_M = loss_of_logits(logits, [IGNORED, IGNORED], [math.log(0.9), math.log(0.1)])
    assert loss == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(gradient_M, torch.zeros(3), atol=1e-6, rtol=0)


def test_soft_labels_are_what_hard_ones_are_on_average() -> None:
    """Tokens out of a head's reach have no hard label. Soft ones that count them have another optimum."""
    base_V = torch.randn(V).softmax(0)
    heads = random_heads(token_map_M=TOKEN_MAP)
    hidden_NC, labels_NH = torch.randn(1, C).expand(V, C), torch.arange(V).unsqueeze(1).expand(V, H)
    _, hard = result_of(
        heads,
        lambda heads, head, states_NC, asked: (
            base_V
            * F.cross_entropy(
                heads.logits_of(head, states_NC), asked.place_N, reduction="none", ignore_index=IGNORED
            )
        ).sum(),
        hidden_NC=hidden_NC,
        labels_NH=labels_NH,
        weight_H=ONES,
        with_hits=False,
    )
    ids_NHK = torch.arange(V).expand(1, H, V)
    teacher = Teacher(ids_NHK, base_V.log().expand(1, H, V))
    inside = torch.tensor([[TOKEN_MAP[0]] * H])
    _, soft = result_of(
        heads, whole_cross_entropy, hidden_NC=hidden_NC[:1], labels_NH=inside, weight_H=ONES, teacher=teacher
    )
    for name, _ in heads.named_parameters():
        torch.testing.assert_close(hard[name], soft[name] * base_V[TOKEN_MAP].sum(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ gradients


@every_layout
@mapped_or_not
@hard_and_soft
@pytest.mark.parametrize("num_layers", [1, 2])
def test_every_weight_of_every_head_learns(
    layout: str, token_map_M: torch.Tensor | None, num_named: int, num_layers: int
) -> None:
    """Trainers exist that leave the first head, the last one, or all residual blocks as they were."""
    shape = {"hidden_size": C, "vocab_size": V, "layout": layout, "rank": 4, "token_map_M": token_map_M}
    heads, (hidden_NC, labels_NH) = MedusaHeads(H, num_layers, **shape), random_batch()
    heads.init_from(torch.randn(V, C))
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    optimizer, teacher = (
        torch.optim.AdamW(heads.parameters(), weight_decay=0.0),
        random_teacher(30, num_named),
    )
    # The first step of a low-rank term moves one of its matrices only: both at zero would stay there for ever.
    for step in range(2 if layout == "lowrank" else 1):
        optimizer.zero_grad()
        medusa_loss(heads, hidden_NC, labels_NH, ONES, whole_cross_entropy, teacher).loss.backward()
        silent = {name for name, p in heads.named_parameters() if p.grad is None or not p.grad.norm() > 0}
        assert silent == {name for name in before if name.endswith("down.weight") and step == 0}
        optimizer.step()
    same = {name for name, tensor in heads.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == {name for name in before if name == "token_map_M"}


@pytest.mark.parametrize(
    ("layout", "cross_entropy"),
    [
        ("shared", whole_cross_entropy),
        ("shared", chunked_cross_entropy),
        pytest.param("shared", fused_cross_entropy, marks=has_fused),
        ("lowrank", whole_cross_entropy),
        ("lowrank", chunked_cross_entropy),
    ],
)
def test_nothing_of_the_base_s_output_layer_learns(layout: str, cross_entropy: CrossEntropy) -> None:
    """What is trained and not saved is missing where heads are served: they were trained for another output layer."""
    output = torch.nn.Linear(C, V, bias=False)
    heads, (hidden_NC, labels_NH) = MedusaHeads(H, hidden_size=C, vocab_size=V, layout=layout), random_batch()
    heads.init_from(output.weight)
    before = output.weight.detach().clone()
    optimizer = torch.optim.AdamW([*heads.parameters(), output.weight])
    medusa_loss(heads, hidden_NC, labels_NH, ONES, cross_entropy).loss.backward()
    optimizer.step()
    assert output.weight.grad is None
    assert torch.equal(output.weight, before)
    assert not {id(p) for p in heads.parameters()} & {id(output.weight), id(heads.output_MC)}


@hard_and_soft
@pytest.mark.parametrize(
    "cross_entropy",
    [whole_cross_entropy, chunked_cross_entropy, pytest.param(fused_cross_entropy, marks=has_fused)],
)
def test_without_any_label_loss_and_gradients_are_zero_and_not_nan(
    num_named: int, cross_entropy: CrossEntropy
) -> None:
    heads, (hidden_NC, labels_NH) = random_heads(), random_batch()
    inputs = {"hidden_NC": hidden_NC, "weight_H": ONES, "teacher": random_teacher(num_named=num_named)}
    result, grads = result_of(heads, cross_entropy, labels_NH=torch.full_like(labels_NH, IGNORED), **inputs)
    assert result.loss == 0
    assert result.num_labels_H.tolist() == result.top1_H.tolist() == result.top5_H.tolist() == [0] * H
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads.values())

    labels_NH[:, 2] = IGNORED  # one head alone
    result, grads = result_of(heads, cross_entropy, labels_NH=labels_NH, **inputs)
    assert result.loss_sum_H[2] == 0
    assert result.loss_sum_H[:2].min() > 0
    assert all((grad == 0).all() == name.startswith("2.") for name, grad in grads.items())


def test_positions_that_are_ignored_change_nothing() -> None:
    heads, (hidden_NC, labels_NH) = random_heads(), random_batch()
    padded_NC = torch.cat([hidden_NC, torch.full((4, C), 9.0)])
    padded_NH = torch.cat([labels_NH, torch.full((4, H), IGNORED)])
    short = medusa_loss(heads, hidden_NC, labels_NH, ONES, whole_cross_entropy)
    long = medusa_loss(heads, padded_NC, padded_NH, ONES, whole_cross_entropy)
    torch.testing.assert_close(long, short)


# ------------------------------------------------------------------------------------------------ in pieces


@hard_and_soft
@mapped_or_not
@pytest.mark.parametrize(
    ("layout", "cross_entropy"),
    [
        pytest.param("own", fused_cross_entropy, marks=has_fused),
        pytest.param("shared", fused_cross_entropy, marks=has_fused),
        ("own", chunked_cross_entropy),
        ("shared", chunked_cross_entropy),
        ("lowrank", chunked_cross_entropy),
    ],
)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_loss_in_pieces_equals_the_whole_one(
    layout: str,
    cross_entropy: CrossEntropy,
    token_map_M: torch.Tensor | None,
    num_named: int,
    dtype: torch.dtype,
    rtol: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """rtol: rounding of sums in another order. In bf16 the gradients themselves have eight bits."""
    heads, (hidden_NC, labels_NH) = random_heads(dtype, layout, token_map_M), random_batch(300)
    labels_NH[:50] = heads(hidden_NC[:50].to(dtype)).argmax(-1)  # so that there are hits
    if token_map_M is not None:
        labels_NH[:50] = token_map_M[labels_NH[:50]]
    inputs = {
        "hidden_NC": hidden_NC.to(dtype),
        "labels_NH": labels_NH,
        "weight_H": torch.tensor([1.0, 0.8, 0.6]),
    }
    inputs["teacher"] = random_teacher(300, num_named)
    whole, whole_grads = result_of(heads, whole_cross_entropy, **inputs)
    monkeypatch.setattr(module, "MAX_LOGITS", 7 * heads.draft_vocab_size)
    pieces, grads = result_of(heads, cross_entropy, **inputs)
    torch.testing.assert_close(pieces.loss, whole.loss, rtol=rtol, atol=0)
    torch.testing.assert_close(pieces.loss_sum_H, whole.loss_sum_H, rtol=rtol, atol=0)
    for name, expected in whole_grads.items():
        error = (grads[name].float() - expected.float()).norm() / expected.float().norm()
        assert error < rtol, name
    assert whole.top1_H.min() >= 50
    assert (whole.top5_H - whole.top1_H).min() > 0
    if dtype == torch.float32:  # logits of bf16 are often equal
        assert torch.equal(pieces.top1_H, whole.top1_H)
        assert torch.equal(pieces.top5_H, whole.top5_H)
    quiet = medusa_loss(heads, cross_entropy=cross_entropy, with_hits=False, **inputs)
    assert (quiet.top1_H, quiet.top5_H) == (None, None)
    torch.testing.assert_close(quiet.loss, pieces.loss)


@every_layout
def test_only_large_vocabularies_are_taken_in_pieces(layout: str) -> None:
    """Pieces save memory and cost time: 8,192 tokens at once are still small, 128,256 are not."""

    def chosen(vocab_size: int, token_map_M: torch.Tensor | None = None) -> CrossEntropy:
        shape = {"hidden_size": 4, "vocab_size": vocab_size, "layout": layout, "token_map_M": token_map_M}
        return cross_entropy_for(MedusaHeads(**shape), 512)

    fuses = layout != "lowrank" and hasattr(F, "linear_cross_entropy")
    assert chosen(1024) is whole_cross_entropy
    assert chosen(8192) is whole_cross_entropy
    assert chosen(128_256) is (fused_cross_entropy if fuses else chunked_cross_entropy)
    assert chosen(128_256, torch.arange(0, 128_256, 16)) is whole_cross_entropy


# ------------------------------------------------------------------------------------------------ memory


def resident(kind: str) -> int:
    """Bytes of this process: VmRSS is now, VmHWM the most since it was last cleared."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{kind}:\s+(\d+) kB", status)[1])


def peak_of_a_loss(
    max_logits: int,
    layout: str,
    cross_entropy: CrossEntropy,
    num_named: int,
    num_positions: int,
    hidden_size: int,
    vocab_size: int,
) -> int:
    """Bytes that the loss of four heads and its gradients take at most, beyond what is there before and stays.

    That is the heads, their gradients, which the optimizer keeps, states, labels and the teacher.
    """
    module.MAX_LOGITS = max_logits
    torch.set_num_threads(1)
    num_heads = 4
    heads = MedusaHeads(num_heads, hidden_size=hidden_size, vocab_size=vocab_size, layout=layout)
    heads.init_from(torch.randn(vocab_size, hidden_size))
    for parameter in heads.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids_NHK = torch.randint(0, vocab_size - num_named, (num_positions, num_heads, 1)) + torch.arange(
        num_named
    )
    teacher = Teacher(ids_NHK, torch.randn(num_positions, num_heads, num_named + 4).log_softmax(-1)[..., 4:])
    hidden_NC = torch.randn(num_positions, hidden_size)
    labels_NH = torch.randint(0, vocab_size, (num_positions, num_heads))

    def run(num: int) -> None:
        few = Teacher(*(tensor[:num] for tensor in teacher))
        weight_H = torch.full((num_heads,), 1 / num)
        medusa_loss(heads, hidden_NC[:num], labels_NH[:num], weight_H, cross_entropy, few).loss.backward()

    run(2)  # what is loaded or set up once is none of the loss's
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.perf_counter()
    run(num_positions)
    peak = resident("VmHWM") - before
    kind = f"{layout} {cross_entropy.__name__} num_named={num_named}"
    print(f"\n{kind}: peak_mib={peak / 2**20:.0f} seconds={time.perf_counter() - start:.1f}")
    return peak


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """peak_of_a_loss of each of some cases, in a process that gives back at once what is freed."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks are read from /proc")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))  # glibc would keep blocks of up to 32 MiB

    def run(max_logits: int, *cases: tuple) -> list[int]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return [pool.submit(peak_of_a_loss, max_logits, *case).result() for case in cases]

    return run


ways = [(chunked_cross_entropy, 0), (chunked_cross_entropy, 16)]
if hasattr(F, "linear_cross_entropy"):
    ways.append((fused_cross_entropy, 0))


def test_a_loss_in_pieces_takes_less_memory_than_the_logits_of_one_head(
    measured: Callable[..., list[int]],
) -> None:
    """64 MiB, at 4 MiB a piece. The way by all logits shows that the measure sees them."""
    shape = (1024, 16, 16_384)
    cases = [("own", *way, *shape) for way in [*ways, (whole_cross_entropy, 0), (whole_cross_entropy, 16)]]
    *pieces, hard, soft = measured(2**20, *cases)
    assert max(pieces) < 48 * 2**20
    assert min(hard, soft) > 4 * 64 * 2**20  # of four heads


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", ["own", "shared"])
@pytest.mark.parametrize(("cross_entropy", "num_named"), ways)
def test_the_loss_of_a_large_vocabulary_takes_less_than_a_gib(
    layout: str, cross_entropy: CrossEntropy, num_named: int, measured: Callable[..., list[int]]
) -> None:
    """Whole logits of these four heads would be 7.8 GiB."""
    (peak,) = measured(module.MAX_LOGITS, (layout, cross_entropy, num_named, 4096, 256, 128_256))
    assert peak <= 2**30
