"""All actions in issue order on the caller's thread, for debugging.

Contract
- Streams and events are ignored: issue order is always a valid order.
- Freed buffers are poisoned (NaN, or the largest integer), so that a hidden alias that outlives its
  value shows in the result instead of reading old contents by luck.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.plan import Action, ActionKind, Instance, Plan
from dynaflow_serving.executor.base import BoundPlan, Executor
from dynaflow_serving.executor.codegen import Emitter
from dynaflow_serving.executor.tracing import Tracer


def poison(tensor: Any) -> None:
    """Overwrite what nobody may read again."""
    if isinstance(tensor, torch.Tensor) and not tensor.requires_grad:
        tensor.fill_(torch.nan if tensor.is_floating_point() else True if tensor.dtype is torch.bool else 113)


class _PoisonEmitter(Emitter):
    def __init__(self, capture: CapturedProgram, plan: Plan, kernels: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(capture, plan, kernels)
        self.names["poison"] = poison
        count = Counter(v.storage for v in self.program.values.values())
        viewed = {s.instances[0] for s in plan.actions if s.kind is ActionKind.SPLIT}
        self.owned: set[Instance] = set()
        for s in plan.actions:
            if s.kind in (ActionKind.RUN, ActionKind.REPLACE):
                outputs = {v for n in s.operators for v in self.program.by_name[n].outputs} - set(s.into)
                self.owned |= {
                    Instance(v, s.start, s.stop) for v in outputs if count[self.program.values[v].storage] == 1
                }
        self.owned -= viewed

    def free(self, action: Action) -> list[str]:
        poisoned = [f"poison({self.variables[i]})" for i in action.instances if i in self.owned]
        return [*poisoned, *super().free(action)]


class SequentialExecutor(Executor):
    name = "sequential"

    def _bind(
        self, capture: CapturedProgram, plan: Plan, kernels: Mapping[str, Callable[..., Any]], tracer: Tracer | None
    ) -> BoundPlan:
        return _PoisonEmitter(capture, plan, kernels).build(tracer)
