"""Run operators' samples, or random programs, stock and split: `python -m benchmarks.independence COMMAND`.

Contract
- `operators` runs PyTorch's own samples (OpInfo) of all operators: `pip install expecttest`.
- `programs` runs random programs of 5 to 30 operators, each at two batch sizes.
- Each prints the verdicts per level and pass, then each fault with its reason, and writes all to a JSON file.
- `--before FILE` also lists what that run split and this one does not.
- The exit code is 1 if anything is wrong, crashes or takes too long.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.independence import samples
from benchmarks.independence.judge import Case, Mode, Outcome, judge
from benchmarks.independence.programs import RandomProgram, random_case
from benchmarks.independence.results import Results, verdict_table
from benchmarks.independence.workers import run_tasks
from dynaflow_serving.torch_backend import LEVELS

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()
SAVE_EVERY = 60.0  # seconds

Levels = Annotated[list[str], typer.Option("--level", help=f"one of {', '.join(LEVELS)}; may be repeated")]
Gradients = Annotated[bool, typer.Option(help="also run backward passes")]
Processes = Annotated[int, typer.Option(help="worker processes")]
Json = Annotated[Path | None, typer.Option("--json", help="write all verdicts to this file")]
Before = Annotated[Path | None, typer.Option(help="the file of an earlier run, to compare with")]
Limit = Annotated[float, typer.Option(help="the most seconds of one sample in one mode")]
# The cases of a task, with what a reason calls each, and the modes to run it in.
CasesOf = Callable[[Any], Iterator[tuple[str, Case, list[Mode]]]]
PROGRAMS_A_TASK = 20
DEFAULT_LEVELS = ["dynamo", "aot"]


@app.command()
def operators(
    level: Levels = DEFAULT_LEVELS,
    gradients: Gradients = True,
    most: Annotated[int, typer.Option("--samples", help="the most samples of one operator; 0 for all")] = 0,
    every: Annotated[int, typer.Option(help="run each N-th operator only")] = 1,
    only: Annotated[str, typer.Option(help="run operators whose name has this in it")] = "",
    processes: Processes = 2,
    limit: Limit = 60.0,
    json_file: Json = None,
    before: Before = None,
) -> None:
    """Run PyTorch's samples of its operators."""
    modes = _modes(level, gradients)
    names = [n for n in list(samples.operators())[::every] if only in n and n not in samples.UNDEFINED]

    def cases(name: str) -> Iterator[tuple[str, Case, list[Mode]]]:
        for number, case in enumerate(samples.cases_of(name, most)):
            yield f"sample {number}", case, modes

    _run("PyTorch's operators", names, cases, Settings(processes, 16, limit, json_file, before))


@app.command()
def programs(
    count: Annotated[int, typer.Option(help="the number of programs")] = 1000,
    first: Annotated[int, typer.Option(help="the first seed")] = 0,
    show: Annotated[int | None, typer.Option(help="print and judge the program of this seed only")] = None,
    level: Levels = DEFAULT_LEVELS,
    gradients: Gradients = True,
    processes: Processes = 2,
    limit: Limit = 60.0,
    json_file: Json = None,
    before: Before = None,
) -> None:
    """Run random programs, each at two batch sizes and in one of the modes."""
    modes = _modes(level, gradients)

    def one(seed: int) -> tuple[RandomProgram, Mode]:
        mode = modes[seed % len(modes)]
        program = random_case(seed, mode.gradients)
        return program, replace(mode, micro_batches=program.micro_batches)

    def cases(start: int) -> Iterator[tuple[str, Case, list[Mode]]]:
        for seed in range(start, min(start + PROGRAMS_A_TASK, first + count)):
            program, mode = one(seed)
            yield f"seed {seed}", program.case, [mode]

    if show is not None:
        program, mode = one(show)
        shapes = [[list(a.shape) for a in call] for call in program.case.calls]
        console.print(f"{program.source}\n{mode}, {mode.micro_batches} micro-batches, shapes {shapes}", markup=False)
        console.print(str(judge(program.case, mode)), markup=False)
        return
    tasks = list(range(first, first + count, PROGRAMS_A_TASK))
    _run("random programs", tasks, cases, Settings(processes, 10, limit, json_file, before))


@dataclass(frozen=True)
class Settings:
    """How a run is made: `chunk` tasks go to one worker process."""

    processes: int
    chunk: int
    limit: float
    json_file: Path | None
    before: Path | None


def _modes(levels: list[str], gradients: bool) -> list[Mode]:
    if unknown := set(levels) - set(LEVELS):
        raise typer.BadParameter(f"unknown level {sorted(unknown)[0]!r}; valid: {', '.join(LEVELS)}")
    return [Mode(level, g) for level in levels for g in ((False, True) if gradients else (False,))]


def _run(title: str, tasks: list[Any], cases: CasesOf, settings: Settings) -> None:
    torch.set_num_threads(1)
    _warm_up()
    results, started, saved = Results(), time.monotonic(), time.monotonic()

    def work(task: Any, skip: int) -> Iterator[tuple[Any, Any]]:
        number = 0
        for label, case, modes in cases(task):
            for mode in modes:
                number += 1
                if number > skip:
                    yield (label, str(mode)), None
                    yield (label, str(mode)), (judge(case, mode),)

    def save() -> None:
        if settings.json_file is not None:
            seconds = round(time.monotonic() - started)
            head = {"what": title, "torch": torch.__version__, "cpus": os.cpu_count(), "seconds": seconds}
            settings.json_file.write_text(json.dumps(head | results.to_json(), indent=1) + "\n")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("remaining"), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task(title, total=len(tasks))
        outcomes = run_tasks(tasks, work, processes=settings.processes, chunk=settings.chunk, limit=settings.limit)
        for task, key, result in outcomes:
            if key is None:
                progress.advance(bar)
                continue
            label, mode = key
            outcome = _of_dead_worker(result) if isinstance(result, str) else result[0]
            if outcome is not None and outcome.verdict != "split":
                outcome = replace(outcome, reason=f"{label}: {outcome.reason}")
            results.add(str(task), mode, outcome)
            if time.monotonic() - saved > SAVE_EVERY:
                saved = time.monotonic()
                save()
    save()
    _report(results, title, settings.before)


def _of_dead_worker(fate: str) -> Outcome:
    return Outcome("timeout" if fate.startswith("timeout") else "crash", fate)


def _warm_up() -> None:
    """Import what Dynamo imports in its first calls, once for all workers. A backward pass would start threads."""
    for level in ("dynamo", "aot"):
        judge(Case(lambda x: x.sin(), [(torch.ones(6, 2),)]), Mode(level))
    torch._dynamo.reset()


def _report(results: Results, title: str, before: Path | None) -> None:
    console.print(verdict_table(results, title))
    faults = list(results.faults())
    for name, mode, verdict, number, reason in faults:
        console.print(f"{name}, {mode}: {number} {verdict}: {reason}", highlight=False, markup=False)
    if before is not None:
        lost = list(results.no_longer_split(Results.from_json(json.loads(before.read_text()))))
        console.print(f"no longer split, and split with equal results in {before.name}: {len(lost)}")
        for name, mode, count, reason in lost:
            console.print(f"{name}, {mode}: {count} samples: {reason}", highlight=False, markup=False)
    if faults:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
