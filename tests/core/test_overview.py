"""What `dynaflow explain` prints: the picture, the table of operators, and the full text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from golden_plans import CASES, GOLDEN, golden_file, golden_plan
from rich.console import Console
from rich.table import Table
from support import example
from typer.testing import CliRunner

from dynaflow_serving.cli import app
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.core.grid import rows_of_runs
from dynaflow_serving.core.parse import parse_plan, parse_program
from dynaflow_serving.core.plan import ActionKind, Plan
from dynaflow_serving.core.program import Program
from dynaflow_serving.picture.explanation import Explanation
from dynaflow_serving.picture.overview import overview
from dynaflow_serving.planning.happens_before import contains, happens_before
from dynaflow_serving.strategy.splitting import whole

RUNS = (ActionKind.RUN, ActionKind.REPLACE)


@pytest.mark.parametrize(("model", "strategy", "micro_batches"), CASES)
def test_actions_of_a_row_wait_for_none_of_each_other(model: str, strategy: str, micro_batches: int) -> None:
    plan = golden_plan(model, strategy, micro_batches)
    rows, before = rows_of_runs(plan), happens_before(plan)
    at = {action: i for i, action in enumerate(plan.actions) if action.kind in RUNS}
    assert sum(map(len, rows)) == len(at)
    assert all(action.stream == stream for row in rows for stream, action in row.items())
    for row, earlier in zip(rows, [{}, *rows]):
        for action in row.values():
            assert not any(contains(before[at[action]], at[other]) for other in row.values() if other is not action)
            # Nothing could be a row earlier.
            assert not earlier or any(contains(before[at[action]], at[other]) for other in earlier.values())


def explain(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["explain", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(autouse=True)
def examples_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaflow_serving.capture.examples.example_capture", example)


def test_golden_text(request: pytest.FixtureRequest) -> None:
    printed = explain("llama", "-s", "comm_overlap", "-o", "min_tokens=1")
    text = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
    file = GOLDEN / "llama.comm_overlap.explain.txt"
    if request.config.getoption("--update-golden", default=False):
        file.write_text(text)
    assert text == file.read_text(), "if the change is right: pytest tests/core --update-golden"


@pytest.mark.parametrize("arguments", [("llama",), ("moe", "-n", "3"), ("dit", "-s", "branches"), ("llama", "-b", "8")])
def test_weights_are_counted_and_the_full_text_names_them(arguments: tuple[str, ...]) -> None:
    program = example(arguments[0]).program
    weights = [name for name in program.inputs if name.startswith("l_self_modules_")]
    short, full = explain(*arguments), explain(*arguments, "--full")
    assert "l_self" not in short and f"{len(weights)} weights" in short and "--full prints the program" in short
    assert all(f"value {name} shared" in full for name in weights)
    assert short.splitlines()[:12] == full.splitlines()[:12]
    assert parse_program(full) == program


def test_full_text_is_what_check_reads(tmp_path: Path) -> None:
    saved = tmp_path / "explained.txt"
    saved.write_text(explain("moe", "-s", "nanoflow", "-n", "3", "-o", "min_tokens=1", "--full"))
    assert parse_plan(saved.read_text()) == golden_plan("moe", "nanoflow", 3)
    assert CliRunner().invoke(app, ["check", str(saved)]).exit_code == 0


def deep(layers: int) -> tuple[Program, Plan]:
    """Many times the second layer of a program, in a plan of one micro-batch."""
    lines = ["program", "value x0 batch:0", "value w shared", "inputs x0 w"]
    for i in range(layers):
        lines += [f"op model.layers.{i}.mlp compute", f"  inputs x{i} w", f"  outputs x{i + 1}"]
        lines += [f"  writes kv.{i}"] if i == 2 else []
    lines[3:3] = [f"value x{i + 1} batch:0" for i in range(layers)]
    program = parse_program("\n".join([*lines, f"outputs x{layers}"]))
    runs = [f"compute | run model.layers.{i}.mlp @0" for i in range(layers)]
    return program, parse_plan("\n".join([f"plan p program={program.digest} micro_batches=1 depends=-", *runs]))


def printed(program: Program, plan: Plan, *, full: bool = False, width: int = 160) -> str:
    found = Explanation("deep", "p", [program], (8,), whole(Batch((8,)), "one request"), [plan])
    console = Console(width=width)
    with console.capture() as captured:
        for thing in overview(found, full=full):
            console.print(thing, soft_wrap=not isinstance(thing, Table))
    return captured.get()


def test_layers_that_look_alike_share_a_row_and_long_grids_are_cut() -> None:
    program, plan = deep(70)
    short, full = printed(program, plan), printed(program, plan, full=True)
    names = re.findall(r"^(\S+) +compute +compute", short, re.MULTILINE)
    assert names == ["model.layers.0-1,3-69.mlp", "model.layers.2.mlp"]
    assert "... 10 more rows (--full shows them)" in short and "layers.59.mlp @0" in short
    assert "layers.60.mlp @0" not in short and "layers.60.mlp @0" in full and "more rows" not in full
    assert "state" in short and re.search(r"layers\.2\.mlp .* written", short)


def test_a_narrow_terminal_keeps_the_names() -> None:
    program = example("moe").program
    plan = golden_plan("moe", "nanoflow", 2)
    assert plan.program == program.digest, golden_file("moe", "nanoflow", 2)
    wide, narrow = printed(program, plan), printed(program, plan, width=80)
    tables = [text.partition("same time")[2].partition("inputs:")[0] for text in (wide, narrow)]
    assert tables[0] == tables[1] and max(map(len, tables[1].splitlines())) <= 80
