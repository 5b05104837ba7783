"""NanoFlow (arXiv 2408.12757; DynaFlow paper, section 6): micro-batches in lock-step, with the network beside compute.

The micro-batches take turns, and each runs what is ready. While the all-reduce of micro-batch 0 is on the network
stream, micro-batch 1 computes; then the roles change:

    compute  c0@0  c0@1    c1@0    c1@1
    network        ar@0    ar@1
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.strategy.base import OpScheduler, SplitOptions
from dynaflow_serving.strategy.registry import register_strategy
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.splitting import cut_at_requests, cut_evenly


class NanoFlowOptions(SplitOptions):
    micro_batches: int = Field(2, ge=2, description="how many micro-batches a step is cut into at most")
    min_tokens: int = Field(
        2048, ge=1, description="a step is not split if a micro-batch would have fewer tokens (paper: 4096 a step)"
    )
    cut: Literal["request", "token"] = Field(
        "request", description="cut between requests, or at equal token counts inside a request"
    )


@register_strategy("nanoflow")
class NanoFlow(OpScheduler[NanoFlowOptions]):
    def split(self, batch: Batch) -> Split:
        cut = cut_at_requests if self.options.cut == "request" else cut_evenly
        return cut(batch, self.options.micro_batches, self.options.min_tokens)

    def schedule(self, s: Schedule) -> None:
        while s.get_ready_ops():
            for micro_batch in range(s.micro_batches):
                for task in s.get_ready_ops(micro_batch):
                    s.execute(task)
