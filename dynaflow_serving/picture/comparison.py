"""One plan on one batch: what it did, what it was predicted to do, and the un-split step beside it.

Contract
- All times are seconds. `alone` and `measured` were measured. `predicted` was simulated from `alone` and nothing else,
  so it contains no contention, no hand-off between threads and no time of the host.
- Among several runs the one with the median makespan is shown, with the least and the greatest makespan. A picture of
  medians would be a picture of no run. The times of single operators are medians over the runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from dynaflow_serving.core.measurement import Spread
from dynaflow_serving.core.program import Program
from dynaflow_serving.core.timeline import Timeline, operator_times
from dynaflow_serving.simulate.cost import MeasuredCosts
from dynaflow_serving.simulate.engine import simulate

OperatorTimes = Mapping[tuple[str, int], float]  # (operator, micro-batch) -> seconds


@dataclass(frozen=True)
class EngineStep:
    """The seconds of an engine's full steps, with all that it does before and after the model; they are not traced.

    The split and the un-split steps are of two starts of the engine.
    """

    split: Sequence[float]
    unsplit: Sequence[float]

    @property
    def speed_up(self) -> float:
        """The median un-split step over the median split step."""
        return median(self.unsplit) / median(self.split)

    def __str__(self) -> str:
        unsplit, split = (
            f"{s.median * 1e3:.3g} ms ({s.min * 1e3:.3g} - {s.max * 1e3:.3g})"
            for s in map(Spread.of_values, (self.unsplit, self.split))
        )
        return (
            f"{unsplit} un-split, {split} under the plan, {self.speed_up:.2f}x as fast (medians, least - greatest, "
            "of two starts)"
        )


@dataclass(frozen=True)
class ShownTimeline:
    """One row of a picture: one run of several, or a simulation.

    Attributes:
        what: What is shown, in words.
        timeline: The run with the median makespan.
        least: The least makespan over the runs.
        greatest: The greatest.
    """

    what: str
    timeline: Timeline
    least: float
    greatest: float

    @staticmethod
    def among(what: str, runs: Sequence[Timeline]) -> ShownTimeline:
        """Return the row that shows the run with the median makespan."""
        ordered = sorted(runs, key=lambda t: t.makespan)
        median_run = ordered[(len(ordered) - 1) // 2]
        return ShownTimeline(what, median_run, least=ordered[0].makespan, greatest=ordered[-1].makespan)


@dataclass(frozen=True)
class PlanComparison:
    """One plan on one batch.

    Attributes:
        program: The Program that the plan runs.
        tokens: The tokens of each micro-batch.
        alone: The operators' times in the same micro-batches one after another, on one stream.
        planned: The plan, measured.
        predicted: The plan, simulated from `alone`.
        unsplit: The un-split step, measured; None where an engine runs such steps its own way.
        engine_step: The engine's full steps; None for an example.
    """

    program: Program
    tokens: tuple[int, ...]
    alone: OperatorTimes
    planned: ShownTimeline
    predicted: ShownTimeline
    unsplit: ShownTimeline | None = None
    engine_step: EngineStep | None = None

    @property
    def measured(self) -> Timeline:
        """The plan's timeline, measured."""
        return self.planned.timeline

    @property
    def shown(self) -> list[ShownTimeline]:
        """The rows of a picture, from top to bottom."""
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
    """Compare the runs of a plan with what their operators' times predict.

    Args:
        program: The Program that the plan runs.
        tokens: The tokens of each micro-batch.
        planned: Runs of the plan.
        in_turn: Runs of the same micro-batches under `sequential`.
        unsplit: Runs of the un-split step, if there are any.
        engine_step: The engine's full steps, if an engine ran the plan.

    Raises:
        ConfigError: An operator of the plan is not in `in_turn`.
    """
    alone = operator_times(in_turn)
    measured = ShownTimeline.among("plan, measured", planned)
    plan = measured.timeline.plan
    predicted = ShownTimeline.among("plan, predicted", [simulate(plan, MeasuredCosts(program, alone).demands(plan))])
    return PlanComparison(
        program=program,
        tokens=tokens,
        alone=alone,
        planned=measured,
        predicted=predicted,
        unsplit=ShownTimeline.among("un-split, measured", unsplit) if unsplit else None,
        engine_step=engine_step,
    )
