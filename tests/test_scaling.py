"""Waiting tokens -> replicas, on contexts made by hand and run through Ray Serve's own bounds and delays."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from medusa_ray.serve.scaling import WAITING_TOKENS, ByWaitingTokens


def context_of(*tokens: float, num_requests: float = 1) -> Any:
    """Of replicas that have so many tokens ahead each."""
    reported = {f"replica {i}": value for i, value in enumerate(tokens)}
    return SimpleNamespace(aggregated_metrics={WAITING_TOKENS: reported}, total_num_requests=num_requests)


@pytest.mark.parametrize(
    ("tokens", "num_requests", "wanted"),
    [
        ((0,), 0, 0),
        ((0,), 1, 1),  # one that is on its way
        ((), 3, 1),
        ((), 0, 0),
        ((1000,), 1, 1),
        ((1001,), 1, 2),
        ((2500, 400), 9, 3),
        ((100, 100, 100), 3, 1),
    ],
)
def test_each_replica_gets_no_more_tokens_than_the_target(
    tokens: tuple[float, ...], num_requests: int, wanted: int
) -> None:
    assert ByWaitingTokens(1000)(context_of(*tokens, num_requests=num_requests)) == (wanted, {})


def test_replicas_that_have_not_reported_yet_have_nothing_to_do() -> None:
    context = SimpleNamespace(aggregated_metrics={}, total_num_requests=0)
    assert ByWaitingTokens(1000)(context) == (0, {})
    context.aggregated_metrics = None
    assert ByWaitingTokens(1000)(context) == (0, {})


@pytest.mark.parametrize("target", [0, -1, float("nan")])
def test_a_target_of_nothing_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="target_waiting_tokens"):
        ByWaitingTokens(target)


def test_ray_serve_takes_the_policy_as_a_file_writes_it() -> None:
    """It is pickled for the controller, which is to import nothing of ours: torch there costs seconds and memory."""
    policy = {
        "policy_function": "medusa_ray.serve.scaling:ByWaitingTokens",
        "policy_kwargs": {"target_waiting_tokens": 500},
    }
    taken = AutoscalingConfig(max_replicas=3, policy=policy).policy
    assert taken.get_policy()(**taken.policy_kwargs)(context_of(1200)) == (3, {})
    elsewhere = (
        "import pickle, sys; sys.modules['medusa_ray'] = None\n"
        "print(pickle.load(sys.stdin.buffer)(500).target_waiting_tokens)"
    )
    command = [sys.executable, "-c", elsewhere]
    done = subprocess.run(command, input=taken.get_serialized_policy_def(), capture_output=True, check=True)
    assert done.stdout.strip() == b"500"
