"""The reference order: one micro-batch runs after the other, all on the compute stream. Un-split steps run so, too."""

from __future__ import annotations

from pydantic import Field

from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.strategy.base import OpScheduler, SplitOptions
from dynaflow_serving.strategy.registry import register_strategy
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.splitting import cut_at_requests, whole
from dynaflow_serving.strategy.streams import COMPUTE


class SequentialOptions(SplitOptions):
    micro_batches: int = Field(1, ge=1, description="micro-batches per step; 1 runs every step un-split")
    min_tokens: int = Field(1, ge=1, description="no micro-batch is smaller than this many tokens")


@register_strategy("sequential")
class Sequential(OpScheduler[SequentialOptions]):
    def split(self, batch: Batch) -> Split:
        if self.options.micro_batches == 1:
            return whole(batch, "sequential with one micro-batch")
        return cut_at_requests(batch, self.options.micro_batches, self.options.min_tokens)

    def schedule(self, s: Schedule) -> None:
        while ready := s.get_ready_ops():
            s.execute(min(ready, key=lambda task: task.micro_batch), stream=COMPUTE)
