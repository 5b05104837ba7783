"""Rows of results, as JSON and as a table that shows losses as plainly as wins.

Contract
- A row is plain data: the variant's name, all samples, their spread, the physical limit beside it, and the speed-up
  against each baseline, by rounds. A variant without a figure is a row with its error.
- A loss is a variant with a median speed-up under 1; `losses` lists all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.gpu.timing import VariantTimes
from dynaflow_serving.core.measurement import Spread

ResultRow = dict[str, Any]


def rows_of(
    case: str,
    measured: VariantTimes,
    limits: Mapping[str, float],
    against: Mapping[str, Sequence[str]],
    facts: Mapping[str, ResultRow] | None = None,
) -> list[ResultRow]:
    """Return a row per variant.

    Args:
        case: The name of the case.
        measured: The times of its variants.
        limits: The physical limit of each variant, in milliseconds.
        against: The baselines of each variant.
        facts: More entries of each variant's row.
    """
    rows = []
    for name in (*measured.samples, *measured.failed):
        row: ResultRow = {"case": case, "variant": name, **(facts or {}).get(name, {})}
        if name in measured.failed:
            row["error"] = measured.failed[name]
        else:
            spread = Spread.of_values(measured.samples[name])
            row |= {"ms": spread.as_dict(), "samples_ms": measured.samples[name]}
            row |= {"limit_ms": limits[name], "of_limit": limits[name] / spread.median}
            row["speedup"] = {
                b: measured.speedup(name, b).as_dict() for b in against.get(name, ()) if b in measured.samples
            }
        rows.append(row)
    return rows


def table(title: str, rows: Iterable[ResultRow]) -> Table:
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in ("case", "variant"):
        result.add_column(column, overflow="fold")
    for column in ("ms (min - max)", "limit ms", "of limit", "speed-up (min - max) against"):
        result.add_column(column, justify="right")
    for row in rows:
        if "error" in row:
            result.add_row(row["case"], row["variant"], "-", "-", "-", row["error"])
            continue
        ms = row["ms"]
        result.add_row(
            row["case"],
            row["variant"],
            f"{ms['median']:.3f} ({ms['min']:.3f} - {ms['max']:.3f})",
            f"{row['limit_ms']:.3f}",
            f"{row['of_limit']:.0%}",
            "\n".join(f"{_ratio(s)} {b}" for b, s in row["speedup"].items()) or "-",
        )
    return result


def losses(rows: Iterable[ResultRow]) -> list[str]:
    """Return one line per variant and baseline that it is slower than."""
    return [
        f"{row['case']}: {row['variant']} is slower than {baseline}: {_ratio(speedup)}"
        for row in rows
        for baseline, speedup in row.get("speedup", {}).items()
        if speedup["median"] < 1
    ]


def _ratio(s: Mapping[str, float]) -> str:
    return f"{s['median']:.3f}x ({s['min']:.3f} - {s['max']:.3f})"
