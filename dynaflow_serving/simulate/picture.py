"""A Timeline for the eye: Chrome trace events, and a line of text per stream.

Contract
- Both say `simulated`; neither has figures that the Timeline does not have.
"""

from __future__ import annotations

from typing import Any

from dynaflow_serving.simulate.engine import Span, Timeline
from dynaflow_serving.text import step_text

WIDTH = 100
LAYERS_SHOWN = 3


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """For chrome://tracing or Perfetto; one thread a stream, microseconds."""
    thread = {stream: i for i, stream in enumerate(timeline.plan.streams)}
    names = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": i, "args": {"name": f"{stream} (simulated)"}}
        for stream, i in thread.items()
    ]
    events = [
        {
            "ph": "X",
            "name": step_text(s.step),
            "pid": 0,
            "tid": thread[s.step.stream],
            "ts": s.start * 1e6,
            "dur": (s.end - s.start) * 1e6,
            "args": {"simulated": True, "step": s.index, "critical": s.index in timeline.critical},
        }
        for s in timeline.spans
    ]
    return {"traceEvents": names + events, "otherData": {"simulated": True, "plan": timeline.plan.digest}}


def strip(timeline: Timeline) -> str:
    """The first layers as text, a line per stream: the micro-batch that runs (`*`: merged ones), `.` where idle."""
    layers = tuple(f"layers.{i}." for i in range(LAYERS_SHOWN))
    shown = [s for s in timeline.spans if any(o.startswith(layers) for o in s.step.operators)]
    until = max((s.end for s in shown), default=timeline.makespan)
    width = max(map(len, timeline.plan.streams))
    lines = [f"simulated, first {until * 1e6:,.0f} us, {until / WIDTH * 1e6:.1f} us a character"]
    for stream in timeline.plan.streams:
        cells = ["."] * WIDTH
        for s in timeline.spans:
            if s.step.stream == stream and s.start < until:
                first, last = (min(WIDTH, round(t / until * WIDTH)) for t in (s.start, s.end))
                cells[first:last] = [_mark(s)] * (last - first)
        lines.append(f"{stream:<{width}}  {''.join(cells)}")
    return "\n".join(lines)


def _mark(span: Span) -> str:
    return str(span.step.start % 10) if span.step.stop - span.step.start == 1 else "*"
