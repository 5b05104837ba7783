"""Communication overlap (DynaFlow paper, section 6: Transformers, Megatron-LM, xDiT, FastVideo).

No collective waits in line, and compute that needs the newest one comes last. This is list scheduling:

- A network operator is issued as soon as it is ready.
- Of the compute that is ready, what needs no collective still in flight goes first, then what waits for the oldest one.
- Among equals, an operator that leads to another collective goes before one that does not.

With micro-batches this is lock-step. Within one, work off the path to the next collective (a weight's gradient, a
shared expert) fills the time that a collective takes:

    compute  dX      dW   dX'      dW'
    network      ar           ar'
"""

from __future__ import annotations

from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.program import Resource
from dynaflow_serving.strategy.base import OpScheduler, SplitOptions
from dynaflow_serving.strategy.registry import register_strategy
from dynaflow_serving.strategy.schedule import Schedule, Task
from dynaflow_serving.strategy.splitting import cut_at_requests, whole


@register_strategy("comm_overlap")
class CommOverlap(OpScheduler[SplitOptions]):
    schedules_unsplit = True

    def split(self, batch: Batch) -> Split:
        if self.options.micro_batches == 1:
            return whole(batch, "comm_overlap with one micro-batch")
        return cut_at_requests(batch, self.options.micro_batches, self.options.min_tokens)

    def schedule(self, s: Schedule) -> None:
        leads = leading_to_network(s)
        issued: dict[Task, int] = {}  # network operators, in order of issue: what is before `passed` was waited for
        passed = 0

        def newest(task: Task) -> int:
            """Return how many collectives must have ended before `task` can run; 0 if it waits for none."""
            return max((n for p in s.predecessors(task) if (n := issued.get(p, 0)) > passed), default=0)

        while ready := s.get_ready_ops():
            network = [t for t in ready if t.resource is Resource.NETWORK]
            if network:
                task = min(network, key=lambda t: t.micro_batch)
                issued[task] = len(issued) + 1
            else:
                task = min(ready, key=lambda t: (newest(t), t.name not in leads, t.micro_batch))
                passed = max(passed, newest(task))
            s.execute(task)


def leading_to_network(s: Schedule) -> set[str]:
    """Return the operators that lead to a network operator."""
    leads: set[str] = set()
    for op in reversed(s.program.operators):
        after = s.successors(Task(op, 0))
        if any(t.resource is Resource.NETWORK or t.name in leads for t in after):
            leads.add(op.name)
    return leads
