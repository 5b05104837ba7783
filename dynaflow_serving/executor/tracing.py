"""How an executor notes when the actions of a run began and ended.

Contract
- A plan is bound with a tracer or without; without, nothing of this is in its code.
- `stamp` is called on an action's stream right before and after it, `mark` once per action; both may be called by
  several threads. `take` is called after the run, and waits for the device if there is one.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from dynaflow_serving.core.plan import Plan
from dynaflow_serving.core.program import Program, Resource
from dynaflow_serving.core.timeline import Timeline, spans_of


class Tracer(Protocol):
    def stamp(self, stream: Any) -> Any:
        """The time on `stream`, as the executor's generated code names it."""

    def mark(self, action: int, start: Any, end: Any) -> None:
        """Note when action number `action` began and ended."""

    def take(self) -> list[tuple[int, float, float]]:
        """(action, start, end) in seconds of the run that has ended; forgets them."""


class ClockTracer:
    """Takes the time of executors whose operators run on the thread that calls them."""

    def __init__(self) -> None:
        self._marks: list[tuple[int, float, float]] = []

    def stamp(self, stream: Any) -> float:
        return time.perf_counter()

    def mark(self, action: int, start: float, end: float) -> None:
        self._marks.append((action, start, end))

    def take(self) -> list[tuple[int, float, float]]:
        marks, self._marks = self._marks, []
        return marks


class EventTracer:
    """Takes the time of CUDA streams by events, which are read when the device has passed them."""

    def __init__(self, cuda: Any) -> None:
        """`cuda`: `torch.cuda`, or a stand-in."""
        self._cuda = cuda
        self._marks: list[tuple[int, Any, Any]] = []

    def stamp(self, stream: Any) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def mark(self, action: int, start: Any, end: Any) -> None:
        self._marks.append((action, start, end))

    def take(self) -> list[tuple[int, float, float]]:
        marks, self._marks = self._marks, []
        if not marks:
            return []
        self._cuda.synchronize()
        zero = marks[0][1]
        return [(i, zero.elapsed_time(a) / 1e3, zero.elapsed_time(b) / 1e3) for i, a, b in marks]


def measured(program: Program, plan: Plan, tracer: Tracer) -> Timeline:
    """The timeline of the run that `tracer` has seen last."""
    network = frozenset(o.name for o in program.operators if o.resource is Resource.NETWORK)
    return Timeline(plan, spans_of(plan, tracer.take()), network, simulated=False)
