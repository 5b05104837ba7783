"""The co-running section and the command of benchmarks/gpu, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from gpu_bench_support import LIMITS, FakeTimer, sequential
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.gpu import __main__ as suite
from benchmarks.gpu import corun
from benchmarks.gpu.report import rows_of
from benchmarks.gpu.timing import SectionOutcome, VariantTimes
from dynaflow_serving.config import ExecutorOptions
from dynaflow_serving.executor import CPUExecutor, Executor


def test_corun_compares_plans_of_one_program() -> None:
    executors: list[Executor] = []

    def make(options: ExecutorOptions) -> Executor:
        executors.append(CPUExecutor(options))
        return executors[-1]

    with torch.no_grad():
        rows = corun.rows(FakeTimer(), 0, LIMITS, make, "cpu", torch.float32, hidden=16, tokens=8)
    for executor in executors:
        executor.close()
    assert len(rows) == len(corun.NEIGHBOURS) * (2 + len(corun.SM_SHARES))
    for row in rows:
        if "SM share" in row["variant"]:
            assert "InactiveError" in row["error"] and "sm_share" in row["error"]  # threads have no SMs
        elif row["variant"] == corun.SEQUENTIAL:
            assert row["streams"] == ["compute"] and row["speedup"] == {}
        else:
            assert row["streams"] == ["compute", "side"] and set(row["speedup"]) == {corun.SEQUENTIAL}


def command(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(suite.main)
    return CliRunner().invoke(app, list(arguments))


def test_without_cuda_the_command_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = command("--json", str(tmp_path / "results"), "--quick")
    assert result.exit_code == 2
    assert "need a CUDA device, and none is visible" in result.stderr
    assert not (tmp_path / "results").exists()


def test_results_are_written_section_by_section(tmp_path: Path) -> None:
    measured = VariantTimes({"base": [1.0], "slow": [2.0]})
    rows = rows_of("case", measured, {"base": 0.1, "slow": 0.1}, {"slow": ("base",)})

    def outcomes() -> Any:
        yield SectionOutcome("first", 1.5, rows)
        assert json.loads((tmp_path / "first.json").read_text())["rows"] == rows  # before the second has begun
        yield SectionOutcome("second", 0.1, error="not run: no time")

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    assert suite.publish(outcomes(), LIMITS, tmp_path, console) == 1
    text = console.export_text()
    assert "losses: 1" in text and "slow is slower than base: 0.500x" in text
    assert "without results: 1" in text and "second: not run: no time" in text
    second = json.loads((tmp_path / "second.json").read_text())
    assert second["error"] == "not run: no time" and "rows" not in second
    assert second["limits"] == {"bytes_per_s": 1e12, "flops_per_s": 1e14}
    assert suite.publish(iter([SectionOutcome("first", 1.5, rows)]), LIMITS, tmp_path, console) == 0


def test_the_suite_fits_its_time_and_names_the_engine_benchmark() -> None:
    names = [s.name for s in suite.sections(FakeTimer(), LIMITS, sequential, "cpu", quick=True)]
    assert names == ["corun", "stack_dense", "stack_moe", "stack_dit", "kernels"]
    assert suite.QUICK_SECONDS < suite.SECONDS <= 8 * 60 * 0.85
    config = Path(__file__).parents[2] / suite.VLLM.split("--strategy ")[1].split()[0]
    assert config.is_file()
