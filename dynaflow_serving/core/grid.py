"""A Plan as a grid whose columns are streams: `grid` for errors, `rows_of_runs` for `dynaflow explain`.

Contract
- In `grid`, an action has a row, in issue order; at most `around` rows are on each side of `mark`.
- `rows_of_runs` has operators and kernels only. Those of one row wait for none of each other.
"""

from __future__ import annotations

from dynaflow_serving.core.plan import Action, ActionKind, Plan

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


def rows_of_runs(plan: Plan) -> list[dict[str, Action]]:
    """Return the rows, each a RUN or REPLACE by stream: the schedule if each of them took equally long."""
    rows: list[dict[str, Action]] = []
    free = dict.fromkeys(plan.streams, 0)  # the first row that a stream may fill
    recorded: dict[int, int] = {}  # the first row after an event
    for action in plan.actions:
        stream = action.stream
        match action.kind:
            case ActionKind.RECORD:
                recorded[action.event] = free[stream]
            case ActionKind.WAIT:
                free[stream] = max(free[stream], recorded[action.event])
            case ActionKind.RUN | ActionKind.REPLACE:
                rows += ({} for _ in range(free[stream] + 1 - len(rows)))
                rows[free[stream]][stream] = action
                free[stream] += 1
    return rows


def _cells(action: Action, streams: tuple[str, ...]) -> str:
    text = str(action)
    if len(text) >= CELL_WIDTH:
        text = text[: CELL_WIDTH - 4] + "..."
    return "".join(f"{text if stream == action.stream else '.':<{CELL_WIDTH}}" for stream in streams)
