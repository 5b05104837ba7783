"""`dynaflow check`: verify a plan file, a config or strategy before it meets an engine, or look at a reproducer.

Contract
- Text file: its Program and its Plan are read and the Plan is verified; a wrong Plan ends with exit code 1 and the
  grid that marks the action.
- YAML config or .py strategy: its schedule is recorded, lowered and verified on the embedded examples for 2 to 4
  micro-batches, or for the number that the strategy itself splits into; of a strategy that chooses among candidates
  (`auto`), the schedule of each of them.
- Reproducer (.pt, written by shadow mode): its plans are verified, and what differs is shown, with the kernels that the
  plans put in place of operators. That outputs differ is why the file exists: exit code 1 is for wrong plans only.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dynaflow_serving.core.parse import parse_plan, parse_program
from dynaflow_serving.errors import ConfigError, DynaflowError, PlanError, ScheduleError, TextError

if TYPE_CHECKING:
    from dynaflow_serving.config import Config
    from dynaflow_serving.core.plan import Plan
    from dynaflow_serving.core.program import Program
    from dynaflow_serving.session.reproducer import Output, Row
    from dynaflow_serving.strategy.base import OpScheduler

MICRO_BATCHES = (2, 3, 4)
LARGE = (1,) * 64 + (100_000,) * 16  # tokens of each request, decode and prefill: no threshold keeps this batch whole


def check(
    path: Annotated[
        Path, typer.Argument(help="Text file with a Program and a Plan, YAML config, .py strategy, or .pt reproducer.")
    ],
) -> None:
    """Verify a plan file, a config or a strategy, without an engine, or show what a reproducer holds."""
    if not path.is_file():
        raise ConfigError(f"{str(path)!r} is not a file")
    if path.suffix == ".pt":
        good = check_reproducer(path)
    else:
        good = check_strategy(path) if path.suffix in (".yaml", ".yml", ".py") else check_plan(path)
    if not good:
        raise typer.Exit(1)


def check_plan(path: Path) -> bool:
    from dynaflow_serving.planning.verify import verify

    try:
        text = path.read_text()
        program, plan = parse_program(text), parse_plan(text)
    except (TextError, UnicodeDecodeError) as e:
        raise TextError(f"{path}: {e}") from None
    try:
        verify(program, plan)
    except PlanError as e:
        _error(f"{path}: {e}")
        return False
    print(f"OK: {path}: {describe(program, plan)}")
    return True


def check_strategy(path: Path) -> bool:
    from dynaflow_serving.capture.examples import EXAMPLES, example_capture
    from dynaflow_serving.config import load
    from dynaflow_serving.planning.lowering import lower
    from dynaflow_serving.planning.verify import verify

    config = load(path)
    table = Table(title=f"{path}: strategy {config.build().name!r}", title_justify="left", box=box.SIMPLE)
    for column in ("example", "strategy", "micro-batches", "actions", "streams", "waits", "plan hash", ""):
        table.add_column(column, no_wrap=True)
    problems = []
    for example in EXAMPLES:
        program = example_capture(example).program
        for strategy, n in _variants(config):
            try:
                if n > strategy.max_micro_batches:  # engines prepare for no more than that
                    raise ScheduleError(f"split() made {n}, more than max_micro_batches={strategy.max_micro_batches}")
                plan = lower(strategy.record(program, n), strategy.name)
                verify(program, plan)
            except DynaflowError as e:
                problems.append(f"{example}, {strategy.name}, {n} micro-batches: {e}")
                table.add_row(example, strategy.name, str(n), *["-"] * 4, type(e).__name__)
                continue
            numbers = (str(n), str(len(plan.actions)), ", ".join(plan.streams), str(_waits(plan)))
            table.add_row(example, strategy.name, *numbers, plan.digest, "OK")
    Console().print(table)
    for problem in problems:
        _error(problem)
    return not problems


def check_reproducer(path: Path) -> bool:
    from dynaflow_serving.planning.verify import verify
    from dynaflow_serving.session.reproducer import load_reproducer

    r = load_reproducer(path)
    out = Console()
    facts = Table(title=f"{path}: {r.difference}", title_justify="left", box=box.SIMPLE, show_header=False)
    for name, value in r.facts.items():
        facts.add_row(name, escape(value))
    out.print(facts)
    problems = []
    for i, (program, plan) in enumerate(r.plans):
        try:
            verify(program, plan)
            _say(f"plan {i}: verified: {describe(program, plan)}")
        except PlanError as e:
            problems.append(f"{path}: plan {i}: {e}")
    of_output = (
        "output", "shape", "dtype", "greatest\ndifference", "of greatest\nvalue", "rows that\ndiffer",
        "of micro-\nbatches",
    )  # fmt: skip
    of_row = ("output", "row", "micro-\nbatch", "request", "greatest\ndifference", "split", "un-split")
    out.print(_table("outputs, split against un-split", of_output, r.outputs))
    out.print(_table("worst rows", of_row, r.worst_rows()))
    for kernel, operators in r.kernels.items():
        _say(f"first suspect: kernel {kernel}, in place of {operators}")
    if not r.kernels:
        _say(
            "the plans put no kernel in place of operators: the suspects are operators that mix the rows of requests, "
            "and what they write in place without declaring it"
        )
    for problem in problems:
        _error(problem)
    return not problems


def _table(title: str, headings: Iterable[str], lines: Iterable[Row | Output]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading)
    for line in lines:
        table.add_row(*line.cells)
    return table


def _variants(config: Config) -> list[tuple[OpScheduler, int]]:
    """(strategy, micro-batches) to try: each candidate where there are several, else with option micro_batches 2, 3, 4,
    else as the strategy itself splits."""
    from dynaflow_serving.core.batch import Batch

    given = config.build()
    if given.candidates != ("",):
        each = [given.of(label) for label in given.candidates]
        return [(strategy, strategy.max_micro_batches) for strategy in each]
    found: dict[int, OpScheduler] = {}
    numbers = MICRO_BATCHES if "micro_batches" in type(given.options).model_fields else (0,)
    for n in numbers:
        variant = config.model_copy(update={"options": config.options | ({"micro_batches": n} if n else {})})
        try:
            strategy = variant.build()
            split = strategy.split(Batch(LARGE))
        except ConfigError:  # a number that its options do not allow
            continue
        found.setdefault(len(split.micro_batches), strategy)
    return [(strategy, n) for n, strategy in found.items()]


def describe(program: Program, plan: Plan) -> str:
    """`strategy nanoflow, 13 operators x 2 micro-batches, 61 actions on compute, network, 8 waits, hash 0123...`."""
    return (
        f"strategy {plan.strategy}, {len(program.operators)} operators x {plan.micro_batches} micro-batches, "
        f"{len(plan.actions)} actions on {', '.join(plan.streams)}, {_waits(plan)} waits, hash {plan.digest}"
    )


def _waits(plan: Plan) -> int:
    return sum(action.kind.value == "wait" for action in plan.actions)


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _error(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
