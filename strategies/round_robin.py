"""Round-robin turns: for training, where communication lies on both sides of every block of compute.

A turn of a micro-batch ends when it has issued a collective, or what is a collective backward. In tensor parallelism
these alternate: after a norm (N) the activations are gathered, or their gradient is summed; after the block (B) the
result is summed or scattered. Every second micro-batch starts a turn late, so that there is a block of another one
between any two turns of a micro-batch. With three, in a steady state:

    compute  B@0      N@1 B@2      N@0 B@1      N@2 B@0 ...
    network      B@0      N@1 B@2      N@0 B@1      N@2 ...

The backward pass is the mirror image, so it has a block between any two turns, too. Two micro-batches have that for
every second turn only: lock-step hides half of the communication of either pass, list scheduling (`comm_overlap`) all
of the forward pass and none of the backward pass.
"""

from __future__ import annotations

from pydantic import Field

from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.program import Resource, communicates
from dynaflow_serving.strategy.base import OpScheduler, SplitOptions
from dynaflow_serving.strategy.registry import register_strategy
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.splitting import cut_at_requests


class RoundRobinOptions(SplitOptions):
    micro_batches: int = Field(3, ge=2, description="how many micro-batches a step is cut into at most")
    min_tokens: int = Field(
        1, ge=1, description="a step is not split if a micro-batch would have fewer tokens (rows of the batch)"
    )


@register_strategy("round_robin")
class RoundRobin(OpScheduler[RoundRobinOptions]):
    def split(self, batch: Batch) -> Split:
        return cut_at_requests(batch, self.options.micro_batches, self.options.min_tokens)

    def schedule(self, s: Schedule) -> None:
        for micro_batch in range(0, s.micro_batches, 2):
            self._turn(s, micro_batch)
        while s.unfinished:
            for micro_batch in range(s.micro_batches):
                self._turn(s, micro_batch)

    @staticmethod
    def _turn(s: Schedule, micro_batch: int) -> None:
        while ready := s.get_ready_ops(micro_batch):
            # network first: it should be on its way while this micro-batch still computes
            task = min(ready, key=lambda t: t.resource is not Resource.NETWORK)
            s.execute(task)
            if communicates(task.resource, task.operator.gradient):
                return
