"""CUDA streams and events, issued by the caller's thread in plan order.

Contract
- The compute stream is the caller's current stream; the others, and the events, are the executor's (`cuda_streams`),
  with priorities and SM shares from the config. One run of an executor's plans at a time.
- No `record_stream`, which would delay reuse and is not allowed in graph capture. A tensor is allocated by the
  caching allocator on the stream of the action that makes it, and goes back to that stream's free list when its
  FREE drops the reference. That is safe because (a) FREE is issued after all readers, and (b) whatever the
  allocating stream launches after it also runs after all readers: lowering frees what crosses streams at the
  join, and `verify` proves (a) and (b) for every plan. What a plan returns may live on a side stream's list: the
  caller drops it after its last use on the current stream, and every stream of the next run starts by
  waiting for that stream (`verify`: "forked").
- Operators with context run on any stream: one thread issues everything, so `enter` precedes the launch.
- After an exception the current stream waits for all streams of the plan, so that freed memory may be reused.
- With `graph: whole`, plans are captured (`cuda_graph`).
- Unmeasured: this code's logic is tested with a recording stand-in for `torch.cuda`; it has not run on a
  device yet. `tests/gpu` holds the tests to run there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dynaflow_serving.capture.eager.gradients import Submit
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.config import ExecutorOptions
from dynaflow_serving.core.plan import COMPUTE_STREAM, Action, ActionKind, Plan
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.executor.base import BoundPlan, CapturedGraphs, Executor
from dynaflow_serving.executor.codegen import Emitter
from dynaflow_serving.executor.cuda_graph import WholePlanGraphs
from dynaflow_serving.executor.cuda_streams import StreamPool
from dynaflow_serving.executor.tracing import EventTracer, Tracer


class _StreamEmitter(Emitter):
    """Sets the current stream before the launches of another stream; the caller's is s0."""

    def __init__(self, captured: CapturedProgram, plan: Plan, kernels: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(captured, plan, kernels)
        self.stream_names = {s: f"s{i}" for i, s in enumerate(plan.streams)}
        self.active = COMPUTE_STREAM

    def record(self, action: Action) -> list[str]:
        return [f"e{action.event}.record({self.stream_names[action.stream]})"]

    def wait(self, action: Action) -> list[str]:
        return [f"{self.stream_names[action.stream]}.wait_event(e{action.event})"]

    def stream(self, action: Action) -> str:
        return self.stream_names[action.stream]

    def before(self, action: Action) -> list[str]:
        if action.stream == self.active or action.event >= 0 or action.kind in (ActionKind.SPLIT, ActionKind.FREE):
            return []  # nothing is launched or allocated
        self.active = action.stream
        return [f"set_stream({self.stream_names[action.stream]})"]

    def body(self) -> list[str]:
        actions = super().body()
        if len(self.stream_names) == 1:
            return actions if self.tracer is None else ["s0 = current_stream()", *actions]
        lines = ["s0 = current_stream()", "try:", *(f"    {line}" for line in actions)]
        return [*lines, "except BaseException:", "    set_stream(s0)", "    rejoin(s0)", "    raise", "set_stream(s0)"]


class CUDAExecutor(Executor):
    name = "cuda"
    offers = frozenset({"sm_share", "graph"})

    def __init__(self, options: ExecutorOptions | None = None, cuda: Any = torch.cuda) -> None:
        """`cuda`: the module that makes streams, events and graphs; tests pass a stand-in."""
        super().__init__(options)
        if not cuda.is_available():
            raise InactiveError("executor 'cuda' needs a CUDA device and none is visible; use executor: cpu")
        self._cuda = cuda
        self._streams = StreamPool(cuda, self.options.streams)
        self._graphs = WholePlanGraphs(cuda, self.options.max_graphs) if self.options.graph == "whole" else None

    def tracer(self) -> Tracer:
        return EventTracer(self._cuda)

    def _bind(
        self, captured: CapturedProgram, plan: Plan, kernels: Mapping[str, Callable[..., Any]], tracer: Tracer | None
    ) -> BoundPlan:
        bind = functools.partial(self._emit, captured, kernels, tracer)
        if self._graphs is None or tracer is not None:  # a replay has no actions that could be timed
            return bind(plan)
        return self._graphs.bind(captured, plan, bind)

    def _emit(
        self, captured: CapturedProgram, kernels: Mapping[str, Callable[..., Any]], tracer: Tracer | None, plan: Plan
    ) -> BoundPlan:
        emitter = _StreamEmitter(captured, plan, kernels)
        extra = {v: self._streams.stream(s) for s, v in emitter.stream_names.items() if s != COMPUTE_STREAM}

        def rejoin(current: Any) -> None:
            if not self._cuda.is_current_stream_capturing():  # a failed capture has launched nothing
                for stream in extra.values():
                    current.wait_stream(stream)

        emitter.globals |= {"set_stream": self._cuda.set_stream, "current_stream": self._cuda.current_stream}
        emitter.globals |= {"rejoin": rejoin, **extra}
        for number, event in enumerate(sorted({a.event for a in plan.actions if a.event >= 0})):
            emitter.globals[f"e{event}"] = self._streams.event(number)
        return emitter.bind(tracer)

    def submit_to(self, stream: str) -> Submit:
        return functools.partial(self._streams.submit, stream)

    @property
    def graphs(self) -> CapturedGraphs | None:
        if self._graphs is None:
            return None
        return CapturedGraphs(len(self._graphs.graphs), sum(g.mib for g in self._graphs.graphs.values()))

    def report(self) -> dict[str, Any]:
        return super().report() | ({"graphs": self._graphs.report()} if self._graphs else {})

    def close(self) -> None:
        if self._graphs:
            self._graphs.close()
