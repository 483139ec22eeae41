"""Prompts -> tokens: a continuous batch that proposes a tree, verifies it, and commits what the base agrees with.

Each step asks the heads for guesses at the last committed hidden state, runs the base once over root and guesses,
walks down the tree as far as the base itself would have gone, and moves that walk's keys and values into place.
The baseline is the same loop with an empty tree. Greedy and seeded replies are the same with any tree.

# B running sequences   N tree nodes   D tokens of a walk   H heads   K ranks   T prompt tokens   S slots
# C hidden   V vocab
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_ray.medusa.acceptance import walk
from medusa_ray.medusa.attention import Step
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.cache import PagedCache
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.sampling import Sampling, choose
from medusa_ray.medusa.scheduler import Request, Scheduler, Sequence
from medusa_ray.medusa.tree import RankPath, Tree

PREFILL_TOKENS = 4096  # of one prefill pass, padding included


@dataclass(frozen=True)
class Delta:
    """What one step added to one reply."""

    token_ids: list[int]
    finish_reason: str | None  # stop | length | cancelled
    num_steps: int  # so far, the prefill left out
    accepted_histogram: list[int]  # [j]: steps so far that committed j guesses


@dataclass(frozen=True)
class Completion:
    """A whole reply, its end-of-sequence token included when it ended so."""

    token_ids: list[int]
    finish_reason: str
    num_steps: int
    accepted_histogram: list[int]
    hidden_TC: Tensor | None  # the state that produced each token, when captured


@dataclass
class Counters:
    """Totals since the engine was loaded, under vLLM's names."""

    num_drafts: int = 0  # steps of a sequence that had guesses
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    num_generated_tokens: int = 0
    num_steps: int = 0  # steps of a sequence, guesses or not
    num_prompt_tokens: int = 0


@dataclass
class Batch:
    """State of the running sequences on the device, a row each."""

    root_B: Tensor
    hidden_BC: Tensor  # at the token before the root
    length_B: Tensor  # tokens in the cache; the root's position
    table_BP: Tensor
    sampling: Sampling


class Engine:
    """One base, its heads and a tree. Not for use from several threads, but for `stream` and `cancel`."""

    def __init__(
        self,
        backbone: Backbone,
        heads: MedusaHeads | None = None,
        tree: Tree | None = None,
        max_batch_size: int = 16,
        max_total_tokens: int = 2048,
    ) -> None:
        """Raises ValueError when base, heads and tree do not fit together."""
        tree = tree or (Tree.chain(heads.num_heads) if heads else Tree())
        _check_fit(backbone, heads, tree)
        self.backbone, self.heads = backbone, heads
        self.tree = tree.to(backbone.device)
        self.max_total_tokens = min(max_total_tokens, backbone.max_positions)
        pages = PagedCache.pages_for(self.max_total_tokens + len(tree)) * max_batch_size
        self.cache = PagedCache(
            backbone.num_layers, pages, backbone.kv_heads, backbone.head_size, backbone.dtype, backbone.device
        )
        self.scheduler = Scheduler(self.cache, max_batch_size, num_slack=len(tree))
        self.counters = Counters(num_accepted_tokens_per_pos=[0] * tree.depth)
        self.failure: Exception | None = None
        self._batch: Batch | None = None
        self._depths = tree.depth_N.tolist()
        # Walks that already stand in a row need no moving; a chain's all do.
        self._in_place = [
            walked.tolist()[: d + 1] == [*range(d + 1)]
            for walked, d in zip(tree.walk_ND, self._depths, strict=True)
        ]
        self._readers: dict[Sequence, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Delta | Exception]]] = {}
        self._thread: threading.Thread | None = None

    @classmethod
    def load(
        cls,
        base: str | Path | PreTrainedModel,
        heads: str | Path | MedusaHeads | None = None,
        tree: Tree | Rows[Rows[int]] | str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        max_batch_size: int = 16,
        max_total_tokens: int = 2048,
        revision: str | None = None,
    ) -> "Engine":
        """The engine of a base and its heads.

        base: folder, hub name or loaded model, which it takes over. heads: folder or module, None for the baseline.
        tree: a Tree, rank paths, "chain", or None for the heads' own tree.json (a chain when there is none).
        max_total_tokens: longest prompt plus reply. Raises ValueError for what cannot be served.
        """
        torch_dtype = getattr(torch, dtype)
        if isinstance(base, PreTrainedModel):
            backbone = Backbone(base)
        else:
            backbone = Backbone.load(str(base), torch_dtype, device, revision)
        folder = None if isinstance(heads, MedusaHeads) or heads is None else Path(heads)
        if folder is not None:
            heads = MedusaHeads.load(folder, dtype=torch_dtype, device=device)
        assert heads is None or isinstance(heads, MedusaHeads)
        if heads is not None:
            if heads.layout == "shared":
                heads.init_from(backbone.output_weight_VC)
            heads = heads.to(backbone.device, backbone.dtype).eval().requires_grad_(False)
        return cls(backbone, heads, _as_tree(tree, heads, folder), max_batch_size, max_total_tokens)

    # ------------------------------------------------------------------------------------------- one step

    def step(self) -> list[tuple[Sequence, Delta]]:
        """Takes in those that wait, then moves every running sequence on by one pass of the base."""
        return self._take_in() + self._move_on()

    @torch.inference_mode()
    def _take_in(self) -> list[tuple[Sequence, Delta]]:
        """The first token of each sequence that joins."""
        joined = self.scheduler.admit()
        deltas = [delta for group in self._groups(joined) for delta in self._prefill(group)]
        self._drop(self.scheduler.release())
        return deltas

    @torch.inference_mode()
    def _move_on(self) -> list[tuple[Sequence, Delta]]:
        if self._batch is None:
            return []
        token_BN = self._propose(self._batch)
        target_BN, hidden_BNC = self._verify(self._batch, token_BN)
        deltas = self._commit(self._batch, token_BN, target_BN, hidden_BNC)
        self._drop(self.scheduler.release())
        return deltas

    def _propose(self, batch: Batch) -> Tensor:
        """Token of each node: the root, then the heads' guesses."""
        if self.heads is None or len(self.tree) == 1:
            return batch.root_B[:, None]
        guess_BHK = self.heads.topk(batch.hidden_BC, self.tree.num_ranks)
        return torch.cat([batch.root_B[:, None], guess_BHK.flatten(1)], 1)[:, self.tree.guess_N]

    def _verify(self, batch: Batch, token_BN: Tensor) -> tuple[Tensor, Tensor]:
        """The base's own token after each node, and the hidden states there."""
        position_BN = batch.length_B[:, None] + self.tree.depth_N
        logits_BNV, hidden_BNC = self.backbone.forward(token_BN, self._tree_step(batch, position_BN))
        return choose(logits_BNV, position_BN + 1, batch.sampling), hidden_BNC

    def _commit(
        self, batch: Batch, token_BN: Tensor, target_BN: Tensor, hidden_BNC: Tensor
    ) -> list[tuple[Sequence, Delta]]:
        """Takes the agreed tokens into each sequence and its keys and values into their place."""
        node_B, committed_BD = walk(token_BN, target_BN, self.tree)
        rows = torch.cat([node_B[:, None], committed_BD], 1).tolist()  # the one sync of this step
        if not all(self._in_place[node] for node, *_ in rows):
            self._compact(batch, node_B)
        depth_B = self.tree.depth_N[node_B]
        batch.length_B = batch.length_B + depth_B + 1
        batch.root_B = committed_BD.gather(1, depth_B[:, None])[:, 0]
        batch.hidden_BC = hidden_BNC[torch.arange(len(rows), device=node_B.device), node_B]
        deltas = []
        for row, (sequence, (node, *committed)) in enumerate(zip(self.scheduler.running, rows, strict=True)):
            taken = sequence.extend(committed[: self._depths[node] + 1])
            if sequence.request.capture_hidden:
                sequence.hidden_parts.append(hidden_BNC[row, self.tree.walk_ND[node, : len(taken)]])
            self._count(sequence, len(taken))
            deltas.append((sequence, _delta(sequence, taken)))
        return deltas

    def _tree_step(self, batch: Batch, position_BN: Tensor) -> Step:
        """Nodes stand behind the context, in their order; each sees the context, its ancestors and itself."""
        num_nodes = len(self.tree)
        longest = max(sequence.num_cached for sequence in self.scheduler.running) + num_nodes
        slot_S = torch.arange(longest, device=position_BN.device)
        read_BS = self.cache.slots(batch.table_BP, slot_S.expand(len(position_BN), -1))
        node_BN = batch.length_B[:, None] + torch.arange(num_nodes, device=position_BN.device)
        behind_BS = (
            slot_S - batch.length_B[:, None]
        )  # negative in the context, else the node that stands there
        is_node_BS = (behind_BS >= 0) & (behind_BS < num_nodes)
        inner_BS = behind_BS.clamp(0, num_nodes - 1)
        visible_BNS = None
        if len(position_BN) > 1 or num_nodes > 1:
            among_nodes_BNS = self.tree.mask_NN.T[inner_BS].transpose(1, 2) & is_node_BS[:, None]
            visible_BNS = (behind_BS < 0)[:, None] | among_nodes_BNS
        return Step(
            self.cache,
            write_BT=read_BS.gather(1, node_BN),
            read_BS=read_BS,
            visible_BTS=visible_BNS,
            position_BT=position_BN,
            position_BS=torch.where(
                is_node_BS, batch.length_B[:, None] + self.tree.depth_N[inner_BS], slot_S
            ),
        )

    def _compact(self, batch: Batch, node_B: Tensor) -> None:
        walk_BD = self.tree.walk_ND[node_B]
        place_D = torch.arange(walk_BD.shape[1], device=node_B.device)
        # The last node of a short walk is repeated, and lands where the next step writes anyway.
        from_BD = self.cache.slots(batch.table_BP, batch.length_B[:, None] + walk_BD)
        to_BD = self.cache.slots(batch.table_BP, batch.length_B[:, None] + place_D)
        self.cache.compact(from_BD, to_BD)

    # ------------------------------------------------------------------------------- joining and leaving

    def _groups(self, joined: list[Sequence]) -> list[list[Sequence]]:
        """Prefill passes of like lengths, each of bounded size."""
        groups: list[list[Sequence]] = []
        for sequence in sorted(joined, key=lambda s: len(s.request.prompt_ids)):
            longest = len(sequence.request.prompt_ids)
            if groups and (len(groups[-1]) + 1) * longest <= PREFILL_TOKENS:
                groups[-1].append(sequence)
            else:
                groups.append([sequence])
        return groups

    def _prefill(self, group: list[Sequence]) -> list[tuple[Sequence, Delta]]:
        """Runs the prompts of a group and adds their rows to the batch. Prompts are padded on the left, so that every
        row's last token is the last column."""
        device = self.backbone.device
        prompts = [sequence.request.prompt_ids for sequence in group]
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        token_BT = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        length_B = torch.tensor(lengths, device=device)
        slot_S = torch.arange(longest, device=device)
        column_BT = slot_S - (longest - length_B)[:, None]
        position_BT = column_BT.clamp_min(0)
        table_BP = self.cache.page_table([sequence.pages for sequence in group])
        step = Step(
            self.cache,
            # Padding goes to slot 0, which is the null page's.
            write_BT=torch.where(column_BT < 0, 0, self.cache.slots(table_BP, position_BT)),
            read_BS=self.cache.slots(table_BP, slot_S.expand(len(group), -1)),
            visible_BTS=slot_S <= position_BT[..., None],
            position_BT=position_BT,
            position_BS=slot_S.expand(len(group), -1),
        )
        logits_B1V, hidden_B1C = self.backbone.forward(token_BT, step, last_only=True)
        sampling = _sampling(group, device)
        root_B1 = choose(logits_B1V, length_B[:, None], sampling)
        self._join(root_B1[:, 0], hidden_B1C[:, 0], length_B, group)
        deltas = []
        for sequence, root, hidden_C in zip(group, root_B1[:, 0].tolist(), hidden_B1C[:, 0], strict=True):
            taken = sequence.extend([root])
            if sequence.request.capture_hidden:
                sequence.hidden_parts.append(hidden_C[None])
            self.counters.num_prompt_tokens += len(sequence.request.prompt_ids)
            self.counters.num_generated_tokens += 1
            deltas.append((sequence, _delta(sequence, taken)))
        return deltas

    def _join(self, root_B: Tensor, hidden_BC: Tensor, length_B: Tensor, group: list[Sequence]) -> None:
        running = self.scheduler.running
        if self._batch is not None:
            root_B = torch.cat([self._batch.root_B, root_B])
            hidden_BC = torch.cat([self._batch.hidden_BC, hidden_BC])
            length_B = torch.cat([self._batch.length_B, length_B])
        # Groups join in another order than they were admitted in; rows follow the batch.
        settled = running[: len(root_B) - len(group)]
        rest = [s for s in running[len(settled) :] if s not in group]
        self.scheduler.running = [*settled, *group, *rest]
        self._rebuild(root_B, hidden_BC, length_B, [*settled, *group])

    def _drop(self, stay: list[int]) -> None:
        """Keeps the rows that stay."""
        batch = self._batch
        if batch is None or len(stay) == len(batch.root_B):
            return
        rows = torch.tensor(stay, dtype=torch.long, device=self.backbone.device)
        self._rebuild(batch.root_B[rows], batch.hidden_BC[rows], batch.length_B[rows], self.scheduler.running)

    def _rebuild(
        self, root_B: Tensor, hidden_BC: Tensor, length_B: Tensor, sequences: list[Sequence]
    ) -> None:
        self._batch = None
        if sequences:
            table_BP = self.cache.page_table([sequence.pages for sequence in sequences])
            sampling = _sampling(sequences, self.backbone.device)
            self._batch = Batch(root_B, hidden_BC, length_B, table_BP, sampling)

    def _count(self, sequence: Sequence, num_taken: int) -> None:
        accepted = num_taken - 1
        histogram = sequence.accepted_histogram
        histogram += [0] * (accepted + 1 - len(histogram))
        histogram[accepted] += 1
        sequence.num_steps += 1
        totals = self.counters
        totals.num_steps += 1
        totals.num_generated_tokens += num_taken
        if len(self.tree) > 1:
            totals.num_drafts += 1
            totals.num_draft_tokens += len(self.tree) - 1
            totals.num_accepted_tokens += accepted
            for position in range(accepted):
                totals.num_accepted_tokens_per_pos[position] += 1

    # ------------------------------------------------------------------------------------------- requests

    def check(self, request: Request) -> None:
        """Raises ValueError when the request can never be served."""
        length, limit = len(request.prompt_ids), self.max_total_tokens
        if not length:
            raise ValueError("the prompt has no tokens; send at least one.")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {request.max_new_tokens}; expected at least 1.")
        if length + request.max_new_tokens > limit:
            raise ValueError(
                f"the prompt has {length} tokens and {request.max_new_tokens} new ones are asked for, together "
                f"{length + request.max_new_tokens}; the limit is {limit}. Shorten the prompt or ask for fewer."
            )
        if max(request.prompt_ids) >= self.backbone.vocab_size or min(request.prompt_ids) < 0:
            raise ValueError(f"the prompt has token ids outside 0 ... {self.backbone.vocab_size - 1}.")

    def add(self, request: Request) -> Sequence:
        """Queues a request. Raises ValueError when it can never be served, RuntimeError when the engine has failed."""
        self.check(request)
        if self.failure is not None:
            raise RuntimeError(f"the engine has failed: {self.failure}")
        sequence = Sequence(request, self.eos_ids)
        self.scheduler.add(sequence)
        return sequence

    def generate(
        self,
        prompts: Rows[list[int]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | Rows[int] | None = None,
        ignore_eos: bool = False,
        capture_hidden: bool = False,
    ) -> list[Completion]:
        """Continues every prompt, in one continuous batch; `seed` is for all prompts or one for each.

        Raises ValueError when a prompt can never be served.
        """
        seeds = [seed] * len(prompts) if isinstance(seed, int) or seed is None else list(seed)
        requests = [
            Request(prompt, max_new_tokens, temperature, top_p, top_k, s, (), ignore_eos, capture_hidden)
            for prompt, s in zip(prompts, seeds, strict=True)
        ]
        for request in requests:
            self.check(request)
        sequences = [self.add(request) for request in requests]
        while not all(sequence.finish_reason for sequence in sequences):
            self.step()
        return [_completion(sequence) for sequence in sequences]

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        """One Delta per step; leaving early cancels the request. Raises as `add` does, before the first Delta."""
        sequence = self.add(request)
        queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self._readers[sequence] = (asyncio.get_running_loop(), queue)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="medusa-engine", daemon=True)
            self._thread.start()
        try:
            while True:
                delta = await queue.get()
                if isinstance(delta, Exception):
                    raise delta
                yield delta
                if delta.finish_reason:
                    return
        finally:
            self._readers.pop(sequence, None)
            sequence.is_cancelled = True  # the next step lets it go, if it has not ended by itself

    def _serve(self) -> None:
        """Body of the engine's thread: steps while there is work, and sleeps while there is none."""
        while self.failure is None:
            self.scheduler.work.wait()
            try:
                self._send(self._take_in())  # at once: a first token is not to wait for a step it has no part in
                self._send(self._move_on())
            except Exception as error:
                self.failure = error
                failed = RuntimeError(f"the engine has failed: {error}")
                self._send([(sequence, failed) for sequence in list(self._readers)])

    def _send(self, items: Rows[tuple[Sequence, Delta | Exception]]) -> None:
        """To those that read a stream, waking each event loop once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Any], Any]]] = {}
        for sequence, item in items:
            if reader := self._readers.get(sequence):
                by_loop.setdefault(reader[0], []).append((reader[1], item))
        for loop, waiting in by_loop.items():
            loop.call_soon_threadsafe(_put_all, waiting)

    # ------------------------------------------------------------------------------------------- facts

    @property
    def model(self) -> PreTrainedModel:
        return self.backbone.model

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.backbone.eos_ids

    @property
    def hidden_size(self) -> int:
        return self.backbone.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.backbone.vocab_size

    @property
    def num_heads(self) -> int:
        return self.heads.num_heads if self.heads else 0

    @property
    def num_nodes(self) -> int:
        """Guesses of a step."""
        return len(self.tree) - 1

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)


def _check_fit(backbone: Backbone, heads: MedusaHeads | None, tree: Tree) -> None:
    if heads is None:
        if tree.paths:
            raise ValueError(f"a tree of {len(tree.paths)} guesses needs heads, but none were given.")
        return
    for what, ours, theirs in (
        ("hidden size", heads.hidden_size, backbone.hidden_size),
        ("vocabulary", heads.vocab_size, backbone.vocab_size),
    ):
        if ours != theirs:
            raise ValueError(
                f"the heads have a {what} of {ours}, but the base has {theirs}: they were trained for another base."
            )
    if tree.depth > heads.num_heads:
        raise ValueError(
            f"the tree is {tree.depth} deep, but there are only {heads.num_heads} heads; shorten its paths."
        )
    if tree.num_ranks > heads.vocab_size:
        raise ValueError(
            f"the tree asks for rank {tree.num_ranks - 1} of a vocabulary of {heads.vocab_size}."
        )


def _as_tree(tree: Any, heads: MedusaHeads | None, folder: Path | None) -> Tree | None:
    """What the caller named, or None for the default."""
    if isinstance(tree, Tree):
        return tree
    if tree == "chain":
        return Tree.chain(heads.num_heads) if heads else Tree()
    if isinstance(tree, str):
        raise ValueError(f'tree is {tree!r}; expected "chain", rank paths or a Tree.')
    if tree is not None:
        paths: list[RankPath] = [tuple(path) for path in tree]
        return Tree.from_paths(paths)
    file = folder / "tree.json" if folder else None
    return Tree.load(file) if file is not None and file.exists() else None


def _sampling(sequences: list[Sequence], device: torch.device) -> Sampling:
    requests = [sequence.request for sequence in sequences]
    return Sampling.of(
        [r.temperature for r in requests],
        [r.top_p for r in requests],
        [r.top_k for r in requests],
        [sequence.seed for sequence in sequences],
        device,
    )


def _delta(sequence: Sequence, taken: list[int]) -> Delta:
    return Delta(taken, sequence.finish_reason, sequence.num_steps, list(sequence.accepted_histogram))


def _completion(sequence: Sequence) -> Completion:
    hidden_TC = torch.cat(sequence.hidden_parts) if sequence.hidden_parts else None
    assert sequence.finish_reason is not None
    return Completion(
        sequence.token_ids, sequence.finish_reason, sequence.num_steps, sequence.accepted_histogram, hidden_TC
    )


def _put_all(items: list[tuple[asyncio.Queue[Any], Any]]) -> None:
    for queue, delta in items:
        queue.put_nowait(delta)
