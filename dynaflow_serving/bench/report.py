"""The result of a comparison as tables for a terminal, and in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from dynaflow_serving.bench.link import place
from dynaflow_serving.bench.sides import AUTO, STOCK, side_name

CPU_NOTE = (
    "This is a CPU: splitting is expected to lose here, because weights are read once per micro-batch and no hardware "
    "stands idle that a second stream could use. The run shows that DynaFlow is active"
)
CPU_OFFLINE = f"{CPU_NOTE} and exact; its ratio says nothing about a GPU."
CPU_SERVERS = f"{CPU_NOTE}; its gains say nothing about a GPU. Tokens are not compared under load."
LINK_NOTE = (
    "The network is emulated (a rate limit between two network namespaces of this machine); on a CPU the collectives' "
    "own work shares the cores with the compute."
)
HEADS = ("link", "side", "seconds", "ratio to stock", "of the limit", "equal", "steps split")


def tables(result: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield the object that `result.record` returned as tables: the rows, then the facts."""
    title = f"{result['system']} {result['release']} on {result['machine']['device']}; medians (min - max)"
    links = has_links(result)
    limits = any(part["limit"] for part in result["parts"])
    heads = [h for h in HEADS if (h != "link" or links) and (h != "of the limit" or limits)]
    figures = Table(title=title, title_justify="left")
    for head in heads:
        figures.add_column(head, justify="left" if head in ("link", "side") else "right", no_wrap=True)
    for part in result["parts"]:
        for cells in _rows(part):
            figures.add_row(*(cells[head] for head in heads))
        figures.add_section()
    yield figures
    facts = Table(show_header=False, box=None)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for part in result["parts"]:
        where = f"{label(part)}, " if links else ""
        for row in part["rows"]:
            for reason, count in row["unsplit_steps"].items():
                facts.add_row(f"{where}{row_name(row)}, un-split", f"{count}: {reason}")
        if limit := part["limit"]:
            alone = f"compute {number(limit['compute'])}, network {number(limit['network'])} seconds alone"
            facts.add_row(f"{where}limit", f"the longer of {alone}")
    facts.add_row("model", result["model"])
    facts.add_row("pass", result["pass"])
    yield facts


def _rows(part: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the cells of each row of a part by their head, the limit's at last."""
    for row in part["rows"]:
        cells = [label(part), row_name(row), spread(row["seconds"]), spread(row["ratio"]), efficiency(row)]
        cells += ["yes" if row["equal"] else "NO", "" if row["strategy"] == STOCK else str(row["split_steps"])]
        yield dict(zip(HEADS, cells))
    if part["limit"]:
        seconds = max(part["limit"].values())
        most = part["rows"][0]["seconds"]["median"] / seconds
        yield dict(zip(HEADS, [label(part), "limit", number(seconds), f"{number(most)} at most", "", "", ""]))


def conclusions(result: Mapping[str, Any]) -> list[str]:
    """Return in sentences what each strategy gained, and whether outputs are equal."""
    found = []
    for part in result["parts"]:
        where = f"{label(part)}, " if has_links(result) else ""
        told = [_told(row) for row in part["rows"] if row["strategy"] == AUTO or row["split_steps"]]
        found += [f"{where}ratio to stock: {'; '.join(told)}."] if told else []
    compared = [row for part in result["parts"] for row in part["rows"] if row["strategy"] != STOCK]
    equal = sum(row["equal"] for row in compared)
    return [*found, f"Outputs equal stock's in {equal} of {len(compared)} rows."]


def _told(row: Mapping[str, Any]) -> str:
    share = f", {efficiency(row)} of limit" if efficiency(row) else ""
    return f"{row_name(row)} {spread(row['ratio'])}{share}{'' if row['split_steps'] else ', which split no step'}"


def has_links(result: Mapping[str, Any]) -> bool:
    """Whether a part ran over a link with a limit."""
    return any(part["link_mbit"] for part in result["parts"])


def remark(result: Mapping[str, Any]) -> str:
    """Return what has to be known about a run that was not on a GPU."""
    if "tcp" in result["config"]:  # there was an emulated link
        return LINK_NOTE
    return "" if result["machine"]["gpu"] else CPU_OFFLINE


def row_name(row: Mapping[str, Any]) -> str:
    """Return the side of a row in words."""
    return side_name(row["strategy"], row["micro_batches"])


def label(part: Mapping[str, Any]) -> str:
    """Return where a part ran, in words."""
    return place(part["link_mbit"])


def number(value: float) -> str:
    """Write a value with three significant digits, and all of those before the point: 4,778; 36.1; 0.832."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def spread(figure: Mapping[str, float] | None, ratio: bool = False) -> str:
    """Write a spread as `median (least - greatest)`, a ratio below 10 with three decimals."""
    if figure is None:
        return "not measured"
    median, least, greatest = (
        f"{figure[key]:.3f}" if ratio and figure[key] < 10 else number(figure[key]) for key in ("median", "min", "max")
    )
    return f"{median} ({least} - {greatest})"


def efficiency(row: Mapping[str, Any]) -> str:
    """Write the efficiency of a row in per cent; "" where it is not known."""
    return "" if row["efficiency"] is None else f"{row['efficiency']:.0%}"
