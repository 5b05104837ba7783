"""The comparison of servers as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from dynaflow_serving.bench.report import spread
from dynaflow_serving.bench.serving.record import LOSS, WIN, headline

STYLES = {WIN: "green", LOSS: "red"}


def tables(result: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield the headline figures, then what DynaFlow's side did."""
    title = f"{result['engine']} {result['engine_version']} servers on {result['machine']['device']}"
    figures = Table(title=title, title_justify="left", caption="gain above 1: dynaflow is better")
    for name in ("load", "figure"):
        figures.add_column(name)
    for name in ("baseline", "dynaflow", "gain"):
        figures.add_column(name, justify="right")
    figures.add_column("verdict")
    for row in headline(result):
        style = STYLES.get(row["verdict"])
        values = (spread(row["baseline"]), spread(row["dynaflow"]), spread(row["gain"], ratio=True))
        figures.add_row(row["load"], f"{row['label']} ({row['unit']})", *values, row["verdict"], style=style)
    yield figures
    facts = Table(show_header=False, box=None)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for strategy, count in result["steps"]["split"].items():
        facts.add_row("steps split", f"{count}: {strategy}")
    for reason, count in result["steps"]["unsplit"].items():
        facts.add_row("steps un-split", f"{count}: {reason}")
    facts.add_row("model", result["model"])
    facts.add_row("pairs per load", str(result["pairs"]))
    yield facts
