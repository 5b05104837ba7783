"""`Runner`, the interface between the measurement and a system.

Contract
- `start` returns when all sides can run. Sides do the same work in passes of the same number.
- `run` returns when the pass has ended; only one side works at a time.
- A process that dies is noticed, also in the middle of a pass, and is an `EngineProcessError`.
- `close` leaves no process behind, whatever happened.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynaflow_serving.bench.sides import Side
from dynaflow_serving.session.report import WorkerReport

Progress = Callable[[str], None]
COMPUTE, NETWORK = "compute", "network"


@dataclass(frozen=True)
class PassResult:
    """One pass of one side.

    Attributes:
        seconds: Its duration.
        outputs: What has to be equal to the stock system's in the pass of the same number; None if a runner compares.
        difference: How the outputs differ from the stock system's, in words; "" if they do not.
        failed: What did not work in the pass, though it ended; "" if all did.
    """

    seconds: float
    outputs: Any = None
    difference: str = ""
    failed: str = ""


@dataclass(frozen=True)
class SideSteps:
    """The steps of a side so far.

    Attributes:
        split: The number of split steps.
        unsplit: The number of un-split steps, by reason.
        mode: How the system runs the plans, in its own words.
        plan_hash: The digest of the newest plan.
        problem: Why these counts cannot be trusted; "" if they can.
    """

    split: int = 0
    unsplit: dict[str, int] = field(default_factory=dict)
    mode: str = ""
    plan_hash: str = ""
    problem: str = ""


class Runner(abc.ABC):
    """Runs the sides of one comparison.

    Attributes:
        sides: The sides, the stock system first.
        release: The release of the system; known after `start`.
        device: The device in words; known after `start`.
        work: The figures that a pass is about, such as its tokens, for a record.
        settle_seconds: The rest before a pass, after which what ran before no longer spins.
    """

    release: str = ""
    device: str = ""
    settle_seconds: float = 0.0

    def __init__(self, sides: Sequence[Side]) -> None:
        self.sides = sides

    @abc.abstractmethod
    def start(self, progress: Progress) -> None:
        """Start all sides, and say what begins (`stages` times)."""

    @property
    @abc.abstractmethod
    def stages(self) -> int:
        """How often `start` calls its `progress`."""

    @abc.abstractmethod
    def run(self, side: Side, number: int) -> PassResult:
        """Run the pass of that number; 0 is the warm-up."""

    @abc.abstractmethod
    def steps(self, side: Side) -> SideSteps:
        """Return the steps of a side under DynaFlow since `start`."""

    @abc.abstractmethod
    def close(self) -> None:
        """End everything."""

    @property
    def alone(self) -> Mapping[str, Callable[[int], float]]:
        """What measures the parts of a pass alone, `COMPUTE` and `NETWORK`, in seconds; it takes the number of a pass.

        It is empty where the parts cannot be told apart.
        """
        return {}

    def begin_part(self) -> None:  # noqa: B027
        """Prepare for passes over a link whose rate has been set: a policy decides anew."""

    def details(self, side: Side) -> dict[str, Any]:
        """Return more about a side for the record."""
        return {}


def steps_of(reports: Sequence[WorkerReport]) -> SideSteps:
    """Return what the reports of all ranks say, rank 0's first."""
    first = reports[0]
    agree = all((r.steps, r.plan_hash) == (first.steps, first.plan_hash) for r in reports)
    return SideSteps(
        split=first.steps.split,
        unsplit=dict(first.steps.unsplit),
        mode=first.mode,
        plan_hash=first.plan_hash,
        problem=""
        if agree
        else "The ranks report different steps or plans: they must all run one plan. Please report it.",
    )
