"""An observer looks at a worker's steps: counters, metrics, traces and the policy's guard are observers.

Contract
- A `Session` tells its observers of every step that is not a trial, in the order in which they were added. It tells
  them of every comparison, also in a trial.
- An observer overrides the methods that it needs. Methods that are not overridden are not called.
- `decided` runs before the step, on all ranks alike. There an observer may ask for a trace.
- `timed` may come later than the end of the step (a device's clock), or never (a failed step).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from dynaflow_serving.core.timeline import Timeline
from dynaflow_serving.session.step import Step


class Observer:
    """This is the base of all observers; none of its methods does anything."""

    def decided(self, step: Step) -> None:
        """`step` begins, and its split has been decided."""

    def withdrew(self, step: Step, reason: str) -> None:
        """`step` was counted as split, but did not run under its plan."""

    def compared(self, step: Step, equal: bool) -> None:
        """`step` also ran un-split."""

    def traced(self, step: Step, timelines: Sequence[Timeline]) -> None:
        """`step` has ended. `timelines` say when its actions ran, one per graph."""

    def timed(self, step: Step, seconds: float) -> None:
        """`step` took `seconds` from begin to end."""

    def left(self) -> None:
        """A step has ended or failed."""


def overridden(observers: Sequence[Observer], name: str) -> list[Callable[..., Any]]:
    """Return the methods called `name` of those observers that override it."""
    return [getattr(o, name) for o in observers if getattr(type(o), name) is not getattr(Observer, name)]


class StepCounts(Observer):
    """This observer counts the split steps, and the un-split ones by reason."""

    def __init__(self) -> None:
        self.split = 0
        self.unsplit: Counter[str] = Counter()

    def decided(self, step: Step) -> None:
        split = step.split
        if len(split.micro_batches) > 1:
            self.split += 1
        else:
            self.unsplit[split.reason] += 1

    def withdrew(self, step: Step, reason: str) -> None:
        self.split -= 1
        self.unsplit[reason] += 1

    def reset(self) -> None:
        """Count from zero."""
        self.split = 0
        self.unsplit.clear()
