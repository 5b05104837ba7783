"""One plan on one batch: what it did, what it was predicted to do, and the un-split step beside it.

Contract
- Seconds everywhere. `alone` and `measured` were measured, `predicted` was simulated from `alone` and nothing else: no
  contention, no hand-off between threads, no time of the host is in it.
- Among several runs the one with the median makespan is shown, for a picture of medians is a picture of no run, with
  the least and the greatest makespan; the times of single operators are medians over the runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from dynaflow_serving.core.program import Program
from dynaflow_serving.core.timeline import Timeline
from dynaflow_serving.simulate.cost import Measured
from dynaflow_serving.simulate.engine import simulate

OperatorTimes = Mapping[tuple[str, int], float]  # (operator, micro-batch) -> seconds


@dataclass(frozen=True)
class EngineStep:
    """Runs of a whole step of an engine, with what it does before and after the model; not traced. Split and un-split
    ones are of two starts of the engine."""

    split: Sequence[float]
    unsplit: Sequence[float]

    @property
    def speed_up(self) -> float:
        return median(self.unsplit) / median(self.split)

    def __str__(self) -> str:
        whole, parts = (
            f"{median(s) * 1e3:.3g} ms ({min(s) * 1e3:.3g} - {max(s) * 1e3:.3g})" for s in (self.unsplit, self.split)
        )
        return (
            f"{whole} un-split, {parts} under the plan, {self.speed_up:.2f}x as fast (medians, least - greatest, "
            "of two starts)"
        )


@dataclass(frozen=True)
class Shown:
    """What one row of a picture shows: one run of several, or a simulation."""

    what: str
    timeline: Timeline
    least: float  # makespan over the runs
    greatest: float

    @staticmethod
    def of(what: str, runs: Sequence[Timeline]) -> Shown:
        ordered = sorted(runs, key=lambda t: t.makespan)
        return Shown(what, ordered[(len(ordered) - 1) // 2], ordered[0].makespan, ordered[-1].makespan)


@dataclass(frozen=True)
class PlanComparison:
    program: Program
    tokens: tuple[int, ...]  # of each micro-batch
    alone: OperatorTimes  # the same micro-batches in turn, on one stream
    planned: Shown
    predicted: Shown
    unsplit: Shown | None = None  # None where an engine runs un-split steps its own way
    engine_step: EngineStep | None = None

    @property
    def measured(self) -> Timeline:
        """Of the plan."""
        return self.planned.timeline

    @property
    def shown(self) -> list[Shown]:
        first = [] if self.unsplit is None else [self.unsplit]
        return [*first, self.planned, self.predicted]


def compare(
    program: Program,
    tokens: tuple[int, ...],
    planned: Sequence[Timeline],
    in_turn: Sequence[Timeline],
    unsplit: Sequence[Timeline] = (),
    engine_step: EngineStep | None = None,
) -> PlanComparison:
    """planned: runs of the plan; in_turn: of the same micro-batches under `sequential`.

    Raises `ConfigError` for an operator of the plan that `in_turn` lacks."""
    alone = operator_times(in_turn)
    measured = Shown.of("plan, measured", planned)
    plan = measured.timeline.plan
    predicted = Shown.of("plan, predicted", [simulate(plan, Measured(program, alone).demands(plan))])
    whole = Shown.of("un-split, measured", unsplit) if unsplit else None
    return PlanComparison(program, tokens, alone, measured, predicted, whole, engine_step)


def operator_times(timelines: Sequence[Timeline]) -> dict[tuple[str, int], float]:
    """Medians over runs of one plan. A step with several operators or micro-batches counts for the first of them."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for timeline in timelines:
        for span in timeline.spans:
            if span.action.operators:
                seconds.setdefault((span.action.operators[0], span.action.start), []).append(span.end - span.start)
    return {key: median(values) for key, values in seconds.items()}
