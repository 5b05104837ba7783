"""The report's plots, as SVG for a page: no file, no external address, text as text.

Contract
- Points are medians over the pairs, bars reach from the least to the greatest.
- A plot leaves out only figures that were not measured; without any figure, the plot is "".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynaflow_serving.bench.pages import svg
from dynaflow_serving.bench.serving.record import LOSS, NOISE, WIN
from dynaflow_serving.bench.serving.run import BASELINE, DYNAFLOW

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {BASELINE: "#5b6472", DYNAFLOW: "#1f6fb4", WIN: "#1a7f37", LOSS: "#c62828", NOISE: "#8a8f98", "": "#8a8f98"}
MARKERS = {BASELINE: "s", DYNAFLOW: "o"}
THROUGHPUT = "output_tokens_per_s"
WIDE = 4.0  # greatest over least gain, from where on the axis is logarithmic,
VERY_WIDE = 1000.0  # and has a label per decade only


def pareto(loads: Sequence[Mapping[str, Any]]) -> str:
    """Draw the output throughput of one data set's loads over their median TPOT and TTFT.

    Each side has a line, and each rate a point on it.
    """
    if not any(_has(load, THROUGHPUT) for load in loads):
        return ""
    figure, axes = _figure(10, 3.9, columns=2)
    for panel, (key, label) in zip(axes, (("tpot median", "TPOT, median (ms)"), ("ttft median", "TTFT, median (ms)"))):
        drawn = [load for load in loads if _has(load, THROUGHPUT) and _has(load, key)]
        for side in (BASELINE, DYNAFLOW):
            x, y = ([_figure_of(load, name)[side] for load in drawn] for name in (key, THROUGHPUT))
            panel.errorbar(
                [v["median"] for v in x], [v["median"] for v in y], xerr=_reach(x), yerr=_reach(y), label=side,
                color=COLOURS[side], marker=MARKERS[side], markersize=6, linewidth=1.6, elinewidth=1, capsize=3,
            )  # fmt: skip
        for load in drawn:
            _name_point(panel, load, key)
        panel.set_xlabel(f"{label} - left is better")
        panel.set_ylabel("output tokens/s - up is better")
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        panel.margins(0.12)
        panel.legend(frameon=False, loc="best")
    return svg(figure)


def gains(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw the gain of each row of `record.headline` with its spread; right of the line DynaFlow is better."""
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = [row for row in rows if row["gain"]]
    if not rows:
        return ""
    figure, (panel,) = _figure(10, 0.9 + 0.28 * len(rows))
    for position, row in enumerate(rows):
        gain, colour = row["gain"], COLOURS[row["verdict"]]
        panel.errorbar(
            gain["median"], position, xerr=_reach([gain]), color=colour, marker="o", markersize=6, elinewidth=2,
            capsize=3,
        )  # fmt: skip
    panel.axvline(1, color="#222222", linewidth=1)
    width = max(row["gain"]["max"] for row in rows) / min(row["gain"]["min"] for row in rows)
    if width > WIDE:
        panel.set_xscale("log")  # half and double are equally far from 1
        panel.xaxis.set_major_locator(LogLocator(subs=(1,) if width > VERY_WIDE else (1, 2, 5), numticks=20))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_yticks(range(len(rows)), [f"{row['load']}: {row['label']}" for row in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlabel("gain (above 1: DynaFlow is better)")
    panel.grid(axis="y", visible=False)
    return svg(figure)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for panel in axes:
        panel.grid(color="#e3e6ea", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    return figure, axes


def _name_point(panel: Axes, load: Mapping[str, Any], key: str) -> None:
    """Write the rate above the higher side's point."""
    x, y = _figure_of(load, key), _figure_of(load, THROUGHPUT)
    side = max((BASELINE, DYNAFLOW), key=lambda s: y[s]["median"])
    name = "all at once" if load["rate"] == "inf" else f"{load['rate']:g}/s"
    panel.annotate(
        name, (x[side]["median"], y[side]["median"]), xytext=(6, 7), textcoords="offset points", fontsize=9,
        color="#444444", bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
    )  # fmt: skip


def _figure_of(load: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(f for f in load["figures"] if f["key"] == key)
    return found


def _has(load: Mapping[str, Any], key: str) -> bool:
    return bool(_figure_of(load, key)[BASELINE] and _figure_of(load, key)[DYNAFLOW])


def _reach(spreads: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """Return the lower and upper bars of points, as matplotlib takes them."""
    return [[s["median"] - s["min"] for s in spreads], [s["max"] - s["median"] for s in spreads]]
