"""Kernels that do the work of several, without a split: residual add + RMSNorm, and SiLU-mul.

    compute  attention  add_rms_norm  gate  up  silu_mul  down  add_rms_norm  next layer

Both are bound by memory. The model's own code writes and reads each intermediate result; the kernels
(`kernels/rms_norm.py`, `kernels/silu_mul.py`) read their inputs once and write their results once.

**Contract**
- Operators run in program order, on one stream. Only those that compute exactly what a kernel computes are replaced
  (`kernels/fusions.py`); a model without any is refused.
- The kernels need triton and CUDA. Without them the first step ends in an error that says so; on a CPU they run, for
  tests, with TRITON_INTERPRET=1. They have no backward, so that training is refused, too.
- Unmeasured: no figure of this strategy on a GPU exists yet.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from dynaflow_serving.capture.fx.matching import region_of
from dynaflow_serving.core.order import external_ports, order_edges
from dynaflow_serving.core.program import Program, Resource
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels.fused import Fused
from dynaflow_serving.kernels.fusions import find_fusions
from dynaflow_serving.strategy.base import UnsplitScheduler
from dynaflow_serving.strategy.registry import register_strategy
from dynaflow_serving.strategy.rules import GraphRule
from dynaflow_serving.strategy.schedule import Schedule, Task
from dynaflow_serving.strategy.streams import COMPUTE

KERNELS = {name: Fused(name) for name in ("add_rms_norm", "silu_mul")}
RESULTS = {"add_rms_norm": 2, "silu_mul": 1}  # at most; more are values that a backward pass would read
MATCH = "fused:"  # begins the tag that the operators of one match share


class FusionRule(GraphRule):
    """Covers all that the kernel `target` can compute, where no other rule or mark covers a part of it. Nodes with
    others in between become several operators, which share a tag."""

    def find(self, graph: fx.Graph) -> dict[str, str]:
        found = [f for f in find_fusions(graph) if f.kernel == self.target and not any(map(region_of, f.nodes))]
        return {n.name: f.outputs[-1].name for f in found for n in f.nodes}

    def region(self, instance: str) -> dict[str, Any]:
        return {**super().region(instance), "tags": [self.target, MATCH + instance]}


@register_strategy("fused_norms")
class FusedNorms(UnsplitScheduler):
    annotations = tuple(FusionRule(name, name, Resource.MEMORY, required=False) for name in KERNELS)
    unsplit_reason = "fused kernels need no split"

    def schedule(self, s: Schedule) -> None:
        matches = replaceable(s.program)
        if not matches:
            raise ScheduleError(
                "fused_norms: this model has no residual add + RMSNorm and no SiLU-mul that kernels can compute. It "
                "may be written in another way, be fused already, or keep values for gradients (run it under "
                "torch.no_grad()); use another strategy"
            )
        for micro_batch in range(s.micro_batches):
            for op in s.program.operators:
                names = matches.get(op.name, (op.name,))
                if op.name == names[-1]:  # the others have waited for it
                    kernel = KERNELS[op.tags[0]] if op.name in matches else None
                    tasks = [Task(s.program.by_name[n], micro_batch) for n in names]
                    s.execute(tasks, stream=COMPUTE, replace=kernel)


def replaceable(program: Program) -> dict[str, tuple[str, ...]]:
    """Operator -> all operators of its match, in order, for those that a kernel can stand in for."""
    matches: dict[str, list[str]] = {}
    for op in program.operators:
        for tag in op.tags:
            if tag.startswith(MATCH):
                matches.setdefault(tag, []).append(op.name)
    found: dict[str, tuple[str, ...]] = {}
    for names in map(tuple, matches.values()):
        _, results = external_ports(program, names)
        if len(results) <= RESULTS[program.by_name[names[0]].tags[0]] and _can_wait(program, names):
            found.update(dict.fromkeys(names, names))
    return found


def _can_wait(program: Program, names: tuple[str, ...]) -> bool:
    """Whether the first operators of `names` can run when the last does: nothing in between needs them."""
    before = order_edges(program)
    order = list(before)
    between = order[order.index(names[0]) : order.index(names[-1])]
    return not any(before[n] & set(names) for n in between if n not in names)
