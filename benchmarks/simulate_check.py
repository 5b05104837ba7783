"""Is the simulator right about what was measured? `python benchmarks/simulate_check.py FILE.json`.

`dynaflow bench transformers --link MBIT --json FILE` writes FILE. A row of a strategy has the `program` and the `plan`
as text, and the measured `seconds`. `operators` has the milliseconds of each operator and micro-batch, one after the
other. The simulator gets the plan and the operators' times, nothing else, and predicts the seconds. The script prints
for each row the prediction (simulated), the measurement, their ratio, and whether that is within 15 %. The exit code is
1 if one is not.

`--network-compute SHARE` is the share of compute that a network operator takes from its neighbours.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynaflow_serving.core.parse import parse_plan, parse_program
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.simulate import MeasuredCosts, simulate

TOLERANCE = 0.15
NEEDED = ("program", "plan", "operators", "seconds")


@dataclass(frozen=True)
class Prediction:
    """A row in milliseconds; `predicted` and `critical_path` are simulated, `operators` is the sum of their times."""

    label: str
    predicted: float
    critical_path: float
    measured: float
    operators: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured

    @property
    def within(self) -> bool:
        return abs(self.ratio - 1) <= TOLERANCE


def predict(row: Mapping[str, Any], network_compute: float = 0.0, mbit: float = 0.0) -> Prediction:
    """Predict the time of a row, which was measured over a link of `mbit` megabit per second.

    Raises:
        ConfigError: The row lacks an entry.
        PlanError: The plan is not one of the program.
    """
    if missing := [key for key in NEEDED if key not in row]:
        raise ConfigError(f"a row lacks {', '.join(missing)}. Needed: {', '.join(NEEDED)}.")
    program, plan = parse_program(row["program"]), parse_plan(row["plan"])
    verify(program, plan)
    seconds = {(o["name"], int(o["micro_batch"])): o["ms"] / 1e3 for o in row["operators"]}
    timeline = simulate(plan, MeasuredCosts(program, seconds, network_compute).demands(plan))
    return Prediction(
        label=f"{mbit:g} Mbit/s, {plan.strategy} x{plan.micro_batches}",
        predicted=timeline.makespan * 1e3,
        critical_path=timeline.critical_path * 1e3,
        measured=row["seconds"]["median"] * 1e3,
        operators=sum(seconds.values()) * 1e3,
    )


def check(path: Path, network_compute: float = 0.0) -> list[Prediction]:
    """Return one prediction per row of the file.

    Raises:
        ConfigError: The file has no rows with a plan, or a row lacks an entry.
    """
    parts = json.loads(path.read_text()).get("parts", [])
    rows = [(row, part["link_mbit"]) for part in parts for row in part["rows"] if "plan" in row]
    rows = [(row, mbit) for row, mbit in rows if row["strategy"] != "sequential"]
    if not rows:
        raise ConfigError(f"{path} holds no rows with a plan: make it with dynaflow bench transformers --link MBIT")
    return [predict(row, network_compute, mbit) for row, mbit in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--network-compute", type=float, default=0.0)
    parser.add_argument("--json", type=Path, help="write the predictions to this file")
    options = parser.parse_args()
    predictions = check(options.file, options.network_compute)
    print(f"{'':<34} {'operators':>10} {'simulated':>10} {'measured':>10} {'ratio':>6}  within {TOLERANCE:.0%} (ms)")
    for p in predictions:
        print(
            f"{p.label:<34} {p.operators:>10.1f} {p.predicted:>10.1f} {p.measured:>10.1f} {p.ratio:>6.3f}  "
            + ("yes" if p.within else "NO")
        )
    if options.json:
        rows = [{**vars(p), "ratio": p.ratio, "within": p.within} for p in predictions]
        options.json.write_text(json.dumps({"simulated": "predicted, critical_path", "rows": rows}, indent=1) + "\n")
    sys.exit(0 if all(p.within for p in predictions) else 1)


if __name__ == "__main__":
    main()
