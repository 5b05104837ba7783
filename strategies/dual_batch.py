"""Dual-batch overlap (DBO; DynaFlow paper, section 6): the MoE all-to-all runs beside the other batch's compute.

With A = attention and gate, D = dispatch, E = experts, C = combine:

    compute  A@0  A@1   E@0   E@1   A'@0
    network       D@0   D@1   C@0   C@1

A micro-batch runs until it has issued a dispatch or combine, then the other one has its turn. In a model
without dispatch and combine (tensor parallelism), the turn ends at every network operator. Megatron-LM's integration
tags operators dispatch and combine, and vLLM's with data and expert parallelism (docs/strategies/tags-and-streams.md).
"""

from __future__ import annotations

from pydantic import Field

from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.program import Resource
from dynaflow_serving.strategy.base import OpScheduler, Options
from dynaflow_serving.strategy.registry import register_strategy
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.splitting import cut_at_requests
from dynaflow_serving.strategy.tags import Tag, TagUse


class DualBatchOptions(Options):
    min_tokens: int = Field(
        1024, ge=1, description="a step is not split if a micro-batch would have fewer tokens (paper: 2048 a step)"
    )


@register_strategy("dual_batch")
class DualBatch(OpScheduler[DualBatchOptions]):
    looks_for = (TagUse((Tag.DISPATCH, Tag.COMBINE), "its turns end at every collective instead"),)

    def split(self, batch: Batch) -> Split:
        return cut_at_requests(batch, 2, self.options.min_tokens)

    def schedule(self, s: Schedule) -> None:
        network = [o for o in s.program.operators if o.resource is Resource.NETWORK]
        yields = [o for o in network if {Tag.DISPATCH, Tag.COMBINE} & set(o.tags)] or network
        borders = {o.name for o in yields}
        while s.get_ready_ops():
            for micro_batch in range(s.micro_batches):
                self._turn(s, micro_batch, borders)

    @staticmethod
    def _turn(s: Schedule, micro_batch: int, borders: set[str]) -> None:
        while ready := s.get_ready_ops(micro_batch):
            # network first: it should be on its way while this micro-batch still computes
            task = min(ready, key=lambda t: t.resource is not Resource.NETWORK)
            s.execute(task)
            if task.name in borders:
                return
