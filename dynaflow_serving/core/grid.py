"""A Plan as an action x stream grid, for errors and for `dynaflow explain`.

Contract
- One row an action, one column a stream, in issue order; at most `around` rows on each side of `mark`.
"""

from __future__ import annotations

from dynaflow_serving.core.plan import Plan

WIDTH = 46


def grid(plan: Plan, mark: int = -1, around: int | None = None) -> str:
    """Text of the grid; the row of action `mark` ends in `<-- ERROR HERE`."""
    first, last = 0, len(plan.actions)
    if around is not None and mark >= 0:
        first, last = max(0, mark - around), min(last, mark + around + 1)
    columns = plan.streams
    lines = ["action  " + "".join(f"{c:<{WIDTH}}" for c in columns)]
    if first:
        lines.append(f"  ... {first} earlier actions")
    for i in range(first, last):
        action = plan.actions[i]
        cell = str(action)
        cell = cell if len(cell) < WIDTH else cell[: WIDTH - 4] + "..."
        cells = "".join(f"{cell if c == action.stream else '.':<{WIDTH}}" for c in columns)
        lines.append(f"{i:>6}  {cells}".rstrip() + ("  <-- ERROR HERE" if i == mark else ""))
    if last < len(plan.actions):
        lines.append(f"  ... {len(plan.actions) - last} later actions")
    return "\n".join(lines)
