"""The start-up table shows which strategy each kind of batch runs under, and why.

Contract
- `as_table` is for people and `log_lines` for logs. Both have one line per decided bucket.
- Both give the predicted (simulated) speed-up and the measured one.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from dynaflow_serving.policy.table import Decision, Table

HEADS = ("batch", "tokens <=", "requests <=", "strategy", "plain ms", "noise", "predicted", "measured (min - max)")


def as_table(table: Table) -> RichTable:
    """Render the decisions as a table for a terminal, with one row per bucket."""
    shown = RichTable(title=_title(table), title_justify="left")
    for head in HEADS:
        shown.add_column(head, justify="left" if head in ("batch", "strategy") else "right", no_wrap=True)
    shown.add_column("why", overflow="fold")
    for d in table.decisions:
        shown.add_row(
            d.kind, str(d.tokens), str(d.requests), d.candidate or "not split",
            "" if d.plain_ms is None else f"{d.plain_ms:.1f}", "" if d.noise is None else f"{d.noise:.1%}",
            _predicted(d), _measured(d), d.reason,
            style="green" if d.candidate else None,
        )  # fmt: skip
    return shown


def log_lines(table: Table) -> Iterator[str]:
    """Yield a title, then one line per bucket."""
    yield _title(table)
    for d in table.decisions:
        figures = {"predicted": _predicted(d), "measured": _measured(d)}
        told = ", ".join([*(f"{name} {figure}" for name, figure in figures.items() if figure), d.reason])
        yield f"{d.bucket}: {d.candidate or 'not split'}: {told}"


def as_text(table: Table, width: int = 160) -> str:
    """Render the table as plain text of at most `width` columns."""
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as captured:
        console.print(as_table(table))
    return captured.get()


def progress_bar(shown: bool) -> Progress:
    """Make the progress bar of a tuning, on stderr; it draws nothing unless `shown`."""
    columns = (TextColumn("DynaFlow tunes: {task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown)


def _title(table: Table) -> str:
    adopted = sum(bool(d.candidate) for d in table.decisions)
    return (
        f"DynaFlow policy: {adopted} of {len(table.decisions)} kinds of batches are split; tuned in {table.seconds:.1f}"
        " s. Speed-ups are over un-split steps; predicted ones are simulated from measured operators."
    )


def _predicted(d: Decision) -> str:
    return "" if d.best is None or d.best.predicted is None else f"{d.best.predicted:.2f}x"


def _measured(d: Decision) -> str:
    best = d.best
    if best is None or best.measured is None:
        return ""
    return f"{best.measured:.2f}x ({min(best.ratios):.2f} - {max(best.ratios):.2f})"
