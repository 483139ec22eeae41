"""Tokens that wait -> how many replicas there should be.

Ray Serve scales by requests unless a file's `autoscaling_config.policy` names something else. Where prompts and replies
differ much in length, requests say little of the work ahead.
"""

import math
from typing import Any

WAITING_TOKENS = "waiting_tokens"  # what replicas report: Engine.num_waiting_tokens


class ByWaitingTokens:
    """As many replicas as it takes for each to have no more than so many tokens ahead.

    Ray Serve pickles this class by value into its controller, so it needs nothing beyond this module. Delays, factors
    and the least and most replicas are of the same `autoscaling_config` and come on top.
    """

    def __init__(self, target_waiting_tokens: float = 8192) -> None:
        if not target_waiting_tokens > 0:
            raise ValueError(
                f"target_waiting_tokens is {target_waiting_tokens}; expected more than 0, such as half of "
                "max_batch_size x max_total_tokens."
            )
        self.target_waiting_tokens = target_waiting_tokens

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """context: ray.serve.config.AutoscalingContext."""
        reported = (context.aggregated_metrics or {}).get(WAITING_TOKENS, {})
        wanted = math.ceil(sum(reported.values()) / self.target_waiting_tokens)
        # A request on its way to a replica has tokens that nobody has counted yet, and must not find the last one gone.
        return max(wanted, context.total_num_requests > 0), {}
