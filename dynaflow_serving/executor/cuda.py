"""CUDA streams and events, issued by the caller's thread in plan order.

Contract
- The compute stream is the caller's current stream; every other stream is made once per executor, the
  network stream with high priority.
- Tensors that cross streams are referenced until the join (lowering places their FREE there), so no
  `record_stream` is needed, which would delay reuse and is not allowed in graph capture.
- Unmeasured: this code's logic is tested with a recording stand-in for `torch.cuda`; it has not run on a
  device yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dynaflow_serving.errors import InactiveError
from dynaflow_serving.executor.base import BoundPlan, Executor
from dynaflow_serving.executor.codegen import Emitter
from dynaflow_serving.ir import COMPUTE_STREAM, Plan, Step, StepKind
from dynaflow_serving.partition.capture import Capture


class _StreamEmitter(Emitter):
    def __init__(self, capture: Capture, plan: Plan, kernels: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(capture, plan, kernels)
        self.stream_names = {s: f"s{i}" for i, s in enumerate(plan.streams)}
        self.active = COMPUTE_STREAM

    def record(self, step: Step) -> list[str]:
        return [f"e{step.event}.record({self.stream_names[step.stream]})"]

    def wait(self, step: Step) -> list[str]:
        return [f"{self.stream_names[step.stream]}.wait_event(e{step.event})"]

    def before(self, step: Step) -> list[str]:
        if step.stream == self.active or step.event >= 0 or step.kind in (StepKind.SPLIT, StepKind.FREE):
            return []  # nothing is launched or allocated
        self.active = step.stream
        return [f"set_stream({self.stream_names[step.stream]})"]

    def body(self) -> list[str]:
        steps = super().body()
        if len(self.stream_names) == 1:
            return steps
        lines = ["s0 = current_stream()", "try:", *(f"    {line}" for line in steps)]
        return [*lines, "finally:", "    set_stream(s0)"]


class CUDAExecutor(Executor):
    name = "cuda"

    def __init__(self, cuda: Any = torch.cuda) -> None:
        """`cuda`: the module that makes streams and events; tests pass a stand-in."""
        if not cuda.is_available():
            raise InactiveError("executor 'cuda' needs a CUDA device and none is visible; use executor: cpu")
        self._cuda = cuda
        self._streams: dict[str, Any] = {}

    def bind(self, capture: Capture, plan: Plan, kernels: Mapping[str, Callable[..., Any]]) -> BoundPlan:
        emitter = _StreamEmitter(capture, plan, kernels)
        emitter.names |= {"set_stream": self._cuda.set_stream, "current_stream": self._cuda.current_stream}
        for stream, name in emitter.stream_names.items():
            if stream != COMPUTE_STREAM:
                if stream not in self._streams:
                    self._streams[stream] = self._cuda.Stream(priority=-1 if stream == "network" else 0)
                emitter.names[name] = self._streams[stream]
        for e in {s.event for s in plan.steps if s.event >= 0}:
            emitter.names[f"e{e}"] = self._cuda.Event()
        return emitter.build()
