"""What `dynaflow explain` prints: an explanation at a glance, and the full text.

Contract
- The picture comes first: how the batch is cut, and which operators run side by side on which stream. Then there is a
  table of the operators.
- Weights are counted. Operators of several layers share a row of the table, if the rest of it is the same.
- The full text is every Program and Plan as `dynaflow check` reads them. Nothing before it begins like one of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dynaflow_serving.bench.result import is_small
from dynaflow_serving.core.batch import Split
from dynaflow_serving.core.grid import rows_of_runs
from dynaflow_serving.core.plan import Action, Plan, range_text
from dynaflow_serving.core.program import Operator, Program, Scope
from dynaflow_serving.picture.example_plans import describe
from dynaflow_serving.picture.explanation import Explanation

ROWS = 60  # of a grid, unless all are asked for
NAMES = 4  # so many values are listed by name, more are counted
COUNTS = ("in", "weights", "out")
HEADS = ("operator", "resource", "stream", "tags", *COUNTS, "state")
MICRO_BATCH_STYLES = ("cyan", "yellow", "magenta", "green")
_LAYER = re.compile(r"(.*?)(?<![\w-])(\d+)(\..*)")  # a dotted name: up to its first number, the number, the rest


def overview(explanation: Explanation, *, full: bool = False) -> Iterator[RenderableType]:
    """Yield what there is to print: texts, which need no wrapping, and tables.

    Args:
        explanation: The explanation to print.
        full: Whether grids have all rows, and the text of Programs and Plans follows.
    """
    yield Text(f"{explanation.model}, strategy {explanation.strategy}", style="bold")
    yield from map(Text, _split_lines(explanation.tokens, explanation.split))
    yield from (Text(f"note: {sentence}") for sentence in explanation.missing)
    for program in explanation.programs:
        plans = [plan for plan in explanation.plans if plan.program == program.digest]
        for plan in plans:
            yield from _grid(program, plan, None if full else ROWS)
        yield Text()
        yield _operators(program, plans)
        yield Text(_values_line(program))
    if full:
        for part in (*explanation.programs, *explanation.plans):
            yield Text(f"\n{part.to_text()}", end="")
    else:
        what = "the program and the plan" if explanation.plans else "the program"
        yield Text(f"\n--full prints {what} as text", style="dim")


def _split_lines(tokens: Sequence[int], split: Split) -> Iterator[str]:
    yield f"split of {len(tokens)} requests, {sum(tokens)} tokens"
    if len(split.micro_batches) == 1:
        yield f"  not split: {split.reason}"
        if is_small(split.reason):
            yield "  to split it: lower the strategy's threshold (-o min_tokens=1), or try a larger --batch"
        return
    for i, part in enumerate(split.micro_batches):
        (r0, r1), (t0, t1) = part.requests, part.tokens
        yield f"  micro-batch {i}: requests {r0}..{r1 - 1}, tokens {t0}..{t1 - 1} ({t1 - t0})"
    for earlier, later in split.depends:
        yield f"  micro-batch {later} reads the KV cache that {earlier} writes"


def _grid(program: Program, plan: Plan, most: int | None) -> Iterator[RenderableType]:
    """Yield which operators run side by side, in at most so many rows."""
    yield Text(f"\n{describe(program, plan)}")
    yield Text("@ is the micro-batch; operators of one row may run at the same time\n")
    rows = rows_of_runs(plan)
    table = _table()
    for stream in plan.streams:
        table.add_column(stream, overflow="fold")
    for row in rows[:most]:
        table.add_row(*(_cell(row[stream]) if stream in row else "." for stream in plan.streams))
    yield table
    if left_out := len(rows) - len(rows[:most]):
        yield Text(f"... {left_out} more rows (--full shows them)")


def _cell(action: Action) -> Text:
    name = " + ".join(action.operators)
    if action.kernel:
        name = f"{action.kernel}({name})"
    style = MICRO_BATCH_STYLES[action.start % len(MICRO_BATCH_STYLES)] if action.stop - action.start == 1 else ""
    return Text(f"{name} {range_text(action.start, action.stop)}", style=style)


def _operators(program: Program, plans: Sequence[Plan]) -> Table:
    """Render the operators, with a row for those of several layers that are alike."""
    streams: dict[str, dict[str, None]] = {operator.name: {} for operator in program.operators}
    for action in (action for plan in plans for action in plan.actions):
        for name in action.operators:
            streams[name][action.stream] = None
    layers: dict[tuple[str, ...], list[str]] = {}  # by the rest of the name and the facts
    for operator in program.operators:
        found = _LAYER.fullmatch(operator.name)
        before, layer, after = found.groups() if found else (operator.name, "", "")
        layers.setdefault((before, after, *_facts(program, operator, streams[operator.name])), []).append(layer)
    rows = [(before + _ranges(numbers) + after, *facts) for (before, after, *facts), numbers in layers.items()]
    shown = [i for i in range(len(HEADS)) if any(row[i] for row in rows)]
    table = _table()
    for head in (HEADS[i] for i in shown):
        # Streams and tags give way in a narrow terminal.
        table.add_column(head, justify="right" if head in COUNTS else "left", no_wrap=head not in ("stream", "tags"))
    for row in rows:
        table.add_row(*(Text(row[i]) for i in shown))
    return table


def _facts(program: Program, operator: Operator, streams: Iterable[str]) -> tuple[str, ...]:
    """Return the cells under `HEADS`, without the name."""
    scopes = Counter(program.values[name].scope for name in operator.inputs)
    return (
        operator.resource.value,
        " ".join(streams),
        " ".join(operator.tags),
        str(scopes[Scope.BATCH] + scopes[Scope.LOCAL]),
        str(scopes[Scope.SHARED]),
        str(len(operator.outputs)),
        " ".join(what for what, names in (("read", operator.reads), ("written", operator.writes)) if names),
    )


def _ranges(numbers: Sequence[str]) -> str:
    """Write increasing numbers, such as `0-3,5`."""
    runs: list[list[str]] = []
    for number in numbers:
        if runs and int(number) == int(runs[-1][-1]) + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(run) for run in runs)


def _values_line(program: Program) -> str:
    scopes = {name: program.values[name].scope for name in program.inputs}
    inputs = [name for name, scope in scopes.items() if scope in (Scope.BATCH, Scope.LOCAL)]
    weights = sum(scope is Scope.SHARED for scope in scopes.values())
    return f"inputs: {_listed(inputs)}; {weights} weights; outputs: {_listed(program.outputs)}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none" if len(names) <= NAMES else f"{len(names)} values"


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
