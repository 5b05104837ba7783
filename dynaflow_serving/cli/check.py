"""`dynaflow check`: verify a plan file, a config or strategy before it meets an engine, or look at a reproducer.

Contract
- Text file: its Program and its Plan are read and the Plan is verified. A wrong Plan ends with exit code 1 and the
  grid that marks the action.
- YAML config or .py strategy: its schedule is recorded, lowered and verified on the embedded examples. This is done for
  2 to 4 micro-batches, or for the number that the strategy itself splits into. Where a strategy chooses among
  candidates (`auto`), each of them is verified.
- Reproducer (.pt, written where a split step differed): its plans are verified. The command shows what differs, the
  first operator that does, and the kernels that the plans put in place of operators. That outputs differ is why the
  file exists: exit code 1 is for wrong plans only.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynaflow_serving.cli.output import say, say_on_stderr
from dynaflow_serving.errors import ConfigError, PlanError, TextError

if TYPE_CHECKING:
    from rich.table import Table

    from dynaflow_serving.session.reproducer import Output, Row

PathArgument = Annotated[
    Path, typer.Argument(help="Text file with a Program and a Plan, YAML config, .py strategy, or .pt reproducer.")
]
OUTPUT_COLUMNS = (
    "output",
    "shape",
    "dtype",
    "greatest\ndifference",
    "of greatest\nvalue",
    "rows that\ndiffer",
    "of micro-\nbatches",
)
ROW_COLUMNS = ("output", "row", "micro-\nbatch", "request", "greatest\ndifference", "split", "un-split")


def check(path: PathArgument) -> None:
    """Verify a plan file, a config or a strategy, without an engine, or show what a reproducer holds."""
    if not path.is_file():
        raise ConfigError(f"{str(path)!r} is not a file")
    if path.suffix == ".pt":
        problems = check_reproducer(path)
    elif path.suffix in (".yaml", ".yml", ".py"):
        problems = check_strategy(path)
    else:
        problems = check_plan(path)
    for problem in problems:
        say_on_stderr(problem)
    if problems:
        raise typer.Exit(1)


def check_plan(path: Path) -> list[str]:
    """Verify the plan of a text file; return what is wrong with it."""
    from dynaflow_serving.core.parse import parse_plan, parse_program
    from dynaflow_serving.picture.example_plans import describe
    from dynaflow_serving.planning.verify import verify

    try:
        text = path.read_text()
        program, plan = parse_program(text), parse_plan(text)
    except (TextError, UnicodeDecodeError) as e:
        raise TextError(f"{path}: {e}") from None
    try:
        verify(program, plan)
    except PlanError as e:
        return [f"{path}: {e}"]
    say(f"OK: {path}: {describe(program, plan)}")
    return []


def check_strategy(path: Path) -> list[str]:
    """Verify the plans of the embedded examples under a config; return what is wrong with them."""
    from rich.console import Console

    from dynaflow_serving.config import load
    from dynaflow_serving.picture.example_plans import plans_of_examples, waits
    from dynaflow_serving.policy.selector import build_selector

    config = load(path)
    columns = ("example", "strategy", "micro-batches", "actions", "streams", "waits", "plan hash", "")
    table = _table(f"{path}: strategy {build_selector(config).name!r}", columns, no_wrap=True)
    problems = []
    missing: dict[str, None] = {}  # sentences, each once
    for found in plans_of_examples(config):
        if found.missing:
            missing[f"{found.example}: {found.missing}"] = None
        cells = [found.example, found.strategy, str(found.micro_batches)]
        if found.plan is None:
            problems.append(f"{found.example}, {found.strategy}, {found.micro_batches} micro-batches: {found.error}")
            table.add_row(*cells, "-", "-", "-", "-", type(found.error).__name__)
            continue
        plan = found.plan
        cells += [str(len(plan.actions)), ", ".join(plan.streams), str(waits(plan)), plan.digest]
        table.add_row(*cells, "OK")
    Console().print(table)
    for sentence in missing:
        say(f"note: {sentence}")
    return problems


def check_reproducer(path: Path) -> list[str]:
    """Show what a reproducer holds; return what is wrong with its plans."""
    from rich.console import Console
    from rich.markup import escape

    from dynaflow_serving.picture.example_plans import describe
    from dynaflow_serving.planning.verify import verify
    from dynaflow_serving.session.reproducer import load_reproducer

    reproducer = load_reproducer(path)
    console = Console()
    facts = _table(f"{path}: {reproducer.difference}", ("", ""), show_header=False)
    for name, value in reproducer.facts.items():
        facts.add_row(name, escape(value))
    console.print(facts)
    problems = []
    for i, (program, plan) in enumerate(reproducer.plans):
        try:
            verify(program, plan)
            say(f"plan {i}: verified: {describe(program, plan)}")
        except PlanError as e:
            problems.append(f"{path}: plan {i}: {e}")
    console.print(_filled("outputs, split against un-split", OUTPUT_COLUMNS, reproducer.outputs))
    console.print(_filled("worst rows", ROW_COLUMNS, reproducer.worst_rows()))
    for kernel, operators in reproducer.kernels.items():
        say(f"first suspect: kernel {kernel}, in place of {operators}")
    if not reproducer.kernels:
        say(
            "the plans put no kernel in place of operators: the suspects are operators that mix the rows of requests, "
            "and what they write in place without declaring it"
        )
    return problems


def _filled(title: str, columns: Iterable[str], lines: Iterable[Row | Output]) -> Table:
    table = _table(title, columns)
    for line in lines:
        table.add_row(*line.cells)
    return table


def _table(title: str, columns: Iterable[str], *, show_header: bool = True, no_wrap: bool = False) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), show_header=show_header)
    for column in columns:
        table.add_column(column, no_wrap=no_wrap)
    return table
