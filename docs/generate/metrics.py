"""The table of Prometheus metrics in docs/user-guide/observability.md, from the instruments themselves.

Contract
- `python docs/generate/metrics.py` writes the page; `pages` has the rest of the contract.
"""

from __future__ import annotations

from pages import table, with_part, write

from dynaflow_serving.session.metrics import _instruments

PAGE = "user-guide/observability.md"


def pages() -> dict[str, str]:
    """Return the page with the table of all metrics."""
    rows = []
    for instrument in _instruments().values():
        (metric,) = instrument.describe()
        name = metric.name + ("_total" if metric.type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in instrument._labelnames) or "-"
        rows.append((f"`{name}`", metric.type, labels, metric.documentation))
    return {PAGE: with_part(PAGE, "metrics", table(("metric", "type", "labels", "what it is"), rows))}


if __name__ == "__main__":
    write(pages())
