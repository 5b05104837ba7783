"""`skewed`: micro-batch k trails micro-batch k - 1 by `skew` operators (docs/strategies/write-your-own.md)."""

from pydantic import Field

from dynaflow_serving import Batch, OpScheduler, Schedule, Split, SplitOptions, cut_at_requests, register_strategy


class SkewedOptions(SplitOptions):
    skew: int = Field(4, ge=0, description="how many operators a micro-batch trails the one before it")


@register_strategy("skewed")
class Skewed(OpScheduler[SkewedOptions]):
    def split(self, batch: Batch) -> Split:
        return cut_at_requests(batch, self.options.micro_batches, self.options.min_tokens)

    def schedule(self, s: Schedule) -> None:
        done = [0] * s.micro_batches
        while ready := s.get_ready_ops():
            task = min(ready, key=lambda t: done[t.micro_batch] + self.options.skew * t.micro_batch)
            s.execute(task)
            done[task.micro_batch] += 1
