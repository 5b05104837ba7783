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
    def __init__(self, captured: CapturedProgram, plan: Plan, kernels: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(captured, plan, kernels)
        self.globals["poison"] = poison
        self._alone = self._instances_alone_in_their_memory()

    def _instances_alone_in_their_memory(self) -> set[Instance]:
        """Outputs of operators that have no alias, no view and no buffer of a merge."""
        aliases = Counter(v.storage for v in self.program.values.values())
        made: set[Instance] = set()
        for action in self.plan.actions:
            if action.kind in (ActionKind.RUN, ActionKind.REPLACE):
                outputs = {v for n in action.operators for v in self.program.by_name[n].outputs} - set(action.into)
                unshared = [v for v in outputs if aliases[self.program.values[v].storage] == 1]
                made |= {Instance(v, action.start, action.stop) for v in unshared}
        return made - {a.instances[0] for a in self.plan.actions if a.kind is ActionKind.SPLIT}

    def free(self, action: Action) -> list[str]:
        poisoned = [f"poison({self.variables[i]})" for i in action.instances if i in self._alone]
        return [*poisoned, *super().free(action)]


class SequentialExecutor(Executor):
    name = "sequential"

    def _bind(
        self, captured: CapturedProgram, plan: Plan, kernels: Mapping[str, Callable[..., Any]], tracer: Tracer | None
    ) -> BoundPlan:
        return _PoisonEmitter(captured, plan, kernels).bind(tracer)
