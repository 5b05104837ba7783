"""`OpScheduler`, the base class of strategies: it decides the split and the order.

Contract
- A strategy's Python runs while recording, once per Program x Split signature, never in the hot path.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.program import Program
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.strategy.rules import Rule
from dynaflow_serving.strategy.schedule import Schedule


class Options(BaseModel):
    """Base of every strategy's options: unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OpScheduler(abc.ABC):
    """A strategy. Subclass, set `name`, write `schedule`, register with `@register_strategy`."""

    name: ClassVar[str] = ""
    Options: ClassVar[type[Options]] = Options
    annotations: ClassVar[tuple[Rule, ...]] = ()
    schedules_unsplit: ClassVar[bool] = False  # whether `schedule` also orders steps of one micro-batch

    def __init__(self, options: BaseModel | None = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    @property
    def max_micro_batches(self) -> int:
        """How many micro-batches `split` makes at most: engines prepare for as many."""
        return int(getattr(self.options, "micro_batches", 2))

    def of(self, candidate: str) -> OpScheduler:
        """The strategy behind `Split.candidate`: of one that chooses among several, the chosen one."""
        return self

    @property
    def candidates(self) -> tuple[str, ...]:
        """All that `Split.candidate` may be."""
        return ("",)

    @abc.abstractmethod
    def split(self, batch: Batch) -> Split:
        """Cut one step's batch. Called every step: keep it to microseconds (see `splitting`)."""

    @abc.abstractmethod
    def schedule(self, s: Schedule) -> None:
        """Execute every task of `s` in some order and on some streams."""

    def record(self, program: Program, micro_batches: int, depends: Iterable[tuple[int, int]] = ()) -> Schedule:
        """Run `schedule` and return the finished recording; raises `ScheduleError` if tasks are left."""
        s = Schedule(program, micro_batches, depends)
        self.schedule(s)
        if s.unfinished:
            ready = [f"{t.name}@{t.micro_batch}" for t in s.get_ready_ops()]
            left = len(s._before) - len(s._done)
            why = f"ready but not executed: {', '.join(ready[:5])}" if ready else "they wait for one another"
            raise ScheduleError(f"strategy {self.name!r} left {left} operators unexecuted ({why})")
        return s
