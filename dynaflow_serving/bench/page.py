"""The result of a comparison as one self-contained HTML page, with its bars drawn.

Contract
- `render` is a pure function of the object that `result.record` returned. The page refers to nothing outside of itself.
- Failures and notes come first. A loss is as visible as a win.
- A bar is a median, its whisker reaches from the least to the greatest. A part's limit is a line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynaflow_serving.bench.pages import assert_installed, svg, templates
from dynaflow_serving.bench.report import conclusions, efficiency, has_links, label, remark, row_name, spread

COLOURS = {"stock": "#5b6472", "sequential": "#b9a27c", "limit": "#c62828", "strategy": "#1f6fb4"}


def assert_can_draw() -> None:
    """Check before anything runs that the page can be made.

    Raises:
        DynaflowError: A package is missing.
    """
    assert_installed("--html", "jinja2", "matplotlib")


@dataclass(frozen=True)
class Picture:
    """A drawing of the page, and what it shows."""

    heading: str
    svg: str


def render(result: Mapping[str, Any], steps: Sequence[Picture] = ()) -> str:
    """Return the page; `steps` are pictures of real steps."""
    from markupsafe import Markup

    environment = templates(Path(__file__).parent)
    environment.filters |= {"spread": spread, "efficiency": efficiency, "row_name": row_name, "label": label}
    template = environment.get_template("page.html.j2")
    config = json.dumps(result["config"], indent=2)
    page: str = template.render(
        result=result,
        conclusions=conclusions(result),
        bars=Markup(bars(result)),
        steps=[(step.heading, Markup(step.svg)) for step in steps],
        remark=remark(result),
        config=config,
    )
    return page


def bars(result: Mapping[str, Any]) -> str:
    """Draw the seconds of each row, a panel per part."""
    from matplotlib.figure import Figure

    parts = result["parts"]
    rows = max(len(part["rows"]) for part in parts)
    figure = Figure(figsize=(10, (0.8 + 0.34 * rows) * len(parts)), layout="constrained")
    for number, part in enumerate(parts, 1):
        panel = figure.add_subplot(len(parts), 1, number)
        names = [row_name(row) for row in part["rows"]]
        medians = [row["seconds"]["median"] for row in part["rows"]]
        reach = [
            [row["seconds"]["median"] - row["seconds"]["min"] for row in part["rows"]],
            [row["seconds"]["max"] - row["seconds"]["median"] for row in part["rows"]],
        ]
        colours = [COLOURS.get(row["strategy"], COLOURS["strategy"]) for row in part["rows"]]
        panel.barh(names, medians, xerr=reach, color=colours, height=0.62, error_kw={"elinewidth": 1, "capsize": 3})
        for position, row in enumerate(part["rows"]):
            text = "" if row["strategy"] == "stock" else f" {row['ratio']['median']:.2f}x"
            panel.annotate(
                text,
                (row["seconds"]["max"], position),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        if part["limit"]:
            longest = max(part["limit"].values())
            panel.axvline(longest, color=COLOURS["limit"], linewidth=1.2, linestyle="--")
            panel.annotate("limit", (longest, -0.55), color=COLOURS["limit"], fontsize=9, ha="center", va="bottom")
        panel.invert_yaxis()
        panel.set_xlim(left=0)
        panel.margins(x=0.1)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("seconds of a pass (left is better)" if number == len(parts) else "")
        if has_links(result):
            emulated = ", emulated link" if part["link_mbit"] else ""
            panel.set_title(label(part) + emulated, fontsize=10, loc="left")
    return svg(figure)
