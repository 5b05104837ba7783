"""The check of the simulator against measurements, on operators that sleep under real executors; the commands."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import lowered, manual, program_of
from typer.testing import CliRunner, Result

from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.cli import app
from dynaflow_serving.core.program import Program
from dynaflow_serving.errors import ConfigError, PlanError
from dynaflow_serving.executor.cpu import CPUExecutor
from dynaflow_serving.executor.sequential import SequentialExecutor
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.session.plan_cache import no_context
from dynaflow_serving.strategies import get_strategy

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MILLISECONDS = {"work0": 4.0, "send0": 6.0, "work1": 8.0, "send1": 3.0}
PROGRAM = """
value x batch:0
value a batch:0
value b batch:0
value c batch:0
value d batch:0
inputs x
op work0 compute
  inputs x
  outputs a
op send0 network group=tp
  inputs a
  outputs b
op work1 compute
  inputs b
  outputs c
op send1 network group=tp
  inputs c
  outputs d
outputs d
"""


def benchmark(name: str) -> Any:
    """A script of `benchmarks/`, imported."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


simulate_check = benchmark("simulate_check")


def row(**changes: Any) -> dict[str, Any]:
    program = program_of(PROGRAM)
    plan = lower(get_strategy("nanoflow")().record(program, 2), "nanoflow")
    operators = [{"name": name, "micro_batch": mb, "ms": ms} for mb in (0, 1) for name, ms in MILLISECONDS.items()]
    return {
        "strategy": "nanoflow", "program": program.to_text(), "plan": plan.to_text(),
        "operators": operators, "seconds": {"median": 0.030},
    } | changes  # fmt: skip


def test_the_prediction_by_hand() -> None:
    """compute: work0 0-4, 4-8, work1 10-18, 18-26; network: send0 4-10, 10-16, send1 18-21, 26-29."""
    p = simulate_check.predict(row(), mbit=200.0)
    assert p.predicted == pytest.approx(29) == p.critical_path
    assert (p.operators, p.label) == (pytest.approx(42), "200 Mbit/s, nanoflow x2")
    assert p.within and p.ratio == pytest.approx(29 / 30)
    assert not simulate_check.predict(row(seconds={"median": 0.025})).within
    assert simulate_check.predict(row(), network_compute=0.5).predicted > p.predicted


def test_a_wrong_file_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a row lacks plan, seconds\. Needed: program, plan"):
        simulate_check.predict({"program": "", "operators": []})
    with pytest.raises(ConfigError, match="no measured seconds for work0@1"):
        simulate_check.predict(row(operators=[o for o in row()["operators"] if o["micro_batch"] == 0]))
    with pytest.raises(PlanError, match="the plan is for program"):
        simulate_check.predict(row(program=program_of(PROGRAM.replace(" group=tp", "")).to_text()))
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no rows"):
        simulate_check.check(tmp_path / "empty.json")


def sleeping(program: Program) -> tuple[CapturedProgram, dict[tuple[str, int], float]]:
    """Operators that sleep for MILLISECONDS, and the seconds that each of them took, by micro-batch."""
    took: dict[tuple[str, int], float] = {}

    def operator(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(x: torch.Tensor) -> torch.Tensor:
            started = time.perf_counter()
            time.sleep(MILLISECONDS[name] / 1e3)
            y = x + 1
            took[name, int(x[0].item() >= 100)] = time.perf_counter() - started
            return y

        return call

    return manual(program, **{o.name: operator(o.name) for o in program.operators}), took


@pytest.mark.alone
def test_what_the_real_executors_measure_can_be_predicted(
    tmp_path: Path, report: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = program_of(PROGRAM)
    capture, took = sleeping(program)
    x = torch.tensor([0.0, 0.0, 100.0, 100.0])  # the second micro-batch is told by its values
    in_turn = lowered(program, 2, *((o.name, mb, "compute") for mb in (0, 1) for o in program.operators))
    plan = lower(get_strategy("nanoflow")().record(program, 2), "nanoflow")

    def milliseconds(run: Any) -> float:
        started = time.perf_counter()
        (out,) = run([x], (0, 2, 4), no_context)
        assert torch.equal(out, x + 4)
        return (time.perf_counter() - started) * 1e3

    milliseconds(SequentialExecutor().bind(capture, in_turn, {}))
    operators = [{"name": name, "micro_batch": mb, "ms": s * 1e3} for (name, mb), s in took.items()]
    executor = CPUExecutor()
    try:
        overlapped_ms = min(milliseconds(executor.bind(capture, plan, {})) for _ in range(3))
    finally:
        executor.close()
    measured = row(operators=operators, seconds={"median": overlapped_ms / 1e3})
    file, result = tmp_path / "measured.json", tmp_path / "predicted.json"
    file.write_text(json.dumps({"parts": [{"link_mbit": 200, "rows": [{"strategy": "stock"}, measured]}]}))
    (p,) = simulate_check.check(file)
    report(f"simulated {p.predicted:.1f} ms, CPU executor {p.measured:.1f} ms, ratio {p.ratio:.3f}")
    assert len(operators) == 8
    assert p.critical_path <= p.predicted * (1 + 1e-9) < p.operators  # it overlaps
    monkeypatch.setattr(sys, "argv", ["simulate_check", str(file), "--json", str(result)])
    with pytest.raises(SystemExit) as ended:
        simulate_check.main()
    assert ended.value.code == (0 if p.within else 1)
    assert ("yes" if p.within else "NO") in capsys.readouterr().out.splitlines()[-1]
    (written,) = json.loads(result.read_text())["rows"]
    assert written["ratio"] == p.ratio and written["within"] == p.within


def test_the_papers_table(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of its rows, which are quick; the others differ in numbers only."""
    paper = benchmark("simulate_paper")
    chosen = [f for f in paper.FIGURES if f.what.startswith(("naive", "DBO, DeepSeek-V2-Lite, PCIe"))]
    assert len(chosen) == 2
    monkeypatch.setattr(paper, "FIGURES", chosen)
    monkeypatch.setattr(paper, "HEAVY", ("8x1024",))
    monkeypatch.setattr(paper, "LIGHT", ("16x1@1024",))
    monkeypatch.setattr(sys, "argv", ["simulate_paper", "--json", str(tmp_path / "paper.json")])
    paper.main()
    written = json.loads((tmp_path / "paper.json").read_text())
    assert written["simulated"] is True
    text = capsys.readouterr().out
    for r in written["rows"]:
        off = max((s / p - 1 for s, p in zip(r["simulated"], r["paper"])), key=abs)
        assert r["disagreement"] == pytest.approx(off) and r["agrees"] == (abs(off) <= paper.TOLERANCE)
    assert text.count("DISAGREES") == text.count("likely because") == sum(not r["agrees"] for r in written["rows"])


# -- the command -------------------------------------------------------------------------------------


def dynaflow(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["simulate", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama"], "unknown model 'llama'. Did you mean 'llama-3-8b'? Valid: "),
        (["mine.yaml"], "model file 'mine.yaml' does not exist"),
        (["llama-3-8b", "--device", "a100"], "unknown device 'a100'"),
        (["llama-3-8b", "--link", "nvlink"], "Did you mean 'nvlink5'? Valid: eth100, eth200, eth400, nvlink4"),
        (["llama-3-8b", "--network", "eth800"], "unknown link 'eth800'"),
        (["llama-3-8b", "--tp", "3"], "32 attention heads cannot be spread evenly over 3 ranks"),
        (["llama-3-8b", "--ep", "2"], "ep=2 does not divide the 1 ranks"),
        (["llama-3-8b", "--ep", "2", "--tp", "2"], "llama-3-8b has no experts"),
        (["llama-3-8b", "--imbalance", "2"], "imbalance=2.0 is of experts spread over ranks: it needs ep > 1"),
        (["llama-3-8b", "-b", "8;8"], "--batch '8;8': '8;8' is not of the form"),
        (["llama-3-8b", "-s", "nanflow"], "Did you mean 'nanoflow'"),
        (["llama-3-8b", "-o", "min_token=1"], "Did you mean 'min_tokens'"),
        (["llama-3-8b", "-s", "dual_batch", "-n", "3"], "strategy 'dual_batch' has no such option"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = dynaflow(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr


def test_every_output_says_simulated(tmp_path: Path) -> None:
    figures, trace = tmp_path / "figures.json", tmp_path / "trace.json"
    result = dynaflow("llama-3-8b", "--tp", "4", "--timeline", "--json", str(figures), "--trace", str(trace))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("simulated: llama-3-8b on 4 x h100 (nvlink4), tp=4 ep=1 dp=1")
    assert "All figures are simulated" in result.stdout and "simulated, first" in result.stdout
    written = json.loads(figures.read_text())
    assert written["simulated"] is True and all(r["simulated"] is True for r in written["rows"])
    assert [(r["schedule"], r["micro_batches"]) for r in written["rows"]] == [
        ("un-split", 1), *((s, n) for n in (2, 3, 4) for s in ("sequential", "nanoflow"))
    ]  # fmt: skip
    assert written["rows"][0]["speed_up"] == 1
    for r in written["rows"]:
        assert f"{r['ms']:.4g}" in result.stdout and f"{r['speed_up']:.2f}x" in result.stdout
    assert json.loads(trace.read_text())["otherData"]["simulated"] is True


def test_it_says_why_a_step_is_not_split_and_takes_what_options_say(tmp_path: Path) -> None:
    small = dynaflow("llama-3-8b", "--tp", "4", "-b", "64x1@1024")
    assert "one micro-batch: a micro-batch would have under 2048 tokens (-o min_tokens=1 splits it)" in small.stdout
    assert small.stdout.count("nanoflow") == 1
    split = dynaflow("llama-3-8b", "--tp", "4", "-b", "64x1@1024", "-o", "min_tokens=1", "-n", "2")
    assert "32 x2" in split.stdout and "one micro-batch" not in split.stdout
    whole = dynaflow("deepseek-v2-lite", "-s", "branches")
    assert whole.exit_code == 0 and "branches" in whole.stdout
    many = dynaflow("deepseek-v3-like", "--ep", "64", "--dp", "4096", "-s", "dual_batch")
    assert many.exit_code == 0 and "4096 x h100 (nvlink4, eth400 between nodes)" in " ".join(many.stdout.split())


def test_what_a_config_asks_for_and_is_not_simulated_is_said(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("strategy: nanoflow\nstreams: {network: {sm_share: 0.2}}\n")
    note = "the config's streams (priority, sm_share) are not simulated"
    assert note in dynaflow("llama-3-8b", "--tp", "4", "-s", str(config)).stdout
    assert note not in dynaflow("llama-3-8b", "--tp", "4").stdout


def test_no_graphs_and_imbalance_cost(tmp_path: Path) -> None:
    def milliseconds(*arguments: str) -> float:
        file = tmp_path / "figures.json"
        result = dynaflow("mixtral-8x7b", "--ep", "4", "--dp", "4", "-b", "16x1@512", "--json", str(file), *arguments)
        assert result.exit_code == 0, result.output
        return float(json.loads(file.read_text())["rows"][0]["ms"])

    base = milliseconds()
    assert milliseconds("--no-graphs") > base
    assert milliseconds("--imbalance", "2") > base
