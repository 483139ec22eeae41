"""Prompts -> tokens: a continuous batch that proposes a tree, verifies it, and commits what the base agrees with.

Each step asks the heads for guesses at the last committed hidden state, runs the base once over root and guesses,
walks down the tree as far as the base itself would have gone, and moves that walk's keys and values into place.
The baseline is the same loop with an empty tree. Greedy and seeded replies are the same with any tree.

# B running sequences   N tree nodes   D tokens of a walk   H heads   K ranks   T prompt tokens   S slots
# C hidden   V vocab
"""

import asyncio
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from collections.abc import Sequence as Rows
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_ray.medusa import allocator, compiled, graphs, guesser
from medusa_ray.medusa.acceptance import decide, unpack
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.base import Quantization
from medusa_ray.medusa.cache import PAGE_SIZE, PagedCache, compact
from medusa_ray.medusa.guesser import Guesser, Heads, TreeLike
from medusa_ray.medusa.heads import MedusaHeads
from medusa_ray.medusa.processors import History, allowed_masks
from medusa_ray.medusa.replies import Completion, Counters, Delta
from medusa_ray.medusa.sampling import Sampling, Settings, is_whole
from medusa_ray.medusa.scheduler import Request, Scheduler, Sequence
from medusa_ray.medusa.sharded import ShardedPass, Shards
from medusa_ray.medusa.sizing import StepTimes, TreeSizer, doublings
from medusa_ray.medusa.tree import MAX_GUESSES, Tree
from medusa_ray.medusa.treepass import Ahead, Outcome, TreePass, advance

log = logging.getLogger("medusa_ray")

PREFILL_TOKENS = 1024  # of one prefill pass, padding included; running sequences wait for it
# Where steps are timed: cached tokens of a row, and of how many passes the fastest counts.
MEASURED_CONTEXT, REPEATS = 128, 4


@dataclass
class Batch:
    """State of the running sequences on the device, a row each."""

    ahead: Ahead
    table_BP: Tensor
    sampling: Sampling
    history: History | None  # when the sampling is penalised

    @property
    def waits_for_host(self) -> bool:
        """Whether the host must have read a step before the next: grammars and penalties go by its tokens."""
        return self.sampling.is_masked or self.history is not None


@dataclass
class Launched:
    """A step that the device has been given and the host has not read."""

    sequences: list[Sequence]  # of its rows
    tree: Tree
    sizer: TreeSizer | None  # that picked it
    verdict_BX: Tensor  # on the host; good once `event`, if there is one, has come
    hidden_BDC: Tensor | None  # of the walks, when some request keeps them
    event: torch.cuda.Event | None

    def rows(self) -> list[list[float]]:
        if self.event is not None:
            self.event.synchronize()  # the one sync of a step
        return self.verdict_BX.tolist()


@dataclass
class Coming:
    """A guesser on its way in: what its steps take is measured by and by, and somebody waits for it."""

    guesser: Guesser
    times: StepTimes
    timing: Iterator[None]  # fills `times`
    taken_over: Future[None] = field(default_factory=Future)


class Engine:
    """One base, its heads and a tree. Not for use from several threads, but for `stream`, `cancel` and `swap`."""

    def __init__(
        self,
        backbone: Backbone,
        heads: MedusaHeads | None = None,
        tree: Tree | None = None,
        max_batch_size: int = 16,
        max_total_tokens: int = 2048,
        is_adaptive: bool = False,
        shares_prefixes: bool = True,
        max_waiting: int | None = None,
        lags: bool | None = None,
        shards: Shards | None = None,
    ) -> None:
        """is_adaptive: steps take as much of the tree as pays at the load. shares_prefixes: prompts that begin alike
        share what the base computed of that; when measuring, the second time of a prompt would flatter. max_waiting:
        requests that `add` takes beyond max_batch_size; None for any number. lags: the host reads a step once the
        next is launched, so that neither waits for the other; None for where the device runs by itself. shards: of the
        base, whose backbone is this process's part of it; the other processes `follow`.

        Raises ValueError when base, heads and tree do not fit together, before memory is taken for them.
        """
        _check_counts(max_batch_size, max_total_tokens, max_waiting)
        self.guesser = Guesser.of(backbone, heads, tree, is_adaptive)
        if backbone.rope_limit is not None and max_total_tokens > backbone.rope_limit:
            raise ValueError(
                f"max_total_tokens is {max_total_tokens}, but beyond {backbone.rope_limit} the RoPE frequencies of "
                f"{type(backbone.model).__name__} follow the longest sequence of the batch, so that a reply would "
                f"depend on its neighbours. Set max_total_tokens to at most {backbone.rope_limit}."
            )
        if backbone.device.type == "cpu":
            allocator.keep_freed_memory()
        self.backbone = backbone
        self.sizer: TreeSizer | None = None
        self.max_total_tokens = min(max_total_tokens, backbone.max_positions)
        self.lags = backbone.device.type == "cuda" if lags is None else lags
        num_slack = self._num_slack(self.tree)
        pages = PagedCache.pages_for(self.max_total_tokens + num_slack) * max_batch_size
        self.cache = PagedCache(backbone.kv_shapes, pages, backbone.dtype, backbone.device, shares_prefixes)
        self.scheduler = Scheduler(self.cache, max_batch_size, num_slack, max_waiting)
        self.counters = Counters(num_accepted_tokens_per_pos=[0] * self.tree.depth)
        self.failure: Exception | None = None  # whoever finds one sets it, and the engine's thread ends
        self.last_step_s = -math.inf  # when its thread last came to the end of one, on the monotonic clock
        self._pass: compiled.Pass = TreePass(backbone)
        self._compact = compact
        if shards is not None:
            self._pass = sharded_pass = ShardedPass(backbone, self.cache, shards)
            self._compact = sharded_pass.compact
        self._built: compiled.Pass | None = None  # compiled, and not yet adopted
        self.mode = "eager"
        self._batch: Batch | None = None
        self._is_short = False  # some running row has pages for a smaller tree than this one
        self._unread: deque[Launched] = deque()
        self._node_N = torch.arange(max(MAX_GUESSES + 1, max_batch_size), device=backbone.device)
        self._is_greedy = {flag: torch.tensor(flag, device=backbone.device) for flag in (False, True)}
        self._readers: dict[Sequence, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Delta | Exception]]] = {}
        self._thread: threading.Thread | None = None
        self._coming: Coming | None = None
        self._starting, self._swapping = threading.Lock(), threading.Lock()  # once, and one at a time

    @classmethod
    def load(
        cls,
        base: str | Path | PreTrainedModel,
        heads: Heads = None,
        tree: TreeLike = None,
        device: str = "cpu",
        dtype: str = "float32",
        max_batch_size: int = 16,
        max_total_tokens: int = 2048,
        revision: str | None = None,
        compile: Literal["no", "wait", "background"] = "no",
        shares_prefixes: bool = True,
        max_waiting: int | None = None,
        quantization: Quantization = "none",
        shards: Shards | None = None,
    ) -> "Engine":
        """The engine of a base and its heads.

        base: folder, hub name or loaded model, which it takes over; an adapter is merged into its own base. heads:
        folder or module, None for the baseline.
        tree: a Tree, rank paths, "chain", None for the heads' own tree.json (a chain when there is none), or "auto" for
        as much of that as pays at the load.
        max_total_tokens: longest prompt plus reply. compile: "wait" for the compiled pass of a base that is a folder
        or hub name, which takes a while the first time, or build it in the "background"; on a GPU, either waits for
        graphs of it. Where there is none the engine runs eagerly, and `mode` says so. shares_prefixes, max_waiting,
        shards as in Engine(). Raises ValueError for what cannot be served.
        """
        # Now, rather than after minutes of loading.
        _check_counts(max_batch_size, max_total_tokens, max_waiting)
        torch_dtype = getattr(torch, dtype)
        if isinstance(base, PreTrainedModel):
            if compile != "no":
                raise ValueError(
                    f"compile is {compile!r}, but the base is a loaded {type(base).__name__}, and a pass is built "
                    'from a folder or hub name. Give one of these, or set compile to "no".'
                )
            backbone = Backbone(base)
        else:
            num_shards = shards.num if shards else 1
            backbone = Backbone.load(str(base), torch_dtype, device, revision, quantization, num_shards)
        engine = cls(
            backbone,
            *guesser.load(backbone, heads, tree),
            max_batch_size,
            max_total_tokens,
            tree == "auto",
            shares_prefixes,
            max_waiting,
            shards=shards,
        )
        # A GPU's pass is built of the engine's own model, so no step can run meanwhile.
        is_in_background = compile == "background" and backbone.device.type != "cuda"
        if compile != "no" and not is_in_background:
            engine.compile(str(base), dtype, revision)
        if engine.is_adaptive:
            engine.measure()  # now, rather than while the first request waits
        if is_in_background:
            arguments = (str(base), dtype, revision)
            threading.Thread(target=engine._build, args=arguments, name="medusa-compile", daemon=True).start()
        return engine

    def compile(self, base: str, dtype: str, revision: str | None = None) -> None:
        """Replaces the eager pass, between two steps, by the compiled one of the base, a folder or hub name.

        On a GPU, by graphs of it. Where these cannot be had, the engine goes on eagerly and logs why.
        """
        self._build(base, dtype, revision)
        self._adopt()

    def _build(self, base: str, dtype: str, revision: str | None) -> None:
        """What takes long on a CPU; safe there while steps run in another thread."""
        is_on_gpu = self.backbone.device.type == "cuda"
        reason = (graphs if is_on_gpu else compiled).why_not(self.backbone.device.type)
        if isinstance(self._pass, ShardedPass):
            reason = "several processes share the base, and a compiled pass is one process's"
        if reason is None:
            try:
                self._built = self._graphed() if is_on_gpu else compiled.load_or_build(base, dtype, revision)
                return
            except (OSError, RuntimeError) as error:
                reason = str(error)
        log.warning("the engine runs eagerly: %s", reason)

    def _graphed(self) -> graphs.GraphedPass:
        width = PagedCache.pages_for(self.max_total_tokens + self.scheduler.num_slack)
        return graphs.build(self.backbone, doublings(self.scheduler.max_batch_size), width)

    @torch.inference_mode()
    def _adopt(self) -> None:
        """Takes the built pass over, if there is one and it says what the eager one says."""
        if self._built is None:
            return
        built, self._built = self._built, None
        eager, is_graphed = TreePass(self.backbone), isinstance(built, graphs.GraphedPass)
        try:
            apart = compiled.difference(built, eager, self.backbone)
            if not apart <= compiled.TOLERANCE[self.backbone.dtype]:
                name = type(self.model).__name__
                raise RuntimeError(
                    f"the compiled pass of {name} differs from the eager one by {apart:.1g} of its size"
                )
            self._pass, self.mode = built, "graphs" if is_graphed else "compiled"
            if is_graphed:
                self._replay_all()
            self.sizer = None  # what it measured was the eager pass
            if self._coming is not None:
                self._coming.timing = self._arrival(self._coming.guesser, self._coming.times)
        except Exception as error:  # whatever a compiler or a capture raises
            self._pass, self.mode = eager, "eager"
            log.warning("the engine runs eagerly: %s", error)

    def _replay_all(self) -> None:
        """Has the graph of every step captured now, rather than while a request waits, the largest first: the others
        find room in its memory."""
        width = PagedCache.pages_for(len(self.tree))
        for rows in reversed(doublings(self.scheduler.max_batch_size)):
            for tree in (*reversed(self.trees.values()), self.guesser.root_only):
                self._time(self._dummy(rows, 0, width, []), self.guesser, tree, 0)

    # ------------------------------------------------------------------------------------------- one step

    def step(self) -> list[tuple[Sequence, Delta]]:
        """Takes in those that wait, then moves every running sequence on by one pass of the base."""
        return self._take_in() + self._move_on()

    @torch.inference_mode()
    def _take_in(self) -> list[tuple[Sequence, Delta]]:
        """Moves prompts on by one pass; the end of each sequence that is cancelled or late, and the first token of
        each whose prompt this completes."""
        self._adopt()
        self._bring_in()
        deltas = [(sequence, Delta.of(sequence, [], None)) for sequence in self.scheduler.end_early()]
        if deltas:
            self._drop(self.scheduler.release())
        self.scheduler.admit()
        if group := self.scheduler.next_group(PREFILL_TOKENS):
            deltas += self._prefill(group)
        self._drop(self.scheduler.release())
        return deltas

    @torch.inference_mode()
    def _move_on(self) -> list[tuple[Sequence, Delta]]:
        """Moves every running sequence on by one pass over its tree, and takes in what it says, or the one before."""
        if self._batch is None:
            return []
        started, deltas = time.perf_counter(), []
        tree = self._pick_tree()
        if self._is_short:
            tree = self.guesser.within(tree, self._room())
        self._unread.append(self._launch(self._batch, tree))
        num_behind = int(self.lags and not self._batch.waits_for_host)
        while len(self._unread) > num_behind:
            step = self._unread.popleft()
            deltas += self._commit(step)
            if step.sizer is not None:
                # From read to read, which is a step's time also where the next one runs meanwhile.
                started, since = time.perf_counter(), started
                step.sizer.took(len(step.sequences), len(step.tree), started - since)
        # Pages of those that have ended may have new owners at once, although an unread step still writes behind their
        # tokens: the device does what it is given in its order, and whatever the new owners write comes later.
        self._drop(self.scheduler.release())
        return deltas

    def _pick_tree(self) -> Tree:
        """As much of the tree as pays with the sequences that run."""
        running = self.scheduler.running
        num_speculating = sum(sequence.request.speculates for sequence in running)
        if not num_speculating:
            return self.guesser.root_only
        if not self.is_adaptive:
            return self.tree
        sizer = self.sizer or self.measure()
        return self.trees[sizer.pick(len(running), num_speculating / len(running))]

    def _launch(self, batch: Batch, tree: Tree) -> Launched:
        """Gives the device a step, which starts from where the last one has led, whether that is read or not."""
        running = self.scheduler.running
        num_unread = sum(step.tree.depth + 1 for step in self._unread)  # tokens of a row, at most
        longest = max(sequence.num_cached for sequence in running) + num_unread
        outcome = self._try(batch, tree, self.guesser.propose(batch.ahead, tree), longest)
        batch.ahead = Ahead(outcome.root_B, outcome.hidden_BC, outcome.length_B)
        hidden_BDC = None
        if any(sequence.request.capture_hidden for sequence in running):
            # Now, for a graph's next run writes over the states at its nodes.
            walk_BD = tree.walk_ND[outcome.verdict_BX[:, 0].long()]
            hidden_BDC = outcome.hidden_BWC[self._node_N[: len(walk_BD), None], walk_BD]
        verdict_BX = outcome.verdict_BX.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        device = outcome.verdict_BX.device
        event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        return Launched(list(running), tree, self.sizer, verdict_BX, hidden_BDC, event)

    def _try(self, batch: Batch, tree: Tree, token_BN: Tensor, longest: int) -> Outcome:
        """What the base says of the tree, and commits, all on the device. longest: cached tokens, at most."""
        every_BN = self._node_N[: len(tree)].expand(len(token_BN), -1)
        table_BP = batch.table_BP[:, : PagedCache.pages_for(longest + len(tree))]
        outcome = self._run(
            token_BN,
            batch.ahead.length_B,
            table_BP,
            tree.depth_N,
            tree.mask_NN,
            every_BN,
            *tree.shape,
            self._is_greedy[batch.sampling.is_plain],
        )
        if batch.sampling.is_plain:
            return outcome
        logits_BNV, hidden_BNC, *_ = outcome
        allowed_BNV = self._allowed(self.scheduler.running, batch.sampling, token_BN, tree)
        position_BN = batch.ahead.length_B[:, None] + tree.depth_N + 1
        verdict = decide(logits_BNV, token_BN, position_BN, tree, batch.sampling, batch.history, allowed_BNV)
        # To look where the walks end would wait for the device; where it is the host, moving them costs more.
        ends = range(len(tree)) if self.lags else verdict.node_B.tolist()
        if not all(tree.is_in_place[end] for end in ends):
            walk_BD = tree.walk_ND[verdict.node_B]
            self._compact(self.cache.keys, self.cache.values, table_BP, batch.ahead.length_B, walk_BD)
        if batch.history is not None:
            batch.history.add(verdict.committed_BD, tree.depth_N[verdict.node_B] + 1)
        ahead = advance(verdict, hidden_BNC, batch.ahead.length_B, tree.depth_N)
        return Outcome(logits_BNV, hidden_BNC, verdict.pack(), *ahead)

    def _allowed(
        self, sequences: list[Sequence], sampling: Sampling, token_BN: Tensor, tree: Tree
    ) -> Tensor | None:
        """Masks of the tokens that may follow each node, when some request has a grammar, which needs the host."""
        if not sampling.is_masked:
            return None
        masks_BNV = allowed_masks(
            [sequence.request.allowed_tokens for sequence in sequences],
            [sequence.token_ids for sequence in sequences],
            [sequence.end_ids for sequence in sequences],
            token_BN.tolist(),
            tree,
            self.vocab_size,
        )
        return masks_BNV.to(token_BN.device)

    def _run(self, *tensors: Tensor) -> Outcome:
        """One pass; arguments as TreePass.forward takes them."""
        # A compiled pass takes it for granted that tensors are contiguous.
        return Outcome(*self._pass(*(t.contiguous() for t in tensors), self.cache.keys, self.cache.values))

    def _commit(self, step: Launched) -> list[tuple[Sequence, Delta]]:
        """Takes the agreed tokens into each sequence."""
        tree, deltas, ends = step.tree, [], []
        for row, (sequence, packed) in enumerate(zip(step.sequences, step.rows(), strict=True)):
            if sequence.finish_reason:  # since the launch: what came after is nobody's
                continue
            node, committed, logprobs = unpack(packed, tree.depth + 1)
            taken = sequence.extend(committed[: tree.depths[node] + 1])
            if sequence.request.capture_hidden:
                assert step.hidden_BDC is not None
                sequence.hidden_parts.append(step.hidden_BDC[row, : len(taken)].clone())
            num_guesses = len(tree) - 1 if sequence.request.speculates else 0
            sequence.count(num_guesses, len(taken))
            self.counters.count(num_guesses, len(taken))
            deltas.append((sequence, Delta.of(sequence, taken, logprobs)))
            ends += [node] * sequence.request.speculates
        if step.sizer is not None and ends:
            step.sizer.learn(len(tree), ends)
        return deltas

    # ------------------------------------------------------------------------------- joining and leaving

    def _prefill(self, group: list[Sequence]) -> list[tuple[Sequence, Delta]]:
        """Runs the next piece of each prompt of a group, and lets those run that this completes."""
        pieces = [
            sequence.request.prompt_ids[sequence.num_prefilled :][:PREFILL_TOKENS] for sequence in group
        ]
        num_done = [sequence.num_prefilled for sequence in group]
        lengths = [len(piece) for piece in pieces]
        longest, device = max(lengths), self.backbone.device
        # Padding stands on the right, where no node looks, and writes where real tokens or nobody will.
        token_BT = torch.tensor([piece + [0] * (longest - len(piece)) for piece in pieces], device=device)
        done_B, length_B = torch.tensor(num_done, device=device), torch.tensor(lengths, device=device)
        width = PagedCache.pages_for(max(num_done) + longest)
        table_BP = self.cache.page_table([sequence.pages for sequence in group], width)
        place_T = torch.arange(longest, device=device)
        sees_TT = place_T[:, None] >= place_T
        outcome = self._run(
            token_BT,
            done_B,
            table_BP,
            place_T,
            sees_TT,
            length_B[:, None] - 1,
            *self.guesser.root_only.shape,
            self._is_greedy[False],
        )
        for sequence, length in zip(group, lengths, strict=True):
            sequence.num_prefilled += length
        self.counters.num_prompt_tokens += sum(lengths)
        whole = [row for row, sequence in enumerate(group) if not sequence.num_left]
        return self._start(
            [group[row] for row in whole],
            outcome.logits_BWV[whole],
            Ahead(outcome.root_B[whole], outcome.hidden_BC[whole], (done_B + length_B)[whole]),
        )

    def _start(self, group: list[Sequence], logits_B1V: Tensor, ahead: Ahead) -> list[tuple[Sequence, Delta]]:
        """Commits the first token of sequences and adds their rows to the batch. ahead: where all are greedy."""
        if not group:
            return []
        sampling, history = self._sampling(group)
        last_B1 = torch.tensor([s.request.prompt_ids[-1:] for s in group], device=logits_B1V.device)
        allowed_B1V = self._allowed(group, sampling, last_B1, self.guesser.root_only)
        verdict = decide(
            logits_B1V,
            last_B1,
            ahead.length_B[:, None],
            self.guesser.root_only,
            sampling,
            history,
            allowed_B1V,
        )
        deltas = []
        for row, (sequence, packed) in enumerate(zip(group, verdict.pack().tolist(), strict=True)):
            _, root, logprobs = unpack(packed, 1)
            taken = sequence.extend(root)
            if sequence.request.capture_hidden:
                sequence.hidden_parts.append(ahead.hidden_BC[row : row + len(taken)])
            self.counters.num_generated_tokens += len(taken)
            deltas.append((sequence, Delta.of(sequence, taken, logprobs)))
        self.scheduler.start(group)
        ahead = ahead._replace(root_B=verdict.committed_BD[:, 0])
        if self._batch is not None:
            ahead = Ahead(*map(torch.cat, zip(self._batch.ahead, ahead, strict=True)))
        self._rebuild(ahead)
        return deltas

    def _drop(self, stay: list[int]) -> None:
        """Keeps the rows that stay."""
        batch = self._batch
        if batch is None or len(stay) == len(batch.ahead.root_B):
            return
        rows = torch.tensor(stay, dtype=torch.long, device=self.backbone.device)
        self._rebuild(Ahead(*(tensor[rows] for tensor in batch.ahead)))

    def _rebuild(self, ahead: Ahead) -> None:
        """Makes these rows, those of the running sequences, the batch."""
        self._batch = None
        if sequences := self.scheduler.running:
            width = max(len(sequence.pages) for sequence in sequences)
            table_BP = self.cache.page_table([sequence.pages for sequence in sequences], width)
            self._batch = Batch(ahead, table_BP, *self._sampling(sequences))
            self._is_short = any(s.num_slack < self.scheduler.num_slack for s in sequences)
        else:
            self._unread.clear()  # it says nothing of anybody who is still here

    def _sampling(self, sequences: list[Sequence]) -> tuple[Sampling, History | None]:
        """Settings of the rows, and the tokens that the penalised ones have seen."""
        requests, device = [sequence.request for sequence in sequences], self.backbone.device
        sampling = Sampling.of(requests, [sequence.seed for sequence in sequences], self.vocab_size, device)
        if sampling.penalties is None:
            return sampling, None
        prompts = [r.prompt_ids if r.is_penalised else [] for r in requests]
        replies = [s.token_ids if s.request.is_penalised else [] for s in sequences]
        return sampling, History.of(prompts, replies, self.vocab_size, device)

    # ------------------------------------------------------------------------------------------- heads and tree

    def swap(self, heads: Heads = None, tree: TreeLike = None) -> None:
        """Takes these heads and this tree, as `load` does, in place of those it has: between two steps.

        Requests that run go on, with the same replies. What takes long happens here, in the caller's thread, or beside
        the steps, one measured pass after each. Returns once it is done. Safe to call from any thread after `start`;
        before, only from the one that steps. Raises ValueError or OSError when they cannot be had or do not fit, and
        goes on with those it has; RuntimeError when the engine has failed.
        """
        with self._swapping:
            new = Guesser.of(self.backbone, *guesser.load(self.backbone, heads, tree), tree == "auto")
            self._check_memory(new.tree)
            times: StepTimes = {}
            self._coming = coming = Coming(new, times, self._arrival(new, times))
            if self.failure is not None:  # looked at after that, and so after the thread's last look
                raise RuntimeError(f"the engine has failed: {self.failure}")
            while self._thread is None and not coming.taken_over.done():
                self._bring_in()
            self.scheduler.work.set()  # an engine without requests sleeps
            coming.taken_over.result()

    def _check_memory(self, tree: Tree) -> None:
        longest = self.max_total_tokens + self._num_slack(tree)
        if PagedCache.pages_for(longest) > self.cache.num_pages:
            raise ValueError(
                f"a request of max_total_tokens {self.max_total_tokens} and the tree's {len(tree) - 1} guesses "
                f"take more than the {self.cache.num_pages * PAGE_SIZE} tokens of the cache, which was made for the "
                "tree at the start. Swap in a smaller tree, or start the engine with this one."
            )

    def _num_slack(self, tree: Tree) -> int:
        """Behind its last token a row has the guesses, and before them what an unread step may have committed."""
        return len(tree) + (tree.depth + 1) * self.lags

    def _arrival(self, new: Guesser, times: StepTimes) -> Iterator[None]:
        """As `_timing`, as far as there is something to know or to do before the first step."""
        # Graphs are captured by the first pass of their shape, which is not to be one that a request waits for.
        repeats = REPEATS if new.is_adaptive else int(self.mode == "graphs")
        return self._timing(times, new, MEASURED_CONTEXT, repeats)

    def _bring_in(self) -> None:
        """Measures one more pass for the guesser that is coming, or takes it over when all are measured."""
        if (coming := self._coming) is None:
            return
        try:
            for _ in coming.timing:
                return
        except Exception as error:  # of its heads, for passes of the base are as before
            self._coming = None
            coming.taken_over.set_exception(error)
            return
        self.guesser, tree = coming.guesser, coming.guesser.tree
        self.sizer = TreeSizer(tree, coming.times) if self.is_adaptive else None
        per_position = self.counters.num_accepted_tokens_per_pos
        per_position += [0] * (tree.depth - len(per_position))
        # Rows that run keep the room that they were given when they joined.
        self.scheduler.num_slack = self._num_slack(tree)
        self._is_short = any(s.num_slack < self.scheduler.num_slack for s in self.scheduler.running)
        self._coming = None
        coming.taken_over.set_result(None)

    def _room(self) -> int:
        """Nodes of the next step that every running row has pages for, and after them for a root at least."""
        unread = sum(step.tree.depth + 1 for step in self._unread) + self.lags
        rows = (len(sequence.pages) * PAGE_SIZE - sequence.num_cached for sequence in self.scheduler.running)
        return min(rows) - unread

    # ------------------------------------------------------------------------------------------- cost

    def measure(self) -> TreeSizer:
        """Measures what steps cost now, and forgets what was known of them and of acceptance."""
        self.sizer = TreeSizer(self.tree, self.step_times())
        return self.sizer

    def step_times(self, context: int = MEASURED_CONTEXT, repeats: int = REPEATS) -> StepTimes:
        """Seconds of a greedy step by rows and nodes, with so many cached tokens a row; the best of the repeats."""
        times: StepTimes = {}
        for _ in self._timing(times, self.guesser, context, repeats):
            pass
        return times

    def _timing(self, times: StepTimes, of: Guesser, context: int, repeats: int) -> Iterator[None]:
        """Fills `times` in by a pass at a time, between which steps may run.

        The rows are nobody's, and their pages blank ones: rows that shared one would find it in the processor's cache.
        """
        numbers_of_rows, width = (
            doublings(self.scheduler.max_batch_size),
            PagedCache.pages_for(context + len(of.tree)),
        )
        times |= {rows: dict.fromkeys(of.trees, math.inf) for rows in numbers_of_rows}
        steps = [*itertools.product(numbers_of_rows, of.trees.items())]
        # Round by round, so that what disturbs the machine for a moment does not fall on one size alone; and back again
        # by turns, since a processor is slow for tens of milliseconds after a large step.
        rounds = [steps[:: -1 if number % 2 else 1] for number in range(repeats)]
        for rows, (size, tree) in itertools.chain.from_iterable(rounds):
            pages = self.cache.take(min(rows * width, self.cache.num_blank_pages))
            try:
                batch = self._dummy(rows, context, width, pages)
                self._time(
                    batch, of, tree, context
                )  # steps come in runs of a size, which find its code and scratch warm
                times[rows][size] = min(times[rows][size], self._time(batch, of, tree, context))
            finally:
                self.cache.give_back(pages)
            yield

    def _dummy(self, num_rows: int, context: int, width: int, pages: list[int]) -> Batch:
        """So many rows with `width` pages of their own while they last, and the null page after that."""
        token_B = torch.zeros(num_rows, dtype=torch.long, device=self.backbone.device)
        hidden_BC = torch.zeros(num_rows, self.hidden_size, dtype=self.backbone.dtype, device=token_B.device)
        rows = [pages[row * width : (row + 1) * width] for row in range(num_rows)]
        table_BP = self.cache.page_table(rows, width)
        sampling = Sampling.of([Settings()] * num_rows, [0] * num_rows, self.vocab_size, token_B.device)
        return Batch(Ahead(token_B, hidden_BC, token_B + context), table_BP, sampling, None)

    @torch.inference_mode()
    def _time(self, batch: Batch, of: Guesser, tree: Tree, context: int) -> float:
        started = time.perf_counter()
        token_BN = of.propose(batch.ahead, tree)
        self._try(batch, tree, token_BN, context).verdict_BX.tolist()
        return time.perf_counter() - started

    def warm_up(self) -> None:
        """Runs a first request of each kind, so that no user's waits for what is done once. Nothing is counted of it,
        nor learnt. Before anything streams."""
        counters, guesser, sizer = self.counters, self.guesser, self.sizer
        self.counters = Counters(num_accepted_tokens_per_pos=[0] * self.tree.depth)
        self.guesser, self.sizer = replace(guesser, trees={len(self.tree): self.tree}), None
        try:
            num_tokens = min(self.max_total_tokens - 1, self.tree.depth + 3)
            kinds: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 0}, {"logprobs": 0})
            for settings in kinds:
                self.generate([[0]], num_tokens, ignore_eos=True, **settings)
        finally:
            self.counters, self.guesser, self.sizer = counters, guesser, sizer

    # ------------------------------------------------------------------------------------------- requests

    def check(self, request: Request) -> None:
        """Raises ValueError when the request can never be served."""
        request.check(self.vocab_size)
        length, limit = len(request.prompt_ids), self.max_total_tokens
        if length + request.max_new_tokens > limit:
            raise ValueError(
                f"the prompt has {length} tokens and {request.max_new_tokens} new ones are asked for, together "
                f"{length + request.max_new_tokens}; the limit is {limit}. Shorten the prompt or ask for fewer."
            )

    def check_room(self, num: int = 1) -> None:
        """Raises QueueFull when `add` of so many would: before the work of making requests."""
        self.scheduler.check_room(num)

    def add(self, request: Request) -> Sequence:
        """Queues a request. Raises ValueError when it can never be served, QueueFull when max_waiting forbids one more
        now, RuntimeError when the engine has failed."""
        self.check(request)
        sequence = Sequence(request, self.eos_ids)
        self._queue(sequence)
        return sequence

    def _queue(self, sequence: Sequence) -> None:
        if self.failure is not None:
            raise RuntimeError(f"the engine has failed: {self.failure}")
        self.scheduler.add(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Lets the next step end a sequence, with the tokens that it has then, unless it has ended by itself."""
        self.scheduler.cancel(sequence)

    def generate(
        self,
        prompts: Rows[list[int]],
        max_new_tokens: int = 64,
        *,
        seed: int | Rows[int] | None = None,
        **settings: Any,
    ) -> list[Completion]:
        """Continues every prompt, in one continuous batch.

        seed: for all prompts, or one for each. settings: other fields of Request, for all prompts. Raises ValueError
        when a prompt can never be served.
        """
        seeds = [seed] * len(prompts) if isinstance(seed, int) or seed is None else list(seed)
        requests = [
            Request(prompt, max_new_tokens, seed=s, **settings)
            for prompt, s in zip(prompts, seeds, strict=True)
        ]
        for request in requests:
            self.check(request)
        sequences: list[Sequence] = []
        while len(sequences) < len(requests) or not all(sequence.finish_reason for sequence in sequences):
            while len(sequences) < len(requests) and self.scheduler.has_room:
                sequences.append(self.add(requests[len(sequences)]))
            self.step()
        return [Completion.of(sequence) for sequence in sequences]

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        """One Delta per step; leaving early cancels the request. Raises as `add` does, before the first Delta."""
        self.check(request)
        sequence = Sequence(request, self.eos_ids)
        queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        # Before it is queued, for from then on the thread may send to it, its last tokens or a failure even.
        self._readers[sequence] = (asyncio.get_running_loop(), queue)
        try:
            self._queue(sequence)
            self.start()
            while True:
                delta = await queue.get()
                if isinstance(delta, Exception):
                    raise delta
                yield delta
                if delta.finish_reason:
                    return
        finally:
            self._readers.pop(sequence, None)
            self.cancel(sequence)

    def start(self) -> None:
        """Lets the engine's own thread do the steps from now on, as `stream` does. Safe to call from any thread."""
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="medusa-engine", daemon=True)
                self._thread.start()

    def _serve(self) -> None:
        """Body of the engine's thread: steps while there is work, and sleeps while there is none."""
        while self.failure is None:
            if self._coming is None:
                self.scheduler.work.wait()
            try:
                # The first at once: a first token is not to wait for a step it has no part in.
                for half in (self._take_in, self._move_on):
                    deltas = half()
                    self.last_step_s = time.monotonic()
                    self._send(deltas)
            except Exception as error:
                self.failure = error
        failed = RuntimeError(f"the engine has failed: {self.failure}")
        self._send([(sequence, failed) for sequence in list(self._readers)])
        if self._coming is not None:
            self._coming.taken_over.set_exception(failed)

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
    def heads(self) -> MedusaHeads | None:
        return self.guesser.heads

    @property
    def tree(self) -> Tree:
        """The largest that a step may take."""
        return self.guesser.tree

    @property
    def trees(self) -> dict[int, Tree]:
        """Those that a step may choose from, by number of nodes."""
        return self.guesser.trees

    @property
    def is_adaptive(self) -> bool:
        return self.guesser.is_adaptive

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
        """Guesses of a step, at most."""
        return len(self.tree) - 1

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self.scheduler.joining)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens that the open requests may still need: of their prompts what is not in the cache, and of their replies
        as many as they may get."""
        # A list of a deque is made at once, whatever another thread does to the deque.
        scheduler = self.scheduler
        return sum(
            sequence.num_left + sequence.request.max_new_tokens - len(sequence.token_ids)
            for sequence in (*list(scheduler.waiting), *scheduler.joining, *scheduler.running)
        )


def _check_counts(max_batch_size: int, max_total_tokens: int, max_waiting: int | None) -> None:
    for name, count, least in (
        ("max_batch_size", max_batch_size, 1),
        ("max_total_tokens", max_total_tokens, 2),  # of the prompt and of the reply
        ("max_waiting", 0 if max_waiting is None else max_waiting, 0),
    ):
        if not is_whole(count) or count < least:
            raise ValueError(f"{name} is {count!r}; expected a whole number, at least {least}.")


def _put_all(items: list[tuple[asyncio.Queue[Any], Any]]) -> None:
    for queue, delta in items:
        queue.put_nowait(delta)
