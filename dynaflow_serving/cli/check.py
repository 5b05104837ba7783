"""`dynaflow check`: verify a plan file, or a config or strategy before it meets an engine.

Contract
- Text file: its Program and its Plan are read and the Plan is verified; a wrong Plan ends with exit code 1 and the
  grid that marks the step.
- YAML config or .py strategy: its schedule is recorded, lowered and verified on the embedded examples for 2 to 4
  micro-batches, or for the number that the strategy itself splits into.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from dynaflow_serving.errors import ConfigError, DynaflowError, PlanError, ScheduleError, TextError

if TYPE_CHECKING:
    from dynaflow_serving.config import Config
    from dynaflow_serving.ir import Plan, Program

MICRO_BATCHES = (2, 3, 4)
LARGE = (1,) * 64 + (100_000,) * 16  # tokens of each request, decode and prefill: no threshold keeps this batch whole


def check(
    path: Annotated[Path, typer.Argument(help="Text file with a Program and a Plan, YAML config, or .py strategy.")],
) -> None:
    """Verify a plan file, a config or a strategy, without an engine."""
    if not path.is_file():
        raise ConfigError(f"{str(path)!r} is not a file")
    good = check_strategy(path) if path.suffix in (".yaml", ".yml", ".py") else check_plan(path)
    if not good:
        raise typer.Exit(1)


def check_plan(path: Path) -> bool:
    from dynaflow_serving.ir import Plan, Program
    from dynaflow_serving.verify import verify

    try:
        text = path.read_text()
        program, plan = Program.from_text(text), Plan.from_text(text)
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
    from dynaflow_serving.config import load
    from dynaflow_serving.examples import EXAMPLES, example_capture
    from dynaflow_serving.lowering import lower
    from dynaflow_serving.verify import verify

    config = load(path)
    table = Table(title=f"{path}: strategy {config.build().name!r}", title_justify="left", box=box.SIMPLE)
    for column in ("example", "micro-batches", "steps", "streams", "waits", "plan hash", ""):
        table.add_column(column, no_wrap=True)
    problems = []
    for example in EXAMPLES:
        program = example_capture(example).program
        for variant, n in _variants(config):
            try:
                strategy = variant.build()
                if n > strategy.max_micro_batches:  # engines prepare for no more than that
                    raise ScheduleError(f"split() made {n}, more than max_micro_batches={strategy.max_micro_batches}")
                plan = lower(strategy.record(program, n), strategy.name)
                verify(program, plan)
            except DynaflowError as e:
                problems.append(f"{example}, {n} micro-batches: {e}")
                table.add_row(example, str(n), *["-"] * 4, type(e).__name__)
                continue
            numbers = (str(n), str(len(plan.steps)), ", ".join(plan.streams), str(_waits(plan)))
            table.add_row(example, *numbers, plan.digest, "OK")
    Console().print(table)
    for problem in problems:
        _error(problem)
    return not problems


def _variants(config: Config) -> list[tuple[Config, int]]:
    """(config, micro-batches) to try: with option micro_batches 2, 3, 4, else as the strategy itself splits."""
    from dynaflow_serving.ir import Batch

    found: dict[int, Config] = {}
    options = config.build().options
    numbers = MICRO_BATCHES if "micro_batches" in type(options).model_fields else (0,)
    for n in numbers:
        variant = config.model_copy(update={"options": config.options | ({"micro_batches": n} if n else {})})
        try:
            split = variant.build().split(Batch(LARGE))
        except ConfigError:  # a number that its options do not allow
            continue
        found.setdefault(len(split.micro_batches), variant)
    return [(variant, n) for n, variant in found.items()]


def describe(program: Program, plan: Plan) -> str:
    """`strategy nanoflow, 13 operators x 2 micro-batches, 61 steps on compute, network, 8 waits, hash 0123...`."""
    return (
        f"strategy {plan.strategy}, {len(program.operators)} operators x {plan.micro_batches} micro-batches, "
        f"{len(plan.steps)} steps on {', '.join(plan.streams)}, {_waits(plan)} waits, hash {plan.digest}"
    )


def _waits(plan: Plan) -> int:
    return sum(step.kind.value == "wait" for step in plan.steps)


def _error(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
