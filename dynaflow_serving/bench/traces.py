"""Traces of real steps, so that a page shows when each operator of a step ran.

Contract
- Each strategy traces its first two split steps and no more. The second one is shown, for the first one also binds its
  plan.
- A trace costs two readings of the clock per action, and the writing of a file after the step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dynaflow_serving.bench.sides import SEQUENTIAL, Side
from dynaflow_serving.config import TraceOptions
from dynaflow_serving.core.timeline import Timeline

STEPS = 2


@dataclass(frozen=True)
class TracedStep:
    """One step of rank 0, as it ran.

    Attributes:
        side: The name of the side.
        tokens: The tokens of each micro-batch.
        timeline: When its actions ran; of several graphs, the first one's.
    """

    side: str
    tokens: tuple[int, ...]
    timeline: Timeline


def traced(sides: Sequence[Side], folder: Path) -> list[Side]:
    """Return the sides, of which the strategies write traces below `folder`."""
    return [side if _folder(side, folder) is None else _traced(side, folder) for side in sides]


def read_steps(sides: Sequence[Side], folder: Path) -> list[TracedStep]:
    """Return the step to show of each side that traced one."""
    steps = []
    for side in sides:
        where = _folder(side, folder)
        files = sorted(where.glob("*-rank0.json")) or sorted(where.glob("*-rank0-graph0.json")) if where else []
        if files:
            facts = json.loads(files[-1].read_text())["otherData"]
            steps.append(TracedStep(side.name, tuple(facts["tokens"]), Timeline.from_dict(facts["timeline"])))
    return steps


def _traced(side: Side, folder: Path) -> Side:
    assert side.config is not None
    options = TraceOptions(folder=str(_folder(side, folder)), every=1, limit=STEPS)
    return replace(side, config=side.config.model_copy(update={"trace": options}))


def _folder(side: Side, folder: Path) -> Path | None:
    """Return where a side's traces are; None if it writes none."""
    return None if side.config is None or side.strategy == SEQUENTIAL else folder / side.name.replace(" ", "-")
