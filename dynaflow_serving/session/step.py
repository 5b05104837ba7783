"""A `Step` is one step of the engine: its batch, the cut of the batch, and the samples that observers ask for.

Contract
- A step is only data. `Session.step` makes and runs it.
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
    """A trial collects the times of the steps in `with session.trial(candidate):`.

    Attributes:
        candidate: The selector splits the steps as this candidate does.
        profiled: Whether split steps are traced.
        seconds: All steps together took so long, as far as the clock has told.
        timelines: The timelines of split steps, with their programs; empty unless `profiled`.
    """

    candidate: str
    profiled: bool
    seconds: float = 0.0
    timelines: list[tuple[PlanCache, Timeline]] = field(default_factory=list)


class Step:
    """A step runs one batch of the engine.

    Attributes:
        batch: The requests of the step.
        plan_caches: The plans of the programs that the step runs.
        trial: The trial that the step is part of, or None.
        split: The cut of the batch; it holds until the step has ended.
        number: Steps under a chosen plan are numbered from 1. It is 0 for other steps and in a trial.
        to_trace: Whether an observer has asked for a trace.
        to_compare: Whether the step also runs un-split, and is compared.
        planned: Whether the step runs under a plan that the selector chose, split or not.
        saved: The plan saved so many seconds, by the guard's estimate.
    """

    # Every step of the engine makes one object: what most steps leave as it is belongs to the class.
    split: Split = UNDECIDED
    number = 0
    to_trace = False
    to_compare = False
    planned = False
    saved = 0.0

    def __init__(self, batch: Batch, plan_caches: Sequence[PlanCache], trial: Trial | None = None) -> None:
        self.batch, self.plan_caches, self.trial = batch, plan_caches, trial

    @property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """They are empty where the whole batch runs at once, as in the un-split run of a comparison."""
        parts = self.split.micro_batches
        return parts if len(parts) > 1 else ()

    def plan(self, plan_cache: PlanCache) -> BoundPlan:
        """Return the plan that runs the program of `plan_cache` in this split step."""
        return plan_cache.prepare(self.split.signature, traced=self.to_trace)
