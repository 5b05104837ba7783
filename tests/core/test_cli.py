"""The commands, on the embedded examples and on wrong input."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import example
from typer.testing import CliRunner, Result

from dynaflow_serving.capture.examples import EXAMPLES, HIDDEN
from dynaflow_serving.cli import app
from dynaflow_serving.config import Config, load
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.parse import parse_plan, parse_program
from dynaflow_serving.core.program import Scope, Value
from dynaflow_serving.picture.measure import example_inputs
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.session.session import Session
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import cut_at_requests

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def examples_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaflow_serving.capture.examples.example_capture", example)


def dynaflow(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["bench", "foo"],
            "unknown system 'foo'. Valid: fastvideo, megatron, sglang, torch, transformers, vllm, xdit.",
        ),
        (["bench", "sglang", "--compiled"], "--compiled and --uncompiled are not for sglang"),
        (["bench", "vllm", "--model", "no/such/model"], "model 'no/such/model' does not exist"),
        (["bench", "vllm", "--model", "lama"], "Did you mean 'llama'"),
        (["bench", "vllm", "--model", "."], "has no config.json"),
        (["bench", "vllm", "-s", "nanflow"], "Did you mean 'nanoflow'"),
        (["bench", "vllm", "-s", "missing.yaml"], "config file 'missing.yaml' does not exist"),
        (["bench", "vllm", "-s", "dual_batch", "-n", "3"], "unknown option of dual_batch 'micro_batches'"),
        (["bench", "vllm", "-o", "min_tokens"], "is not of the form NAME=VALUE"),
        (["bench", "vllm", "-o", "min_token=1"], "Did you mean 'min_tokens'"),
        (["bench", "vllm", "-o", "cut=[1"], "--option 'cut=[1' is not valid YAML"),
        (["bench", "vllm", "-n", "0"], "micro_batches"),
        (["bench", "vllm", "--link", "0.5"], "--link 0.5: a rate in megabit per second from 1 to 40000"),
        (["bench", "vllm", "--link", "100", "-tp", "4"], "--link joins 2 nodes with a rank each"),
        (["bench", "vllm", "--link", "100", "--model", "Qwen/Qwen3-8B"], "download the model, and give its folder"),
        (["bench", "vllm", "--tcp-defaults"], "add --link MBIT"),
        (["bench", "vllm", "--training"], "it is for torch and transformers"),
        (["bench", "torch", "--compiled"], "choose nothing for torch"),
        (["bench", "torch", "--requests", "1"], "a batch of one request cannot be split"),
        (["bench", "torch", "--max-batched-tokens", "8"], "torch has no scheduler"),
        (["bench", "torch", "--rate", "8"], "torch has no server that can be benchmarked"),
        (["explain", "lama"], "neither an embedded example (llama, moe, dit) nor a model directory"),
        (["explain", "llama", "--batch", "8,x"], "--batch '8,x' is not a list of token counts"),
        (["explain", "llama", "--batch", "8,0"], "each at least 1"),
        (["explain", "llama", "--dtype", "float16"], "for model directories"),
        (["explain", ".", "--backward"], "--backward is for embedded examples"),
        (["megatron", "--", "nofile.py"], "the script nofile.py does not exist"),
        (
            ["megatron", "-c", "round_robn", "--", "nofile.py"],
            "unknown strategy 'round_robn'. Did you mean 'round_robin'?",
        ),
        (["explain", "llama", "--svg", "."], "'.' is a folder: give the name of a file"),
        (["explain", "llama", "--svg", "x", "--html", "x"], "must be different files"),
        (["check", "missing.pt"], "'missing.pt' is not a file"),
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


def test_explain_says_why_not() -> None:
    result = dynaflow("explain", "llama", "-s", "nanoflow", "--batch", "8,8")
    assert result.exit_code == 0
    assert "not split: a micro-batch would have under 2048 tokens" in result.stdout
    assert "-o min_tokens=1" in result.stdout
    assert "13 operators" not in result.stdout  # of a plan
    assert "not split: one request" in dynaflow("explain", "llama", "--batch", "8").stdout


def test_check_plan(tmp_path: Path) -> None:
    text = (GOLDEN / "llama.nanoflow.plan").read_text()
    good, bad = tmp_path / "good.plan", tmp_path / "bad.plan"
    good.write_text(text)
    result = dynaflow("check", str(good))
    assert result.exit_code == 0 and result.stdout.startswith("OK: ")
    assert "2 micro-batches" in result.stdout and parse_plan(text).digest in result.stdout

    wait = next(line for line in text.splitlines() if "| wait" in line)
    bad.write_text(text.replace(wait + "\n", "", 1))
    result = dynaflow("check", str(bad))
    assert result.exit_code == 1
    assert "<-- ERROR HERE" in result.stderr and "Traceback" not in result.stderr

    bad.write_text(text.replace("| wait", "| hold", 1))
    result = dynaflow("check", str(bad))
    assert result.exit_code == 2 and "cannot read action" in result.stderr
    assert str(bad) in result.stderr

    bad.write_text("program\n")
    assert "no plan found" in dynaflow("check", str(bad)).stderr


def test_explain_shows_the_plan_of_a_strategy_that_orders_unsplit_steps() -> None:
    result = dynaflow("explain", "moe", "--strategy", "branches")
    assert "not split: branches overlap without a split" in result.stdout
    assert re.search(r"^layers.0.dispatch @0 +layers.0.shared_expert @0 *$", result.stdout, re.MULTILINE)


def test_explain_shows_the_backward_pass() -> None:
    words = ["explain", "llama", "-s", "round_robin", "-n", "2", "--batch", "8,8"]
    assert "backward" not in dynaflow(*words).stdout
    shown = dynaflow(*words, "--backward", "--full").stdout
    assert "plan round_robin.backward" in shown and "op layers.0.all_reduce.1.backward network" in shown


def test_explain_draws_and_traces_what_it_prints(tmp_path: Path) -> None:
    svg, html, trace = tmp_path / "new" / "plan.svg", tmp_path / "plan.html", tmp_path / "plan.json"
    files = ("--svg", str(svg), "--html", str(html), "--trace", str(trace))
    result = dynaflow(
        "explain", "moe", "-s", "comm_overlap", "-n", "3", "-o", "min_tokens=1", "--batch", "8,9,7", *files
    )
    assert result.exit_code == 0, result.output
    assert all(f"wrote {path}" in result.stdout for path in (svg, html, trace))
    content = json.loads(trace.read_text())
    spans = [e["args"] for e in content["traceEvents"] if e["ph"] == "X"]
    ran = {(name, mb) for s in spans for name in s["operators"] for mb in s["micro_batches"]}
    assert ran == {(o.name, mb) for o in example("moe").program.operators for mb in range(3)}
    assert content["otherData"]["simulated"] is False and content["otherData"]["plan"] in result.stdout
    picture = svg.read_text()
    assert "example moe: comm_overlap, 3 micro-batches of 8, 9, 7 tokens" in picture
    assert "Network operators are stand-ins on this machine" in picture and "plan, predicted" in picture
    page = html.read_text()
    assert page.startswith("<!DOCTYPE html>") and "stand-ins" in page and "15 operators of the program" in page


def test_explain_has_nothing_to_draw_where_a_batch_is_not_split(tmp_path: Path) -> None:
    result = dynaflow("explain", "llama", "-s", "nanoflow", "--batch", "8,8", "--svg", str(tmp_path / "x.svg"))
    assert result.exit_code == 2 and "not split: a micro-batch would have under 2048 tokens" in result.stdout
    assert "show a plan, and this batch is not split" in result.stderr and not list(tmp_path.iterdir())


def test_explain_without_matplotlib_says_so_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    result = dynaflow("explain", "llama", "--html", "x.html")
    assert result.exit_code == 2 and "pip install 'dynaflow-serving[report]'" in result.stderr and not result.stdout


# -- reproducers ---------------------------------------------------------------------------------------
def off_by_one(h: torch.Tensor, *weights: Any) -> torch.Tensor:
    """Stands in for an operator, and is wrong in one row."""
    out = h * 2
    out[min(3, len(out) - 1)] += 1
    return out


class Suspicious(OpScheduler):
    """Runs the last all-reduce of micro-batch 1 by a kernel that is wrong in its fourth row."""

    name = "suspicious"

    def split(self, batch: Batch) -> Split:
        return cut_at_requests(batch, 2)

    def schedule(self, s: Schedule) -> None:
        while ready := s.get_ready_ops():
            wrong = ready[0].name == "layers.1.all_reduce.1" and ready[0].micro_batch == 1
            s.execute(ready[0], replace=off_by_one if wrong else None)


@pytest.fixture
def reproducer(tmp_path: Path) -> Path:
    """What the check writes about a step of `llama` under `Suspicious`: 11 requests of 4 tokens."""
    config = Config(strategy="sequential", executor="sequential", check={"folder": str(tmp_path)})
    session = Session(FixedStrategy(Suspicious()), config)
    capture = example("llama")
    plan_cache = session.add(capture)
    inputs = example_inputs(capture.program, len(capture.constants), 44, HIDDEN)
    with torch.no_grad(), session.step(Batch((4,) * 11)) as step:
        result = plan_cache.run(inputs, step.split)
        step.checked(result, lambda: plan_cache.run_whole(inputs, 44), inputs)
    (file,) = tmp_path.iterdir()
    return file


def worst_row(output: str) -> list[str]:
    (row,) = [line.split() for line in output[output.index("worst rows") :].splitlines() if line.strip()[:2] == "0 "]
    return row


def test_check_shows_what_a_reproducer_holds(reproducer: Path) -> None:
    result = dynaflow("check", str(reproducer))
    assert result.exit_code == 0, result.output
    output = result.stdout
    assert "suspicious" in output and "11 requests, 44 new tokens" in output
    cut = torch.load(reproducer, weights_only=True)["bounds"][1]
    assert f"1: tokens {cut}..43 ({44 - cut})" in output
    assert "plan 0: verified: strategy suspicious" in output
    assert "first suspect: kernel off_by_one, in place of layers.1.all_reduce.1" in output
    row = worst_row(output)
    assert row[:4] == ["0", str(cut + 3), "1", str((cut + 3) // 4)]
    apart, split, whole = map(float, row[4:])
    assert apart == pytest.approx(1, rel=1e-4) and split - whole == pytest.approx(1, rel=1e-3)
    assert "1 of 44" in output


def test_check_finds_a_wrong_plan_in_a_reproducer(reproducer: Path) -> None:
    content = torch.load(reproducer, weights_only=True)
    lines = content["plans"][0].splitlines()
    first = next(i for i, line in enumerate(lines) if "| run" in line)
    content["plans"] = ["\n".join(lines[:first] + lines[first + 1 :])]
    torch.save(content, reproducer)
    result = dynaflow("check", str(reproducer))
    assert result.exit_code == 1 and "plan 0: " in result.stderr and "worst rows" in result.stdout


def test_check_of_outputs_that_cannot_be_attributed(reproducer: Path) -> None:
    """One row per request, not per token, with a NaN on one side; another shape; and a single number that is equal."""
    content = torch.load(reproducer, weights_only=True)
    whole = torch.tensor([[1.0, torch.nan]] * 11)
    split = whole.clone()
    split[2, 1] = 1.0
    content["whole"], content["split"] = (
        [whole, torch.ones(3), torch.tensor(5)],
        [split, torch.ones(4), torch.tensor(5)],
    )
    torch.save(content, reproducer)
    output = dynaflow("check", str(reproducer)).stdout
    assert "split has [4]" in output and "1 of 11" in output and "0 of 1" in output
    assert worst_row(output) == ["0", "2", "unknown", "unknown", "inf", "1", "nan"]


def test_check_of_a_sum_that_is_as_long_as_the_batch(reproducer: Path) -> None:
    """The program says that it has no token axis, so nobody guesses one."""
    content = torch.load(reproducer, weights_only=True)
    (program,) = map(parse_program, content["programs"])
    (name,) = program.outputs
    summed = replace(program, values={**program.values, name: Value(name, Scope.PARTIAL)})
    content["programs"] = [summed.to_text()]
    content["whole"], content["split"] = [torch.ones(44)], [torch.ones(44)]
    content["split"][0][3] = 2
    torch.save(content, reproducer)
    assert worst_row(dynaflow("check", str(reproducer)).stdout)[1:4] == ["3", "unknown", "unknown"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a file of torch", "it cannot be loaded"),
        ({"weights": torch.ones(2)}, "such a file has format"),
        (torch.ones(2), "such a file has format"),
        ({"format": "dynaflow_serving reproducer 1", "step": 1}, "incomplete reproducer: it lacks strategy, options"),
    ],
    ids=["bytes", "a checkpoint", "a tensor", "half of one"],
)
def test_check_of_what_is_no_reproducer(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    result = dynaflow("check", str(path))
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_check_shipped_configs(config: Path) -> None:
    result = dynaflow("check", str(config))
    assert result.exit_code == 0, result.output
    selector = build_selector(load(config))
    if selector.candidates != ("",):
        variants = len(selector.candidates)  # what a policy chooses among
    else:  # 2, 3 and 4 micro-batches, or the strategy's own
        variants = 3 if "\n  micro_batches:" in config.read_text() else 1
    assert result.stdout.count("OK") == variants * len(EXAMPLES)


STRATEGY = """
from dynaflow_serving import OpScheduler, register_strategy
from dynaflow_serving.strategy.splitting import cut_evenly

@register_strategy("test_cli_{n}")
class Strategy{n}(OpScheduler):
    def split(self, batch):
        return cut_evenly(batch, {n})

    def schedule(self, s):
        s.execute(s.get_ready_ops()[0])
"""


def test_check_a_strategy_file_that_leaves_operators(tmp_path: Path) -> None:
    path = tmp_path / "strategy.py"
    path.write_text(STRATEGY.replace("{n}", "2"))
    result = dynaflow("check", str(path))
    assert result.exit_code == 1, result.output
    assert "operators unexecuted" in result.stderr and "Traceback" not in result.stderr
    assert "ScheduleError" in result.stdout


def test_check_a_strategy_file_that_splits_into_too_many(tmp_path: Path) -> None:
    path = tmp_path / "strategy.py"
    path.write_text(STRATEGY.replace("{n}", "3"))
    result = dynaflow("check", str(path))
    assert result.exit_code == 2, result.output
    assert "split() made 3 micro-batches, more than max_micro_batches=2" in result.stderr
    assert "Traceback" not in result.stderr


def test_check_and_explain_say_which_tags_an_example_lacks() -> None:
    lacks = "strategy 'dual_batch' finds no operator tagged dispatch or combine: its turns"
    for arguments in (["check", str(CONFIGS / "vllm" / "dual_batch.yaml")], ["explain", "llama", "-s", "dual_batch"]):
        assert " ".join(dynaflow(*arguments).stdout.split()).count(lacks) == (2 if arguments[0] == "check" else 1)
    assert lacks not in dynaflow("explain", "moe", "-s", "dual_batch").stdout
