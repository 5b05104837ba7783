"""A Plan as an action x stream grid, for errors and for `dynaflow explain`.

Contract
- An action has a row and a stream a column, in issue order; at most `around` rows are on each side of `mark`.
"""

from __future__ import annotations

from dynaflow_serving.core.plan import Action, Plan

CELL_WIDTH = 46


def grid(plan: Plan, mark: int = -1, around: int | None = None) -> str:
    """The text of the grid; the row of action `mark` ends in `<-- ERROR HERE`."""
    first, stop = 0, len(plan.actions)
    if around is not None and mark >= 0:
        first, stop = max(0, mark - around), min(stop, mark + around + 1)
    lines = ["action  " + "".join(f"{stream:<{CELL_WIDTH}}" for stream in plan.streams)]
    if first:
        lines.append(f"  ... {first} earlier actions")
    for i in range(first, stop):
        row = f"{i:>6}  {_cells(plan.actions[i], plan.streams)}".rstrip()
        lines.append(f"{row}  <-- ERROR HERE" if i == mark else row)
    if stop < len(plan.actions):
        lines.append(f"  ... {len(plan.actions) - stop} later actions")
    return "\n".join(lines)


def _cells(action: Action, streams: tuple[str, ...]) -> str:
    text = str(action)
    if len(text) >= CELL_WIDTH:
        text = text[: CELL_WIDTH - 4] + "..."
    return "".join(f"{text if stream == action.stream else '.':<{CELL_WIDTH}}" for stream in streams)
