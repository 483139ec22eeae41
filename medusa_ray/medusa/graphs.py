"""A pass -> the same pass as CUDA graphs: a step is one launch, where it was a thousand.

A graph repeats what the device did, in the same shapes and at the same addresses, and Python does not run. So there is
one for each number of rows (1, 2, 4 ...) and each shape of a tree. Rows that are wanting are filled up with rows of the
null page, and the page table has its full width: the kernel reads no further than a sequence is long. Whatever does not
fit, such as prompts, runs eagerly: graphs of all their shapes would have the compiler at work while requests wait.

The forward in the graphs is compiled by torch where it can be. Tests on a CPU record a pass's operations and repeat
them in place, as a graph does; the real capture has not run on a GPU yet.

# B sequences   N tree nodes   W nodes wanted   D depth + 1   P pages
"""

import logging
import os
import shutil
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from medusa_ray.medusa import attention
from medusa_ray.medusa.backbone import Backbone
from medusa_ray.medusa.cache import NULL_PAGE
from medusa_ray.medusa.compiled import Pass
from medusa_ray.medusa.tree import MASK_BITS
from medusa_ray.medusa.treepass import TreePass

Run = Callable[[], tuple[Tensor, ...]]
# Outputs of a run, and what fills them anew from whatever the run's inputs then hold.
Capture = Callable[[Run], tuple[tuple[Tensor, ...], Callable[[], None]]]

log = logging.getLogger("medusa_ray")


def why_not(device: str) -> str | None:
    """Why steps cannot well be graphs there, or None."""
    if not attention.takes_kernel(torch.device(device), 1):
        return "without the GPU's own kernel a graph would read all the room that replies may take"
    return None


def build(backbone: Backbone, rows: list[int], width: int) -> "GraphedPass":
    """The pass of a base, compiled where there is a C compiler; what it takes long for, its first calls do."""
    eager = TreePass(backbone)
    forward: Pass = eager
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]  # as triton looks for them
    if any(map(shutil.which, compilers)):
        forward = torch.compile(eager, fullgraph=True)
    else:
        log.warning("the base is not compiled: there is no C compiler, %s", " and no ".join(compilers))
    return GraphedPass(forward, eager, rows, width, partial(CudaCapture, backbone.device))


class CudaCapture:
    """Captures runs on a GPU. Their graphs share one pool of memory, since no two are replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, run: Run) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        callers = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(callers)
        with torch.cuda.stream(self.stream):
            run()  # compiles, and lets libraries take for good what memory they need
        callers.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, another engine's for one.
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            outputs = run()
        return outputs, graph.replay


class GraphedPass:
    """Stands for a pass, and is called as TreePass.forward is.

    Of what a call returns, logits and hidden states at the nodes are good until the next call only, which writes over
    them; the rest, which is small, is the caller's.
    """

    def __init__(
        self, forward: Pass, eager: Pass, rows: list[int], width: int, new_capture: Callable[[], Capture]
    ) -> None:
        """forward: captured; or the eager pass, where compiling it fails. rows: numbers of them, ascending. width:
        pages of the longest sequence."""
        self.rows, self.width = rows, width
        self._forward, self._eager = forward, eager
        self._new_capture = new_capture
        self._capture: Capture
        self._keys: list[Tensor] | None = None  # the pools that the graphs are of
        self._graphs: dict[tuple[int, int, int], _Graph] = {}

    def __call__(
        self,
        token_BN: Tensor,
        length_B: Tensor,
        table_BP: Tensor,
        depth_N: Tensor,
        mask_NN: Tensor,
        wanted_BW: Tensor,
        depth_W: Tensor,
        mask_WW: Tensor,
        parent_W: Tensor,
        walk_WD: Tensor,
        is_greedy: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """As TreePass.forward; where as many nodes are wanted as there are, they are all of them in their order."""
        (B, N), P = token_BN.shape, table_BP.shape[1]
        is_whole, most = wanted_BW.shape == token_BN.shape, self.rows[-1]
        if not is_whole or N > MASK_BITS or most < B or self.width < P:
            nodes = depth_N, mask_NN, wanted_BW, depth_W, mask_WW, parent_W, walk_WD
            return self._eager(token_BN, length_B, table_BP, *nodes, is_greedy, keys, values)
        if keys is not self._keys:
            # Addresses of pools are in the graphs. Memory of graphs that are gone cannot be captured into again.
            self._graphs, self._keys, self._capture = {}, keys, self._new_capture()
        key = self.rows[bisect_left(self.rows, B)], N, walk_WD.shape[1]
        graph = self._graphs.get(key) or _Graph(*key, self.width, token_BN.device)
        graph.fill(token_BN, length_B, table_BP, (depth_W, mask_WW, parent_W, walk_WD, is_greedy))
        if graph.replay is None:
            self._capture_of(graph, keys, values)
            self._graphs[key] = graph  # only now: the next call tries again what fails here
        assert graph.replay is not None
        graph.replay()
        logits_BNV, hidden_BNC, *small = (output[:B] for output in graph.outputs)
        return logits_BNV, hidden_BNC, *(output.clone() for output in small)

    def _capture_of(self, graph: "_Graph", keys: list[Tensor], values: list[Tensor]) -> None:
        try:
            if self._forward is not self._eager:
                graph.mark_dynamic(keys, values)
            run = partial(self._forward, *graph.inputs, keys, values)
            graph.outputs, graph.replay = self._capture(run)
        except Exception as error:
            if self._forward is self._eager:
                raise
            log.warning("the base is not compiled, for that fails: %s", error)
            self._forward, self._capture = self._eager, self._new_capture()
            self._capture_of(graph, keys, values)


class _Graph:
    """Inputs and outputs of a graph, each at its address for good."""

    def __init__(self, rows: int, nodes: int, depth: int, width: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token_BN, self.length_B, self.table_BP = zeros(rows, nodes), zeros(rows), zeros(rows, width)
        self.depth_N, self.mask_NN = zeros(nodes), zeros(nodes, nodes, dtype=torch.bool)
        self.parent_N, self.walk_ND = zeros(nodes), zeros(nodes, depth)
        self.is_greedy = zeros(dtype=torch.bool)
        every_BN = torch.arange(nodes, device=device).repeat(rows, 1)
        self.tree = self.depth_N, self.mask_NN, self.parent_N, self.walk_ND, self.is_greedy
        self.inputs = (
            self.token_BN,
            self.length_B,
            self.table_BP,
            self.depth_N,
            self.mask_NN,
            every_BN,
            *self.tree,
        )
        self.outputs: tuple[Tensor, ...] = ()
        self.replay: Callable[[], None] | None = None
        self._given: tuple[Tensor, ...] | None = None

    def fill(self, token_BN: Tensor, length_B: Tensor, table_BP: Tensor, tree: tuple[Tensor, ...]) -> None:
        """Takes a call's arguments in. What was in a row before stays behind its table, where nobody looks."""
        B, P = table_BP.shape
        self.token_BN[:B], self.length_B[:B], self.table_BP[:B, :P] = token_BN, length_B, table_BP
        if len(self.length_B) > B:
            self.length_B[B:].zero_()
            self.table_BP[B:].fill_(NULL_PAGE)
        if self._given is None or any(a is not b for a, b in zip(tree, self._given, strict=True)):
            for mine, its in zip(self.tree, tree, strict=True):
                mine.copy_(its)
            self._given = tree

    def mark_dynamic(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """Has one compiled forward serve all graphs, but for those of one row or node, which torch takes apart."""
        for tensor in self.inputs:
            torch._dynamo.maybe_mark_dynamic(tensor, [*range(tensor.dim())])
        for pool in (*keys, *values):
            torch._dynamo.maybe_mark_dynamic(pool, 0)
