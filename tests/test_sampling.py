import math

import pytest
import torch

from medusa_ray.medusa.processors import process
from medusa_ray.medusa.sampling import Sampling, Settings, choose, gumbel
from medusa_ray.medusa.tree import Tree

CPU = torch.device("cpu")


def test_sampled_tokens_follow_the_softmax():
    logits_V = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    num_draws = 60_000
    position_BN = torch.arange(num_draws)[None]
    sampling = Sampling.of([Settings(temperature=1.0)], [5], 5, CPU)
    drawn_N = choose(logits_V.expand(1, num_draws, -1), position_BN, sampling)[0]
    seen_V = drawn_N.bincount(minlength=5).double()
    expected_V = logits_V.softmax(-1).double() * num_draws
    chi2 = ((seen_V - expected_V) ** 2 / expected_V).sum()
    assert chi2 < 18.5  # 99.9% of the chi-squared distribution with 4 degrees of freedom


def test_noise_depends_on_seed_and_position_but_not_on_the_batch():
    position_BN = torch.tensor([[3, 9], [9, 4]])
    both = gumbel(torch.tensor([1, 2]), position_BN, 50)
    assert both[0, 1].equal(gumbel(torch.tensor([1]), torch.tensor([[9]]), 50)[0, 0])
    assert not both[0, 1].equal(both[1, 0]), "the seed makes no difference"
    assert not both[0, 0].equal(both[0, 1]), "the position makes no difference"
    assert both.isfinite().all()
    assert (
        torch.corrcoef(gumbel(torch.arange(2), torch.zeros(2, 1, dtype=torch.long), 20_000)[:, 0])[0, 1].abs()
        < 0.03
    )


def test_greedy_rows_stay_greedy_beside_sampled_ones():
    """Filters must leave them alone too: of two equally good tokens a sort may keep the other one."""
    logits_BNV = torch.randn(2, 40, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits_BNV[:, :, 60:] = logits_BNV[:, :, :40]  # many ties for the best
    position_BN = torch.arange(40).expand(2, -1)
    settings = [
        Settings(top_k=1, top_p=0.1, min_p=1),
        Settings(temperature=5.0, top_k=90, top_p=0.9, min_p=0.01),
    ]
    sampling = Sampling.of(settings, [1, 1], 100, CPU)
    scores_BNV = process(logits_BNV, position_BN, Tree.chain(39), sampling)
    token_BN = choose(scores_BNV, position_BN, sampling)
    assert token_BN[0].equal(logits_BNV[0].argmax(-1))
    assert not token_BN[1].equal(logits_BNV[1].argmax(-1))


def test_where_no_token_may_follow_there_is_none():
    scores_BNV = torch.tensor([[[-math.inf] * 3, [-math.inf, 1.0, 0.0]]])
    sampling = Sampling.of([Settings(allowed_tokens=lambda _: torch.zeros(3, dtype=torch.bool))], [0], 3, CPU)
    assert choose(scores_BNV, torch.zeros(1, 2, dtype=torch.long), sampling).tolist() == [[-1, 1]]


def test_what_no_request_uses_is_not_there():
    """A flag that is set by mistake slows every step down and changes nothing."""
    plain = Sampling.of([Settings(), Settings(top_p=0.5, seed=3)], [1, 2], 50, CPU)
    assert plain.is_greedy
    for name in ("min_p_B", "top_p_B", "top_k_B", "bias_BV", "penalties", "typical", "num_logprobs"):
        assert getattr(plain, name) is None, name
    assert not plain.is_masked
    logits_BNV = torch.randn(2, 1, 50)
    zero = torch.zeros(2, 1, dtype=torch.long)
    assert process(logits_BNV, zero, Tree(), plain) is logits_BNV
    assert Sampling.of([Settings(acceptance="typical")], [0], 50, CPU).typical is None, "greedy is exact"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; expected 0 to 100"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0}, "top_p is 0; expected more than 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1; expected 0"),
        ({"top_k": 2**80}, "top_k is"),
        ({"min_p": 1.1}, "min_p is 1.1; expected 0 to 1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; expected 0.01 to 100"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; expected -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3; expected -2 to 2"),
        ({"logit_bias": {262: 1}}, r"logit_bias has the token id 262, outside 0 \.\.\. 261"),
        ({"logit_bias": {-1: 1}}, "token id -1"),
        ({"logit_bias": {5: 101}}, "logit_bias of token 5 is 101; expected -100 to 100"),
        ({"logit_bias": {5: math.nan}}, "logit_bias of token 5 is nan"),
        ({"logprobs": 21}, "logprobs is 21; expected 0 to 20"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"acceptance": "fast"}, 'acceptance is \'fast\'; expected "exact" or "typical"'),
        ({"typical_threshold": 2}, "typical_threshold is 2; expected 0 to 1"),
        ({"typical_alpha": -1}, "typical_alpha is -1"),
        (
            {"allowed_tokens": lambda _: torch.ones(261, dtype=torch.bool)},
            r"shape \[261\]; expected .*\[262\]",
        ),
        ({"allowed_tokens": lambda _: torch.ones(262)}, "a mask of torch.float32"),
    ],
)
def test_settings_out_of_range_are_refused_with_name_value_and_limit(fields, message):
    with pytest.raises(ValueError, match=message):
        Settings(**fields).check(262)


def test_settings_at_their_limits_are_fine():
    Settings().check(262)
    for least in (True, False):
        Settings(
            temperature=0 if least else 100,
            top_p=1e-9 if least else 1,
            top_k=0 if least else 2**31 - 1,
            min_p=0 if least else 1,
            seed=-(2**63) if least else 2**63 - 1,
            repetition_penalty=0.01 if least else 100,
            presence_penalty=-2 if least else 2,
            frequency_penalty=-2 if least else 2,
            logit_bias={0: -100, 261: 100},
            logprobs=0 if least else 20,
            typical_threshold=0 if least else 1,
            typical_alpha=0 if least else 1,
        ).check(262)
