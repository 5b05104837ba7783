"""A Timeline as text: a line per stream, for terminals.

Contract
- The text says `simulated` or `measured`, and has no figures that the Timeline does not have.
"""

from __future__ import annotations

from dynaflow_serving.core.timeline import Span, Timeline

WIDTH = 100
LAYERS_SHOWN = 3


def strip(timeline: Timeline) -> str:
    """Draw the first layers as text.

    A stream has a line. A character is the micro-batch that runs, `*` for several merged ones, `.` for none.
    """
    layers = tuple(f"layers.{i}." for i in range(LAYERS_SHOWN))
    shown = [s for s in timeline.spans if any(o.startswith(layers) for o in s.action.operators)]
    until = max((s.end for s in shown), default=timeline.makespan)
    width = max(map(len, timeline.plan.streams))
    kind = "simulated" if timeline.simulated else "measured"
    lines = [f"{kind}, first {until * 1e6:,.0f} us, {until / WIDTH * 1e6:.1f} us a character"]
    for stream in timeline.plan.streams:
        cells = ["."] * WIDTH
        for s in timeline.spans:
            if s.action.stream == stream and s.start < until:
                first, last = (min(WIDTH, round(t / until * WIDTH)) for t in (s.start, s.end))
                cells[first:last] = [_mark(s)] * (last - first)
        lines.append(f"{stream:<{width}}  {''.join(cells)}")
    return "\n".join(lines)


def _mark(span: Span) -> str:
    return str(span.action.start % 10) if span.action.stop - span.action.start == 1 else "*"
