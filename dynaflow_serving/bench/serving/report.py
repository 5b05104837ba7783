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
from dynaflow_serving.bench.report import CPU_SERVERS, spread
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


def _span(values: Sequence[int]) -> str:
    return f"{min(values):,} - {max(values):,}"


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2)
