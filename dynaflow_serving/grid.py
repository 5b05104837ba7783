"""A Plan as a step x stream grid, for errors and for `dynaflow explain`.

Contract
- One row a step, one column a stream, in issue order; at most `around` rows on each side of `mark`.
"""

from __future__ import annotations

from dynaflow_serving.ir import Plan
from dynaflow_serving.text import step_text

WIDTH = 46


def grid(plan: Plan, mark: int = -1, around: int | None = None) -> str:
    """Text of the grid; the row of step `mark` ends in `<-- ERROR HERE`."""
    first, last = 0, len(plan.steps)
    if around is not None and mark >= 0:
        first, last = max(0, mark - around), min(last, mark + around + 1)
    columns = plan.streams
    lines = ["step  " + "".join(f"{c:<{WIDTH}}" for c in columns)]
    if first:
        lines.append(f"  ... {first} earlier steps")
    for i in range(first, last):
        step = plan.steps[i]
        cell = step_text(step)
        cell = cell if len(cell) < WIDTH else cell[: WIDTH - 4] + "..."
        cells = "".join(f"{cell if c == step.stream else '.':<{WIDTH}}" for c in columns)
        lines.append(f"{i:>4}  {cells}".rstrip() + ("  <-- ERROR HERE" if i == mark else ""))
    if last < len(plan.steps):
        lines.append(f"  ... {len(plan.steps) - last} later steps")
    return "\n".join(lines)
