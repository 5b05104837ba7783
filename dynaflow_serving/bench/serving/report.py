"""One self-contained HTML file from a `record`.

Contract
- `render` is a pure function of the record: the page shows all of it, and refers to nothing outside of itself.
- Losses are as visible as wins, and the reasons why a run shows nothing (`failures`) come first.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynaflow_serving.bench.pages import assert_installed, templates
from dynaflow_serving.bench.report import CPU_SERVERS
from dynaflow_serving.bench.serving.loads import DATASETS
from dynaflow_serving.bench.serving.record import headline

PACKAGES = ("jinja2", "matplotlib")


def assert_can_report() -> None:
    """Check before anything runs that the page can be made.

    Raises:
        DynaflowError: A package is missing.
    """
    assert_installed("--html", *PACKAGES)


def render(result: Mapping[str, Any]) -> str:
    """Return the page."""
    from markupsafe import Markup

    from dynaflow_serving.bench.serving.plots import gains, pareto

    environment = templates(Path(__file__).parent)
    environment.filters |= {"spread": spread, "span": _span, "pretty": _pretty}
    rows = headline(result)
    datasets = [
        {"name": name, "words": DATASETS[name], "pareto": Markup(pareto(list(loads)))}
        for name, loads in itertools.groupby(result["loads"], key=lambda load: load["dataset"])
    ]
    template = environment.get_template("report.html.j2")
    drawn = Markup(gains(rows))
    page: str = template.render(result=result, rows=rows, datasets=datasets, gains=drawn, cpu_note=CPU_SERVERS)
    return page


def number(value: float) -> str:
    """Write a value with three significant digits, and all of those before the point: 4,778; 36.1; 0.832."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def spread(value: Mapping[str, float] | None, ratio: bool = False) -> str:
    """Write a spread as `median (least - greatest)`, a ratio below 10 with three decimals."""
    if value is None:
        return "not measured"
    median, least, greatest = (
        f"{value[key]:.3f}" if ratio and value[key] < 10 else number(value[key]) for key in ("median", "min", "max")
    )
    return f"{median} ({least} - {greatest})"


def _span(values: Sequence[int]) -> str:
    return f"{min(values):,} - {max(values):,}"


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2)
