"""One step of the engine: its batch, how it is cut, and what is asked of it.

Contract
- Only data; `Session.step` makes and runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dynaflow_serving.core.batch import Batch, MicroBatch, Split
from dynaflow_serving.core.timeline import Timeline
from dynaflow_serving.executor.base import BoundPlan
from dynaflow_serving.session.plan_cache import PlanCache

UNDECIDED = Split(())


@dataclass
class Trial:
    """What the steps in `with session.trial(candidate):` took."""

    candidate: str
    profiled: bool  # whether split steps are traced
    seconds: float = 0.0  # of all steps, from begin to end, as far as the clock has told
    timelines: list[tuple[PlanCache, Timeline]] = field(default_factory=list)


class Step:
    """One step. `plan_caches`: of the programs that it runs.

    Attributes:
        split: how the batch is cut; it holds until the step has ended.
        number: among the steps under a chosen plan, from 1; 0 for the others and for a trial.
        to_trace, to_compare: whether an observer has asked for a trace, or for an un-split run beside it.
        planned: whether it runs under a plan that somebody chose, split or not.
        saved: seconds that the split saved, by the guard's estimate.
    """

    __slots__ = ("batch", "number", "plan_caches", "planned", "saved", "split", "to_compare", "to_trace", "trial")

    def __init__(self, batch: Batch, plan_caches: Sequence[PlanCache], trial: Trial | None = None) -> None:
        self.batch, self.plan_caches, self.trial = batch, plan_caches, trial
        self.split = UNDECIDED
        self.number = 0
        self.to_trace = self.to_compare = self.planned = False
        self.saved = 0.0

    @property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """Empty where the whole batch runs at once, and while shadow mode runs a split step un-split."""
        parts = self.split.micro_batches
        return parts if len(parts) > 1 else ()

    def plan(self, plan_cache: PlanCache) -> BoundPlan:
        """What runs the program of `plan_cache` in this split step."""
        return plan_cache.prepare(self.split.signature, traced=self.to_trace)
