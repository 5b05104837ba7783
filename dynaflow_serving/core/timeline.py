"""When each action of one run of a plan began and ended: measured by an executor, or predicted by the simulator.

Contract
- One class for both, so that they are compared, drawn and written alike; `simulated` says which it is.
- The figures about overlap (`overlap`, `hidden_network`) are computed from the spans, never assumed from the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import median
from typing import Any

from dynaflow_serving.core.parse import parse_plan
from dynaflow_serving.core.plan import Action, Plan


@dataclass(frozen=True, slots=True)
class Span:
    """One action that took time."""

    index: int
    """The place of the action in the plan."""
    action: Action
    start: float
    """Seconds from the start of the run, like `end`."""
    end: float


@dataclass(frozen=True)
class Timeline:
    """One run of a plan."""

    plan: Plan
    spans: tuple[Span, ...]
    """In the order of their starts."""
    network: frozenset[str]
    """The operators that are network operators."""
    simulated: bool
    """Whether the times are predicted; otherwise they are measured."""

    @cached_property
    def makespan(self) -> float:
        """Seconds from the start of the run to its last end."""
        return max((s.end for s in self.spans), default=0.0)

    @cached_property
    def overlapped(self) -> float:
        """Seconds in which two streams or more ran operators."""
        return sum(end - start for start, end, running in self._intervals if len(running) > 1)

    @cached_property
    def exposed_network(self) -> float:
        """Seconds in which nothing but network operators ran."""
        return sum(end - start for start, end, running in self._intervals if all(map(self.is_network, running)))

    @property
    def overlap(self) -> float:
        """Share of the makespan in which streams overlapped, 0 to 1."""
        return self.overlapped / self.makespan if self.makespan else 0.0

    @cached_property
    def hidden_network(self) -> float:
        """Share of the time with network operators in which others ran too, 0 to 1; 0 if there are none."""
        busy = sum(end - start for start, end, running in self._intervals if any(map(self.is_network, running)))
        return 1 - self.exposed_network / busy if busy else 0.0

    def is_network(self, span: Span) -> bool:
        return not self.network.isdisjoint(span.action.operators)

    @cached_property
    def _intervals(self) -> list[tuple[float, float, list[Span]]]:
        """Intervals (start, end, spans that run) between adjacent starts and ends, without the idle ones."""
        times = sorted({t for s in self.spans for t in (s.start, s.end)})
        intervals: list[tuple[float, float, list[Span]]] = []
        running: list[Span] = []
        waiting = sorted(self.spans, key=lambda s: s.start)[::-1]  # the next to start is last
        for start, end in pairwise(times):
            while waiting and waiting[-1].start <= start:
                running.append(waiting.pop())
            running = [s for s in running if s.end > start]
            if running:
                intervals.append((start, end, list(running)))
        return intervals

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for another process."""
        return {
            "plan": self.plan.to_text(),
            "spans": [(s.index, s.start, s.end) for s in self.spans],
            "network": sorted(self.network),
            "simulated": self.simulated,
        }

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Timeline:
        plan = parse_plan(content["plan"])
        spans = tuple(Span(i, plan.actions[i], start, end) for i, start, end in content["spans"])
        return Timeline(plan, spans, frozenset(content["network"]), content["simulated"])


def chrome_trace(timeline: Timeline, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """The run in the format of chrome://tracing and Perfetto: a stream is a thread, times are in microseconds.

    Args:
        timeline: the run.
        facts: what else the file says about the run, under "otherData".
    """
    kind = "simulated" if timeline.simulated else "measured"
    thread = {stream: i for i, stream in enumerate(timeline.plan.streams)}
    names = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": i, "args": {"name": f"{stream} ({kind})"}}
        for stream, i in thread.items()
    ]
    events = [
        {
            "ph": "X",
            "name": str(s.action),
            "cat": "network" if timeline.is_network(s) else "operator",
            "pid": 0,
            "tid": thread[s.action.stream],
            "ts": s.start * 1e6,
            "dur": (s.end - s.start) * 1e6,
            "args": {
                "action": s.index,
                "operators": list(s.action.operators),
                "micro_batches": list(range(s.action.start, s.action.stop)),
                "simulated": timeline.simulated,
            },
        }
        for s in timeline.spans
    ]
    other = {
        "simulated": timeline.simulated,
        "plan": timeline.plan.digest,
        "strategy": timeline.plan.strategy,
        "overlap": timeline.overlap,
        "hidden_network": timeline.hidden_network,
        **(facts or {}),
    }
    return {"traceEvents": names + events, "otherData": other}


def spans_of(plan: Plan, marks: Sequence[tuple[int, float, float]]) -> tuple[Span, ...]:
    """The spans of a run, from (action, start, end) in seconds on any clock: the first start becomes 0."""
    zero = min((start for _, start, _ in marks), default=0.0)
    spans = [Span(i, plan.actions[i], start - zero, end - zero) for i, start, end in marks]
    return tuple(sorted(spans, key=lambda s: (s.start, s.index)))


def operator_times(timelines: Sequence[Timeline]) -> dict[tuple[str, int], float]:
    """Return the median seconds of each (operator, micro-batch) over runs of one plan.

    An action with several operators or micro-batches counts for the first of them.
    """
    seconds: dict[tuple[str, int], list[float]] = {}
    for timeline in timelines:
        for span in timeline.spans:
            if span.action.operators:
                seconds.setdefault((span.action.operators[0], span.action.start), []).append(span.end - span.start)
    return {key: median(values) for key, values in seconds.items()}
