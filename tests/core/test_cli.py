"""The commands, on the embedded examples and on wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import example
from typer.testing import CliRunner, Result

from dynaflow_serving.cli import app
from dynaflow_serving.examples import EXAMPLES
from dynaflow_serving.ir import Plan, Program
from dynaflow_serving.verify import verify

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def examples_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaflow_serving.examples.example_capture", example)


def dynaflow(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "foo"], "unknown engine 'foo'. Valid: sglang, vllm."),
        (["bench", "sglang", "--compiled"], "--compiled and --uncompiled are for vllm"),
        (["bench", "vllm", "--model", "no/such/model"], "model 'no/such/model' does not exist"),
        (["bench", "vllm", "--model", "lama"], "Did you mean 'llama'"),
        (["bench", "vllm", "--model", "."], "has no config.json"),
        (["bench", "vllm", "-s", "nanflow"], "Did you mean 'nanoflow'"),
        (["bench", "vllm", "-s", "missing.yaml"], "config file 'missing.yaml' does not exist"),
        (["bench", "vllm", "-s", "dual_batch", "-n", "3"], "strategy 'dual_batch' has no such option"),
        (["bench", "vllm", "-o", "min_tokens"], "is not of the form NAME=VALUE"),
        (["bench", "vllm", "-o", "min_token=1"], "Did you mean 'min_tokens'"),
        (["bench", "vllm", "-o", "cut=[1"], "--option 'cut=[1' is not valid YAML"),
        (["bench", "vllm", "-n", "1"], "micro_batches"),
        (["explain", "lama"], "neither an embedded example (llama, moe, dit) nor a model directory"),
        (["explain", "llama", "--batch", "8,x"], "--batch '8,x' is not a list of token counts"),
        (["explain", "llama", "--batch", "8,0"], "each at least 1"),
        (["explain", "llama", "--dtype", "float16"], "for model directories"),
        (["check", "missing.txt"], "'missing.txt' is not a file"),
        (["check", __file__.replace("test_cli.py", "conftest.py")], "must register one strategy"),
        (["schema", "-s", "nope"], "unknown strategy 'nope'"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = dynaflow(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr


def test_help_and_usage_errors() -> None:
    result = dynaflow("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("bench", "explain", "check", "schema", "doctor"))
    assert dynaflow("bench", "vllm", "--pairs", "0").exit_code == 2
    assert dynaflow("nonsense").exit_code == 2


def test_schema() -> None:
    whole = json.loads(dynaflow("schema").stdout)
    assert {"strategy", "options", "executor", "fallback"} <= set(whole["properties"])
    one = json.loads(dynaflow("schema", "--strategy", "nanoflow").stdout)
    assert "min_tokens" in one["properties"]


def test_doctor() -> None:
    result = dynaflow("doctor")
    assert result.exit_code == 0, result.output
    for text in ("torch", "vllm", "0.32.0", "sequential", "nanoflow", "micro_batches=2"):
        assert text in result.stdout


@pytest.mark.parametrize("example", ["llama", "moe"])
def test_explain_prints_what_check_accepts(example: str, tmp_path: Path) -> None:
    result = dynaflow("explain", example, "--batch", "64,64,8,1", "-s", "nanoflow", "-n", "3", "-o", "min_tokens=1")
    assert result.exit_code == 0, result.output
    assert "micro-batch 0: requests 0..0, tokens 0..63 (64)" in result.stdout
    assert "micro-batch 2: requests 2..3, tokens 128..136 (9)" in result.stdout
    assert "step  compute" in result.stdout and "network" in result.stdout
    program_text, _, rest = result.stdout.partition("split of")
    plan_text = rest[rest.index("plan nanoflow") : rest.index("plan ", rest.index("plan nanoflow") + 5)]
    verify(Program.from_text(program_text), Plan.from_text(plan_text))
    saved = tmp_path / "explained.txt"
    saved.write_text(program_text + plan_text)
    assert dynaflow("check", str(saved)).exit_code == 0


def test_explain_says_why_not() -> None:
    result = dynaflow("explain", "llama", "-s", "nanoflow", "--batch", "8,8")
    assert result.exit_code == 0
    assert "not split: a micro-batch would have under 2048 tokens" in result.stdout
    assert "-o min_tokens=1" in result.stdout
    assert "plan nanoflow" not in result.stdout
    assert "not split: one request" in dynaflow("explain", "llama", "--batch", "8").stdout


def test_check_plan(tmp_path: Path) -> None:
    text = (GOLDEN / "llama.nanoflow.plan").read_text()
    good, bad = tmp_path / "good.plan", tmp_path / "bad.plan"
    good.write_text(text)
    result = dynaflow("check", str(good))
    assert result.exit_code == 0 and result.stdout.startswith("OK: ")
    assert "2 micro-batches" in result.stdout and Plan.from_text(text).digest in result.stdout

    wait = next(line for line in text.splitlines() if "| wait" in line)
    bad.write_text(text.replace(wait + "\n", "", 1))
    result = dynaflow("check", str(bad))
    assert result.exit_code == 1
    assert "<-- ERROR HERE" in result.stderr and "Traceback" not in result.stderr

    bad.write_text(text.replace("| wait", "| hold", 1))
    result = dynaflow("check", str(bad))
    assert result.exit_code == 2 and "cannot read step" in result.stderr
    assert str(bad) in result.stderr

    bad.write_text("program\n")
    assert "no plan found" in dynaflow("check", str(bad)).stderr


def test_explain_shows_the_plan_of_a_strategy_that_orders_unsplit_steps() -> None:
    result = dynaflow("explain", "moe", "--strategy", "branches")
    assert "not split: branches overlap without a split" in result.stdout
    assert "side0   | run layers.0.shared_expert @0" in result.stdout


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_check_shipped_configs(config: Path) -> None:
    result = dynaflow("check", str(config))
    assert result.exit_code == 0, result.output
    variants = 3 if "\n  micro_batches:" in config.read_text() else 1  # 2, 3 and 4 micro-batches, or the strategy's own
    assert result.stdout.count("OK") == variants * len(EXAMPLES)


STRATEGY = """
from dynaflow_serving import OpScheduler, register_strategy
from dynaflow_serving.splitting import cut_evenly

@register_strategy("test_cli_{n}")
class Strategy{n}(OpScheduler):
    def split(self, batch):
        return cut_evenly(batch, {n})

    def schedule(self, s):
        s.execute(s.get_ready_ops()[0])
"""


@pytest.mark.parametrize(("n", "message"), [(2, "operators unexecuted"), (3, "split() made 3, more than")])
def test_check_wrong_strategy_file(n: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "strategy.py"
    path.write_text(STRATEGY.replace("{n}", str(n)))
    result = dynaflow("check", str(path))
    assert result.exit_code == 1, result.output
    assert message in result.stderr and "Traceback" not in result.stderr
    assert "ScheduleError" in result.stdout
