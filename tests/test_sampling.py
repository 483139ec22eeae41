import torch

from medusa_ray.medusa.sampling import Sampling, choose, gumbel, keep_likely

CPU = torch.device("cpu")


def test_sampled_tokens_follow_the_softmax():
    logits_V = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    num_draws = 60_000
    position_BN = torch.arange(num_draws)[None]
    sampling = Sampling.of([0.7], [1.0], [0], [5], CPU)
    drawn_N = choose(logits_V.expand(1, num_draws, -1), position_BN, sampling)[0]
    seen_V = drawn_N.bincount(minlength=5).double()
    expected_V = (logits_V / 0.7).softmax(-1).double() * num_draws
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


def test_top_p_and_top_k_keep_the_likely_tokens_only():
    scores_BNV = torch.log(torch.tensor([[[0.1, 0.5, 0.25, 0.15]]]))

    def kept(top_p: float, top_k: int) -> list[int]:
        out = keep_likely(scores_BNV, torch.tensor([top_p]), torch.tensor([top_k]))
        return out[0, 0].isfinite().nonzero().flatten().tolist()

    assert kept(1.0, 0) == [0, 1, 2, 3]
    assert kept(1.0, 2) == [1, 2]
    assert kept(0.7, 0) == [1, 2]
    assert kept(0.76, 0) == [1, 2, 3]
    assert kept(1e-9, 0) == [1]


def test_greedy_rows_stay_greedy_beside_sampled_ones():
    logits_BNV = torch.randn(2, 40, 100, generator=torch.Generator().manual_seed(0))
    position_BN = torch.arange(40).expand(2, -1)
    token_BN = choose(logits_BNV, position_BN, Sampling.of([0.0, 5.0], [1.0, 1.0], [0, 0], [1, 1], CPU))
    assert token_BN[0].equal(logits_BNV[0].argmax(-1))
    assert not token_BN[1].equal(logits_BNV[1].argmax(-1))
