"""Timelines as small SVG pictures, for the pages of the strategies.

Contract
- Panels stand one above the other on one time axis, a row per stream. Each micro-batch has its colour, the network is
  hatched, and a bar has its name where there is room for it.
- Equal timelines give equal files. Every picture says that its times are simulated.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from dynaflow_serving.core.plan import ActionKind
from dynaflow_serving.core.timeline import Span, Timeline
from dynaflow_serving.picture.figure import COLOURS, INK, QUIET, SEVERAL

WIDTH, LEFT, RIGHT, ROW, GAP, TOP = 900, 84, 10, 30, 34, 34
CHARACTER = 5.6  # the width of a character of a bar's name
HATCH = (
    '<defs><pattern id="network" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="1.6" height="6" fill="#1c2128" fill-opacity="0.28"/></pattern></defs>'
)


def draw(title: str, panels: Sequence[tuple[str, Timeline]]) -> str:
    """Return the picture of timelines; a panel is its heading and what it shows."""
    until = max(timeline.makespan for _, timeline in panels)
    rows = [len(timeline.plan.streams) for _, timeline in panels]
    height = TOP + sum(GAP + ROW * n for n in rows) + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="Helvetica,Arial,sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        HATCH,
        f'<text x="12" y="21" font-size="13" font-weight="bold">{html.escape(title)}</text>',
    ]
    y = TOP
    for heading, timeline in panels:
        parts += [
            _text(12, y + 20, f"{heading}: {timeline.makespan * 1e6:,.0f} us", INK),
            *_panel(timeline, y + GAP, until),
        ]
        y += GAP + ROW * len(timeline.plan.streams)
    kinds = sorted({_kind(span) for _, timeline in panels for span in timeline.spans})
    short = "".join(f"; {_initials(kind)}: {kind}" for kind in kinds if "_" in kind)
    note = f"Simulated by a roofline model, not measured; {until * 1e6:,.0f} us wide; hatched: network{short}"
    return "\n".join([*parts, _text(12, y + 20, note, QUIET), "</svg>"]) + "\n"


def _panel(timeline: Timeline, top: float, until: float) -> Iterator[str]:
    """Yield the rows of one timeline."""
    scale = (WIDTH - LEFT - RIGHT) / until
    for row, stream in enumerate(timeline.plan.streams):
        yield _text(12, top + ROW * row + 18, html.escape(stream), INK)
    for span in timeline.spans:
        x, width = LEFT + span.start * scale, (span.end - span.start) * scale
        y = top + ROW * timeline.plan.streams.index(span.action.stream)
        yield from _bar(span, timeline.is_network(span), x, y, width)


def _bar(span: Span, network: bool, x: float, y: float, width: float) -> Iterator[str]:
    action = span.action
    fill, ink = COLOURS[action.start % len(COLOURS)] if action.stop - action.start == 1 else SEVERAL
    place = f'x="{x:.1f}" y="{y + 3}" width="{max(width, 0.6):.1f}" height="{ROW - 6}"'
    title = f"<title>{html.escape(str(action))}</title>"
    yield f'<rect {place} fill="{fill}" stroke="{ink}" stroke-width="0.5">{title}</rect>'
    if network:
        yield f'<rect {place} fill="url(#network)" pointer-events="none"/>'
    for name in _names(span):
        if len(name) * CHARACTER + 4 <= width:
            yield _text(x + width / 2, y + 19, html.escape(name), INK, middle=True)
            return


def _names(span: Span) -> list[str]:
    """Return the names that a bar may have, from the longest to the shortest."""
    action = span.action
    if action.kind is ActionKind.MERGE:
        return ["merge"]
    kind = _kind(span)
    short = _initials(kind) if "_" in kind else kind[:4]
    return [f"{action.operators[0].removeprefix('layers.')} @{action.start}", kind, short]


def _kind(span: Span) -> str:
    """Return the last word of the name of a bar's operator; "" for a merge."""
    parts = span.action.operators[0].split(".") if span.action.operators else [""]
    return [part for part in parts if not part.isdigit()][-1]


def _initials(kind: str) -> str:
    return "".join(word[0] for word in kind.split("_"))


def _text(x: float, y: float, text: str, ink: str, middle: bool = False) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{ink}"{anchor}>{text}</text>'
