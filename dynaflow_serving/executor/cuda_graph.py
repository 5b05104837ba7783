"""Whole-plan CUDA graphs: every stream of a plan, with its forks and joins, in one graph.

Contract
- There is one graph per bound plan (a Program and a Split signature) and bucket. A bucket is the exact token offsets,
  and what else is baked into a graph: shapes and strides of the inputs, addresses of shared ones, autocast.
- The first run of a bucket is eager (it warms up kernels and autotuners), the second captures, up to `max_graphs`
  for the executor. All else runs eagerly; `report` counts how often and why.
- Inputs with a token axis are copied into static whole-batch buffers, one per program input and graph, of which
  the micro-batches are views: no two graphs share one. Inputs that the plan writes are copied back. Outputs are
  copies: the next replay may overwrite what the graph itself produced.
- All graphs have one capture stream and one memory pool, so they share memory for intermediates, which is right
  while replays do not overlap: a replay on another stream than the one before waits for that.
- A captured graph lives until `close`, even if its plan does not: destroying one graph drops the cuBLAS
  workspace of its capture stream, which the others still use (pytorch#193402).
- Actions are captured in the order of `lanes.reorder`, which is verified anew.
- Replacement kernels are captured like operators. These are not captured: operators with context, unless the
  integration declares by `CapturedProgram.static_context` that its metadata keeps its addresses and host values;
  LOCAL and PARTIAL inputs, which differ per step; outputs that alias an input or one another (a copy would not);
  autograd.
- Collectives are captured like operators, so their communicators must support it, and every rank must reach each
  collective: ranks with one config, plan and batch history decide alike, and a rank whose capture fails runs the same
  collectives eagerly, in the same order. ProcessGroupNCCL is reported to hang at replay (sglang#31852).
- Seconds and MiB (growth of reserved memory, static inputs included) of each capture are in `report`.
- Unmeasured: tested with a stand-in for `torch.cuda` that records and replays; it has not run on a device yet.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dynaflow_serving.capture.program import CapturedProgram, Enter, PlanFunction
from dynaflow_serving.core.plan import Plan
from dynaflow_serving.core.program import Program, Scope
from dynaflow_serving.executor.base import BoundPlan
from dynaflow_serving.executor.lanes import lanes, reorder
from dynaflow_serving.planning.verify import verify

PLAIN = {int, float, bool, str, type(None)}  # arguments that are no tensors
REMEMBERED = 4096  # buckets seen once: most token counts of a prefill never come back

logger = logging.getLogger(__name__)


@dataclass
class _Graph:
    """One captured bucket of one plan."""

    plan: Plan
    bounds: tuple[int, ...]
    graph: Any
    static_inputs: dict[int, torch.Tensor]  # by position among the arguments
    outputs: list[Any]
    seconds: float
    mib: float
    replays: int = 0

    def replay(self, args: Sequence[Any], written: Sequence[int]) -> list[Any]:
        """The outputs for `args`; `written` are the positions of arguments that the plan writes."""
        for i, buffer in self.static_inputs.items():
            buffer.copy_(args[i], non_blocking=True)
        self.graph.replay()
        self.replays += 1
        for i in written:
            args[i].copy_(self.static_inputs[i], non_blocking=True)
        return [o.clone() if isinstance(o, torch.Tensor) else o for o in self.outputs]


class WholePlanGraphs:
    """The graphs of one executor."""

    device_type = "cuda"

    def __init__(self, cuda: Any, max_graphs: int) -> None:
        self.cuda, self.max_graphs = cuda, max_graphs
        self.graphs: dict[Hashable, _Graph] = {}
        self.eager: Counter[str] = Counter()  # reason -> runs without a graph
        self._plans = itertools.count()
        self._pool: Any = None
        self._stream: Any = None  # of all captures
        self._last: Any = None  # stream of the last replay

    def bind(self, captured: CapturedProgram, plan: Plan, bind_eagerly: Callable[[Plan], BoundPlan]) -> BoundPlan:
        """Bind `plan` so that it is captured; `bind_eagerly` makes what is captured, or runs without a graph."""
        ordered = reorder(plan)
        verify(captured.program, ordered)
        eager = bind_eagerly(plan)
        graphed = _GraphedPlan(self, next(self._plans), captured, plan, eager.run, lambda: bind_eagerly(ordered).run)
        return BoundPlan(plan, graphed, eager.source)

    def note_eager_run(self, plan: Plan, reason: str) -> None:
        if reason not in self.eager:
            logger.info("DynaFlow: a plan of %s runs without CUDA graph: %s", plan.strategy, reason)
        self.eager[reason] += 1

    def capture(
        self,
        key: Hashable,
        plan: Plan,
        run: PlanFunction,
        args: Sequence[Any],
        batched: Sequence[int],
        bounds: Sequence[int],
        enter: Enter,
    ) -> _Graph:
        """Capture `run`, with static buffers in place of the arguments at the positions `batched`.

        Raises:
            Exception: whatever `run` or the capture raises.
        """
        cuda = self.cuda
        if self._stream is None:
            self._stream, self._pool = cuda.Stream(), cuda.graph_pool_handle()
        cuda.synchronize()
        cuda.empty_cache()
        reserved, started = cuda.memory_reserved(), time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():  # a replay in any mode may write to them
            buffers = {i: torch.empty_like(args[i]).copy_(args[i]) for i in batched}
        graph, stream = cuda.CUDAGraph(), cuda.current_stream()
        try:  # thread_local: an allocation in a thread of the engine's must not spoil the capture
            with cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = run([buffers.get(i, a) for i, a in enumerate(args)], bounds, enter)
        finally:
            cuda.set_stream(stream)  # torch leaves the capture stream current where ending the capture fails
        seconds, mib = time.perf_counter() - started, (cuda.memory_reserved() - reserved) / 2**20
        logger.info("DynaFlow: captured a plan of %s for %s: %.2f s, %.1f MiB", plan.strategy, bounds, seconds, mib)
        self.graphs[key] = _Graph(plan, tuple(bounds), graph, buffers, outputs, seconds, mib)
        return self.graphs[key]

    def order_after_last_replay(self) -> None:
        stream = self.cuda.current_stream()
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream

    def report(self) -> dict[str, Any]:
        """The graphs, and how many runs had none and why; plain data."""
        captured = [
            {
                "strategy": g.plan.strategy,
                "plan": g.plan.digest,
                "bounds": list(g.bounds),
                "lanes (model)": lanes(reorder(g.plan)),
                "capture_seconds": g.seconds,
                "mib": g.mib,
                "replays": g.replays,
            }
            for g in self.graphs.values()
        ]
        return {"captured": captured, "eager": dict(self.eager)}

    def close(self) -> None:
        """Destroy all graphs, together."""
        if self.graphs:
            self.cuda.synchronize()
        self.graphs.clear()


class _GraphedPlan:
    """A bound plan that is captured bucket by bucket."""

    def __init__(
        self,
        owner: WholePlanGraphs,
        number: int,
        captured: CapturedProgram,
        plan: Plan,
        eager: PlanFunction,
        bind_ordered: Callable[[], PlanFunction],
    ) -> None:
        """`bind_ordered` makes the function to capture: the actions of `plan` in the order of `lanes.reorder`."""
        self._owner, self._number, self._plan, self._eager = owner, number, plan, eager
        self._bind_ordered = bind_ordered
        self._ordered: PlanFunction | None = None
        program = captured.program
        self._names = program.inputs[: len(program.inputs) - len(captured.constants)]
        values = [program.values[v] for v in self._names]
        self._batched = [i for i, v in enumerate(values) if v.scope is Scope.BATCH]
        self._fixed = [i for i, v in enumerate(values) if v.scope is not Scope.BATCH]
        self._written = [i for i in self._batched if values[i].storage in program.written_storages]
        self._never = why_not(program, self._names, captured.static_context)
        self._seen: dict[Hashable, None] = {}

    def __call__(self, args: Sequence[Any], bounds: Sequence[int], enter: Enter) -> list[Any]:
        graph = self._graph(args, bounds, enter)
        if isinstance(graph, str):
            self._owner.note_eager_run(self._plan, graph)
            return self._eager(args, bounds, enter)
        self._owner.order_after_last_replay()
        return graph.replay(args, self._written)

    def _graph(self, args: Sequence[Any], bounds: Sequence[int], enter: Enter) -> _Graph | str:
        """The captured graph for these arguments, or why there is none."""
        if reason := self._never or self._not_now(args):
            return reason
        key = self._key(args, bounds)
        if key in self._owner.graphs:
            return self._owner.graphs[key]
        if reason := self._not_yet(key):
            return reason
        self._ordered = self._ordered or self._bind_ordered()
        try:
            return self._owner.capture(key, self._plan, self._ordered, args, self._batched, bounds, enter)
        except Exception as e:  # torch has ended the capture, nothing was launched: the eager form serves the step
            self._never = f"capture failed: {type(e).__name__}: {e}"
            return self._never

    def _not_now(self, args: Sequence[Any]) -> str:
        """Why this run can have no graph; "" if it can."""
        if torch.is_grad_enabled():
            return "autograd is on: a graph records no gradients (use torch.no_grad)"
        if self._owner.cuda.is_current_stream_capturing():
            return "the caller is capturing a graph of its own"
        for i in self._batched:
            if args[i].device.type != self._owner.device_type:
                return f"input {self._names[i]} is on device {args[i].device}"
        return ""

    def _not_yet(self, key: Hashable) -> str:
        """Why this bucket is not captured in this run; "" if it is."""
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > REMEMBERED:
                del self._seen[next(iter(self._seen))]
            return "warm-up: the first run of a bucket"
        if len(self._owner.graphs) >= self._owner.max_graphs:
            return f"max_graphs: {self._owner.max_graphs} graphs are captured already"
        return ""

    def _key(self, args: Sequence[Any], bounds: Sequence[int]) -> Hashable:
        """What a captured graph is fixed to."""
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        batched = tuple((args[i].shape, args[i].stride(), args[i].dtype) for i in self._batched)
        # Engines pass every weight in every step: isinstance would be most of the time that this takes.
        fixed = tuple([a if type(a) in PLAIN else a.data_ptr() for a in map(args.__getitem__, self._fixed)])
        return self._number, tuple(bounds), batched, fixed, autocast


def why_not(program: Program, inputs: Sequence[str], static_context: bool) -> str:
    """Why no plan of `program` can be captured, by name; "" if it can."""
    if not static_context and (context := [o.name for o in program.operators if o.context]):
        return f"operator {context[0]} reads the engine's context, whose metadata is made anew for every step"
    if own := [v for v in inputs if program.values[v].scope in (Scope.LOCAL, Scope.PARTIAL)]:
        return f"input {own[0]} has no token axis and may differ in every step"
    owner: dict[str, str] = {}  # storage -> the input or output that has it
    for v in (*inputs, *program.outputs):
        value = program.values[v]
        if value.scope not in (Scope.BATCH, Scope.PARTIAL):
            continue
        if value.storage in owner and (value.storage in program.written_storages or v in program.outputs):
            return f"{owner[value.storage]} and {v} share memory, and copies of them would not"
        owner[value.storage] = v
    return ""
