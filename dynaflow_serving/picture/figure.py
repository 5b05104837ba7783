"""Timelines as SVG, one above the other on one time axis, a row per stream.

Contract
- Each micro-batch has a colour, network operators are hatched, and a bar has its name where there is room for it.
  Every bar has a `<title>` with all details, which browsers show as a tooltip.
- Each row says whether it was measured or simulated. Text stays text, and the picture refers to nothing outside.
- Equal timelines give equal files.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynaflow_serving.bench.pages import assert_installed, svg
from dynaflow_serving.core.plan import ActionKind, range_text
from dynaflow_serving.core.timeline import Span, Timeline
from dynaflow_serving.picture.comparison import ShownTimeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Fill and ink of each micro-batch, from the seventh on again; names are dark on light fills.
COLOURS = (
    ("#a9cdee", "#1f6fb4"),
    ("#f9cf9c", "#b8650b"),
    ("#b3dfb0", "#2f7d32"),
    ("#d6c3ef", "#6b3fb0"),
    ("#f5b5b5", "#b3261e"),
    ("#a8e0dc", "#0f766e"),
    ("#e6d98f", "#857400"),
)
SEVERAL = ("#cfd4da", "#4a525c")  # one call for several micro-batches
INK, QUIET = "#1c2128", "#5b6472"
ROW, GAP, LEFT, RIGHT = 0.6, 0.46, 0.85, 0.15  # inches
TITLE, TOP, BOTTOM = 0.26, 0.52, 0.34  # inches: of the title, of legend and first heading, of the time axis
WIDTH, WIDEST = 13.0, 60.0  # inches: as wide as the busiest stream's bars need
BAR = 0.17  # inches a bar should have in the mean
FONT, UPRIGHT = 7.0, 6.0  # points, of names along their bars and of those across
CHARACTER = 0.6  # width of a character relative to its height


def assert_can_draw(*also: str) -> None:
    """Check that matplotlib and the packages of `also` are installed.

    Raises:
        DynaflowError: One is missing.
    """
    assert_installed("a picture", "matplotlib", *also)


def draw(panels: Sequence[ShownTimeline], tokens: Sequence[int], title: str = "", caption: str = "") -> str:
    """Return the `<svg>` element.

    Args:
        panels: The timelines.
        tokens: The tokens of each micro-batch.
        title: What is shown; not needed where a page says it.
        caption: Where it was measured, and what to know about it; likewise.
    """
    from matplotlib.figure import Figure

    rows = [len(p.timeline.plan.streams) for p in panels]
    busiest = max(Counter((i, s.action.stream) for i, p in enumerate(panels) for s in p.timeline.spans).values())
    width = min(max(WIDTH, LEFT + RIGHT + BAR * busiest), WIDEST)
    lines = _wrapped(caption, width)
    top = TOP + (TITLE if title else 0.0)
    height = top + BOTTOM + 0.16 * len(lines) + ROW * sum(rows) + GAP * (len(panels) - 1)
    figure = Figure(figsize=(width, height))
    until = max(p.timeline.makespan for p in panels)
    scale, unit = _unit(until)
    titles: dict[str, str] = {}
    above = height - top
    for number, (shown, streams) in enumerate(zip(panels, rows)):
        above -= ROW * streams
        box = (LEFT / width, above / height, 1 - (LEFT + RIGHT) / width, ROW * streams / height)
        panel = _Panel(figure.add_axes(box), shown.timeline, until, (width - LEFT - RIGHT) * 72, f"bar{number}-")
        panel.draw()
        panel.axes.set_title(f"{shown.what}: {summary(shown)}", loc="left", fontsize=9.5, color=INK, pad=4)
        panel.scale_axis(scale, unit if number == len(panels) - 1 else "")
        titles |= panel.titles
        above -= GAP
    if title:
        figure.text(LEFT / width, 1 - 0.2 / height, title, fontsize=12, weight="bold", color=INK, va="center")
    _legend(figure, panels, tokens, (LEFT / width, 1 - (top - TOP + 0.1) / height))
    for i, line in enumerate(reversed(lines)):
        figure.text(LEFT / width, (0.08 + 0.16 * i) / height, line, fontsize=8, color=QUIET, va="bottom")
    return _with_titles(svg(figure), titles)


def summary(shown: ShownTimeline) -> str:
    """Return `1.23 ms (of runs of 1.2 - 1.4), streams overlap 41% of it, 80% of the network time hidden`."""
    timeline = shown.timeline
    scale, unit = _unit(timeline.makespan)
    parts = [f"{timeline.makespan * scale:.3g} {unit}"]
    if shown.greatest > shown.least:
        parts[0] += f" (of runs of {shown.least * scale:.3g} - {shown.greatest * scale:.3g})"
    if len(timeline.plan.streams) > 1:
        parts.append(f"streams overlap {timeline.overlap:.0%} of it")
        if any(map(timeline.is_network, timeline.spans)):
            parts.append(f"{timeline.hidden_network:.0%} of the network time hidden")
    return ", ".join(parts)


@dataclass
class _Panel:
    """Draws one timeline.

    Attributes:
        axes: Where it is drawn.
        timeline: What is drawn.
        until: The end of the time axis, in seconds.
        points: The width of the axes.
        prefix: The beginning of the bars' ids.
    """

    axes: Axes
    timeline: Timeline
    until: float
    points: float
    prefix: str

    def __post_init__(self) -> None:
        self.titles: dict[str, str] = {}  # id of a bar -> its tooltip

    def draw(self) -> None:
        streams = self.timeline.plan.streams
        self.axes.set_xlim(0, self.until)
        self.axes.set_ylim(len(streams) - 0.5, -0.5)
        self.axes.set_yticks(range(len(streams)), streams)
        self.axes.tick_params(labelsize=8.5, length=0, colors=INK)
        self.axes.spines[["top", "right", "left"]].set_visible(False)
        self.axes.spines["bottom"].set_color("#b9c0c8")
        for edge in range(len(streams) - 1):
            self.axes.axhline(edge + 0.5, color="#e3e6ea", linewidth=0.6)
        self.axes.axvline(self.timeline.makespan, color=QUIET, linewidth=0.8, linestyle=(0, (3, 2)))
        for span in self.timeline.spans:
            self._bar(span, streams.index(span.action.stream))

    def scale_axis(self, scale: float, unit: str) -> None:
        """Draw ticks in `unit`, one for each inch or two; without a unit, none."""
        from matplotlib.ticker import MaxNLocator

        if not unit:
            self.axes.set_xticks([])
            return
        self.axes.xaxis.set_major_locator(MaxNLocator(int(self.points / 72)))
        self.axes.xaxis.set_major_formatter(lambda x, _: f"{x * scale:g} {unit}")
        self.axes.tick_params(axis="x", length=3, color="#b9c0c8", labelsize=8)

    def _bar(self, span: Span, row: int) -> None:
        from matplotlib.patches import Rectangle

        fill, ink = _colours(span)
        network = self.timeline.is_network(span)
        name = f"{self.prefix}{span.index}"
        self.titles[name] = self._title(span)
        bar = Rectangle(
            (span.start, row - 0.4), span.end - span.start, 0.8, facecolor=fill, edgecolor=ink, linewidth=0.4,
            hatch="////" if network else None, gid=name, clip_on=False,
        )  # fmt: skip
        self.axes.add_patch(bar)
        text, across = _label(span, (span.end - span.start) / self.until * self.points, ROW * 0.8 * 72)
        if text:
            behind = {"facecolor": fill, "edgecolor": "none", "pad": 0.6} if network else None
            size, rotation = (UPRIGHT, 90) if across else (FONT, 0)
            self.axes.text(
                (span.start + span.end) / 2, row, text, fontsize=size, rotation=rotation, color=INK, bbox=behind,
                ha="center", va="center", clip_on=False,
            )  # fmt: skip

    def _title(self, span: Span) -> str:
        scale, unit = _unit(span.end - span.start)
        at, at_unit = _unit(self.timeline.makespan)
        parts = range(span.action.start, span.action.stop)
        noun = "micro-batches" if len(parts) > 1 else "micro-batch"
        whose = f", {noun} {', '.join(map(str, parts))}" if len(parts) else ""
        kind = "simulated" if self.timeline.simulated else "measured"
        what = "network operator" if self.timeline.is_network(span) else span.action.kind.value
        return (
            f"{span.action!s}\n{what}{whose}, stream {span.action.stream}, action {span.index}\n"
            f"{(span.end - span.start) * scale:.3g} {unit}, "
            f"from {span.start * at:.4g} to {span.end * at:.4g} {at_unit}, {kind}"
        )


def _colours(span: Span) -> tuple[str, str]:
    if span.action.stop - span.action.start == 1:
        return COLOURS[span.action.start % len(COLOURS)]
    return SEVERAL


def _label(span: Span, width: float, height: float) -> tuple[str, bool]:
    """Return the longest name that fits into `width` x `height` points, and whether it does so across.

    The name is "" if none fits.
    """
    names = _names(span)
    for name in names:
        if len(name) * FONT * CHARACTER + 3 <= width:
            return name, False
    if width >= UPRIGHT + 2 and len(names[-1]) * UPRIGHT * CHARACTER <= height:
        return names[-1], True
    return "", False


def _names(span: Span) -> list[str]:
    """Return the names from the longest to the shortest: `layers.3.attention.0 @1`, `3.attention.0`, `attention`."""
    action = span.action
    if action.kind is ActionKind.MERGE:
        return ["merge"]
    if action.kind is ActionKind.REPLACE:
        return [f"{action.kernel} {range_text(action.start, action.stop)}", action.kernel]
    name = action.operators[0]
    kind = [part for part in name.split(".") if not part.isdigit()][-1]
    return [f"{name} {range_text(action.start, action.stop)}", name.removeprefix("layers."), kind]


def _legend(figure: Figure, panels: Sequence[ShownTimeline], tokens: Sequence[int], place: tuple[float, float]) -> None:
    from matplotlib.patches import Patch

    handles = []
    for i, count in enumerate(tokens):
        fill, ink = COLOURS[i % len(COLOURS)]
        whose = f"micro-batch {i}: {count:,} tokens" if len(tokens) > 1 else f"{count:,} tokens"
        handles.append(Patch(facecolor=fill, edgecolor=ink, linewidth=0.5, label=whose))
    spans = [(p.timeline, s) for p in panels for s in p.timeline.spans]
    if any(s.action.stop - s.action.start != 1 for _, s in spans):
        handles.append(Patch(facecolor=SEVERAL[0], edgecolor=SEVERAL[1], linewidth=0.5, label="several micro-batches"))
    if any(t.is_network(s) for t, s in spans):
        handles.append(Patch(facecolor="white", edgecolor=QUIET, linewidth=0.5, hatch="////", label="network"))
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=place, ncols=len(handles), frameon=False, fontsize=8.5,
        borderaxespad=0, borderpad=0, handlelength=1.6, columnspacing=1.6, labelcolor=INK,
    )  # fmt: skip


def _unit(seconds: float) -> tuple[float, str]:
    """Return the factor and the unit for times of about `seconds`."""
    return (1e6, "us") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1.0, "s")


def _wrapped(text: str, width: float) -> list[str]:
    return textwrap.wrap(text, int((width - LEFT - RIGHT) * 72 / (8 * 0.52)), break_on_hyphens=False)


def _with_titles(drawn: str, titles: dict[str, str]) -> str:
    def add(match: re.Match[str]) -> str:
        title = titles.get(match[1])
        return match[0] if title is None else f"{match[0]}<title>{html.escape(title)}</title>"

    return re.sub(r'<g id="([^"]+)">', add, drawn)
