"""Logits -> scores: what a request wants done to the base's logits, at each node with the history of its own path.

A penalty or a grammar depends on the tokens so far, and those differ from node to node: a node's are the reply up to
the root, then the guesses on the way to it. With one history for the whole tree a guess would be judged by other
scores than the baseline gives it, and replies would depend on the guesses.

The order is vLLM's, which is also transformers' but for min_p: logit_bias, penalties (repetition, frequency, presence),
allowed tokens; then, for sampled requests, temperature, min_p, top_k, top_p. The first three change which token is
best, so greedy requests have them too; the others never do. Bias comes before the penalties so that a biased token is
penalised like any other; temperature before the filters, since top_p and min_p are about the chances that tokens are
drawn with; and top_p last, of what the others keep (transformers has min_p last).

# B requests   N tree nodes   V vocab   D depth + 1   T tokens
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_ray.medusa.sampling import AllowedTokens, Penalties, Sampling
from medusa_ray.medusa.tree import Tree


@dataclass(frozen=True)
class History:
    """Which tokens each row has seen, for the penalties."""

    in_prompt_BV: Tensor
    count_BV: Tensor  # times in the reply so far, the root included

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        replies: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
    ) -> "History":
        count_BV = _count(replies, vocab_size, device)
        return cls(_count(prompts, vocab_size, device) > 0, count_BV)

    def add(self, committed_BD: Tensor, num_B: Tensor) -> None:
        """Counts the first num_B tokens of each row in, in place."""
        place_D = torch.arange(committed_BD.shape[1], device=committed_BD.device)
        counts_BD = (place_D < num_B[:, None]) & (committed_BD >= 0)
        self.count_BV.scatter_add_(1, committed_BD.clamp_min(0), counts_BD.to(self.count_BV.dtype))


def _count(rows: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Tensor:
    row_T = torch.tensor(
        [row for row, tokens in enumerate(rows) for _ in tokens], dtype=torch.long, device=device
    )
    token_T = torch.tensor([token for tokens in rows for token in tokens], dtype=torch.long, device=device)
    count_BV = torch.zeros(len(rows), vocab_size, dtype=torch.int32, device=device)
    return count_BV.index_put_((row_T, token_T), torch.ones_like(token_T, dtype=torch.int32), accumulate=True)


def process(
    logits_BNV: Tensor,
    token_BN: Tensor,
    tree: Tree,
    sampling: Sampling,
    history: History | None = None,
    allowed_BNV: Tensor | None = None,
) -> Tensor:
    """Scores [B, N, V] of the token after each node; their softmax is what sampled requests draw from.

    token_BN: token at each node, the root's first. history and allowed_BNV (allowed_masks') are needed when the
    sampling is penalised and masked. The logits themselves come back when there is nothing to do.
    """
    scores_BNV = logits_BNV
    if sampling.bias_BV is not None:
        scores_BNV = scores_BNV.float() + sampling.bias_BV[:, None]
    if sampling.penalties is not None:
        assert history is not None, "penalties need a history"
        scores_BNV = penalise(scores_BNV.float(), token_BN, tree, sampling.penalties, history)
    if sampling.is_masked:
        assert allowed_BNV is not None, "a masked batch needs allowed_masks"
        scores_BNV = scores_BNV.masked_fill(~allowed_BNV, -torch.inf)
    if sampling.is_greedy:
        return scores_BNV
    scores_BNV = scores_BNV.float() / sampling.temperature_B[:, None, None]
    if sampling.min_p_B is not None:
        floor_BN1 = scores_BNV.amax(-1, keepdim=True) + sampling.min_p_B.log()[:, None, None]
        scores_BNV = scores_BNV.masked_fill(scores_BNV < floor_BN1, -torch.inf)
    if sampling.top_k_B is not None or sampling.top_p_B is not None:
        scores_BNV = keep_likely(scores_BNV, sampling.top_k_B, sampling.top_p_B)
    return scores_BNV


def penalise(
    scores_BNV: Tensor, token_BN: Tensor, tree: Tree, penalties: Penalties, history: History
) -> Tensor:
    """Scores less the penalties of each node's own history.

    All nodes of a row share the history up to the root, so that is one pass over the vocabulary. The few tokens of
    each node's path are then done again, from their unpenalised scores.
    """
    path_BND = token_BN[:, tree.walk_ND]
    depth_D = torch.arange(path_BND.shape[-1], device=token_BN.device)
    # The root is in the history already, and what is deeper than the node is padding.
    is_guess_ND = (depth_D > 0) & (depth_D <= tree.depth_N[:, None])
    more_BND = ((path_BND[..., None, :] == path_BND[..., None]) & is_guess_ND[:, None]).sum(-1)

    flat_BX = path_BND.flatten(1)
    count_BND = history.count_BV.gather(1, flat_BX).view_as(path_BND) + more_BND
    in_prompt_BND = history.in_prompt_BV.gather(1, flat_BX).view_as(path_BND)
    on_path_BND = _less_penalties(scores_BNV.gather(-1, path_BND), in_prompt_BND, count_BND, penalties)
    shared_BNV = _less_penalties(
        scores_BNV, history.in_prompt_BV[:, None], history.count_BV[:, None], penalties
    )
    return shared_BNV.scatter(-1, path_BND, on_path_BND)


def _less_penalties(
    scores_BNX: Tensor, in_prompt_BNX: Tensor, count_BNX: Tensor, penalties: Penalties
) -> Tensor:
    """Scores of some tokens, which came in the prompt or not, and so many times in the reply."""
    repetition_B11 = penalties.repetition_B[:, None, None]
    # A negative score is multiplied: dividing would make a token that has come more likely.
    repeated_BNX = torch.where(scores_BNX > 0, scores_BNX / repetition_B11, scores_BNX * repetition_B11)
    scores_BNX = torch.where(in_prompt_BNX | (count_BNX > 0), repeated_BNX, scores_BNX)
    scores_BNX = scores_BNX - penalties.frequency_B[:, None, None] * count_BNX
    return scores_BNX - penalties.presence_B[:, None, None] * (count_BNX > 0)


def keep_likely(scores_BNV: Tensor, top_k_B: Tensor | None, top_p_B: Tensor | None) -> Tensor:
    """Scores with all but the likely tokens at -inf: the top_k first, then the smallest set that holds top_p of
    what is left. The most likely token always stays; of equal ones the first."""
    # Stable, so that which of equal tokens stay does not depend on the shape of the batch.
    sorted_BNV, order_BNV = scores_BNV.sort(dim=-1, descending=True, stable=True)
    if top_k_B is not None:
        rank_V = torch.arange(scores_BNV.shape[-1], device=scores_BNV.device)
        limit_B = torch.where(top_k_B > 0, top_k_B, scores_BNV.shape[-1])
        sorted_BNV = sorted_BNV.masked_fill(rank_V >= limit_B[:, None, None], -torch.inf)
    if top_p_B is not None:
        chance_BNV = sorted_BNV.softmax(-1)
        before_BNV = chance_BNV.cumsum(-1) - chance_BNV
        # A top_p of 1 keeps everything: rounding can bring the running sum to 1 before the last token.
        outside_BNV = (before_BNV >= top_p_B[:, None, None]) & (top_p_B < 1)[:, None, None]
        sorted_BNV = sorted_BNV.masked_fill(outside_BNV, -torch.inf)
    return torch.empty_like(scores_BNV).scatter(-1, order_BNV, sorted_BNV)


def allowed_masks(
    grammars: Sequence[AllowedTokens | None],
    replies: Sequence[list[int]],
    ends: Sequence[Container[int]],
    tokens: Sequence[Sequence[int]],
    tree: Tree,
    vocab_size: int,
) -> Tensor:
    """bool [B, N, V] on the host: the tokens that each row's grammar, if it has one, allows after each node.

    replies: tokens of each row up to its root. ends: tokens that end it. tokens: those at its nodes. A node is left
    out, and everything allowed there, when the walk cannot get to it: its token is not allowed, or the reply has ended.
    """
    allowed_BNV = torch.ones(len(grammars), len(tree), vocab_size, dtype=torch.bool)
    parents = tree.parent_N.tolist()
    for row, grammar in enumerate(grammars):
        if grammar is None:
            continue
        allowed_NV = allowed_BNV[row]
        history = {0: replies[row]}  # of each node that the walk can get to
        for node, parent in enumerate(parents):
            token = tokens[row][node]
            if node:
                if parent not in history or token in ends[row] or not allowed_NV[parent, token]:
                    continue
                history[node] = [*history[parent], token]
            allowed_NV[node] = grammar(history[node])
    return allowed_BNV
