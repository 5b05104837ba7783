"""Comparisons as one self-contained HTML page.

Contract
- `render` is a pure function of its arguments, and the page refers to nothing outside of itself.
- Every figure says whether it was measured or simulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynaflow_serving.bench.pages import templates
from dynaflow_serving.core.grid import grid
from dynaflow_serving.core.timeline import operator_times
from dynaflow_serving.picture.comparison import PlanComparison, ShownTimeline
from dynaflow_serving.picture.figure import draw


@dataclass(frozen=True)
class Caption:
    """The title says what was run; the notes say where, and what to know about it."""

    title: str
    notes: tuple[str, ...]

    @property
    def text(self) -> str:
        """The notes as sentences."""
        return ". ".join(self.notes) + "."


def render(comparisons: Sequence[PlanComparison], caption: Caption, command: str) -> str:
    """Return the page.

    Args:
        comparisons: One per Program, each for a part of the page.
        caption: The title and the notes.
        command: The command that the user typed.
    """
    from markupsafe import Markup

    environment = templates(Path(__file__).parent)
    environment.filters |= {"ms": _milliseconds, "us": _microseconds, "percent": "{:.0%}".format}
    parts = [
        {
            "comparison": c,
            "svg": Markup(draw(c.shown, c.tokens)),
            "rows": [_figures(shown, c.unsplit) for shown in c.shown],
            "operators": _operators(c),
            "plan": c.measured.plan,
            "grid": grid(c.measured.plan),
            "program": c.program.to_text(),
        }
        for c in comparisons
    ]
    page: str = environment.get_template("page.html.j2").render(caption=caption, parts=parts, command=command)
    return page


def _figures(shown: ShownTimeline, unsplit: ShownTimeline | None) -> dict[str, Any]:
    timeline = shown.timeline
    several = len(timeline.plan.streams) > 1
    network = any(map(timeline.is_network, timeline.spans))
    return {
        "what": shown.what,
        "seconds": timeline.makespan,
        "runs": (shown.least, shown.greatest) if shown.greatest > shown.least else None,
        "speed_up": unsplit.timeline.makespan / timeline.makespan if unsplit and timeline.makespan else 0.0,
        "overlap": timeline.overlap if several else None,
        "hidden": timeline.hidden_network if several and network else None,
    }


def _operators(comparison: PlanComparison) -> list[dict[str, Any]]:
    """Return each operator of the Program with its seconds per micro-batch, in turn and under the plan."""
    planned = operator_times([comparison.measured])
    together = {
        name: f"in {s.action.kernel or s.action.operators[0]} {s.action.start}..{s.action.stop - 1}"
        for s in comparison.measured.spans
        for name in s.action.operators
        if len(s.action.operators) > 1 or s.action.stop - s.action.start > 1
    }
    parts = range(len(comparison.tokens))
    return [
        {
            "operator": operator,
            "alone": [comparison.alone.get((operator.name, i)) for i in parts],
            "planned": [None if operator.name in together else planned.get((operator.name, i)) for i in parts],
            "together": together.get(operator.name, ""),
        }
        for operator in comparison.program.operators
    ]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def _microseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:,.1f}" if seconds < 1e-4 else f"{seconds * 1e6:,.0f}"
