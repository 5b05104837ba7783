"""The overlap benchmark, end to end on a small model: two ranks in network namespaces, figures, equality."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rounding import TOLERANCE

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
from rate_limited_link import unusable  # noqa: E402

SMALL = ["--layers", "2", "--hidden", "64", "--batch", "4", "--sequence", "64", "--rounds", "1"]


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "overlap_cpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, **options)  # type: ignore[call-overload, no-any-return]


def apart(row: dict[str, Any]) -> float:
    return 0.0 if row["equal"] == "bit for bit" else float(row["equal"].removeprefix("to "))


@pytest.mark.skipif(bool(unusable()), reason=unusable())
def test_figures_and_equality(tmp_path: Path) -> None:
    file = tmp_path / "overlap.json"
    done = run(*SMALL, "--rates", "20", "0", "--micro-batches", "2,3", "--training", "--json", str(file))
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert [(r["rate_mbit"], r["micro_batches"]) for r in figures["rows"]] == [(20, 2), (20, 3), (0, 2), (0, 3)]
    for r in figures["rows"]:
        assert apart(r) < TOLERANCE  # of hidden states, which a norm has brought to about 1
        hidden = r["sequential_ms"] - r["overlapped_ms"]
        assert r["overlap_efficiency"] == pytest.approx(hidden / min(r["compute_ms"], r["communication_ms"]))
        assert {o["micro_batch"] for o in r["operators"]} == set(range(r["micro_batches"]))
        assert "network | run" in r["plan"]
    limited, unlimited = figures["rows"][0], figures["rows"][2]
    assert limited["communication_ms"] > 2 * unlimited["communication_ms"]  # the limit is in force
    for r in figures["training"]:  # AOT autograd may sum in another order than eager autograd
        assert apart(r) < 1e-6
    assert "emulated network" in done.stdout and "emulated" in figures["what"]
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert "dynaflow-" not in left


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    done = run(*SMALL, env={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert "install iproute2" in done.stderr


@pytest.mark.parametrize(
    ("argument", "message"), [("--micro-batches=1", "from 2"), ("--rates=-5", "megabit per second")]
)
def test_wrong_options(argument: str, message: str) -> None:
    done = run(*SMALL, argument)
    assert done.returncode == 2 and message in done.stderr
