"""The benchmark of engines as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table

ROWS = {
    "requests/s": "requests_per_s",
    "output tokens/s": "output_tokens_per_s",
    "total tokens/s": "total_tokens_per_s",
}
CPU_NOTE = (
    "This is a CPU: splitting is expected to lose here, because weights are read once per micro-batch and no hardware "
    "stands idle that a second stream could use. The run shows that DynaFlow is active"
)
CPU_OFFLINE = f"{CPU_NOTE} and exact; its ratio says nothing about a GPU."
CPU_SERVERS = f"{CPU_NOTE}; its gains say nothing about a GPU. Tokens are not compared under load."


def tables(result: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield the object that `result.record` returned as tables: the figures, then the facts."""
    ratio = result["ratio"]
    figures = Table(title=f"{result['engine']} {result['engine_version']} on {result['device']}", title_justify="left")
    for name in ("", "baseline", "dynaflow"):
        figures.add_column(name, justify="right" if name else "left")
    for label, key in ROWS.items():
        figures.add_row(label, *(f"{result[side][key]:,.1f}" for side in ("baseline", "dynaflow")))
    figures.add_section()
    figures.add_row("ratio, median of pairs", "1", f"{ratio['median']:.3f}")
    figures.add_row("ratio, min - max", "", f"{ratio['min']:.3f} - {ratio['max']:.3f}")
    yield figures
    facts = Table(show_header=False, box=None)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("tokens equal", "yes" if result["tokens_equal"] else "NO")
    facts.add_row("steps split", str(result["steps"]["split"]))
    for reason, count in result["steps"]["unsplit"].items():
        facts.add_row("steps un-split", f"{count}: {reason}")
    facts.add_row("strategy", f"{result['strategy']} (mode: {result['mode']})")
    facts.add_row("plan hash", result["plan_hash"] or "(none)")
    facts.add_row("model", result["model"])
    facts.add_row("pairs", str(len(result["pairs"])))
    yield facts
