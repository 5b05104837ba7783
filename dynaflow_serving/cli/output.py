"""The printing of the commands: plain lines, and the progress of long work.

Contract
- Lines are printed as they are: no markup, no highlighting, no wrapping.
- Progress goes to stderr. On a terminal it is a bar or a line that changes; elsewhere it is one line per message.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

WIDTH = 160  # columns that the widest table needs
Tell = Callable[[str], None]  # (what begins)
TellState = Callable[[str, str], None]  # (what is under way, what becomes of it)


def console_of_tables() -> Console:
    """Return the console for tables, which is wide enough for all of them where stdout is no terminal."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def show(things: Iterable[RenderableType]) -> None:
    """Print tables and texts on stdout; texts are not wrapped."""
    console = console_of_tables()
    for thing in things:
        console.print(thing, soft_wrap=isinstance(thing, Text))


def say(text: str) -> None:
    """Print a line on stdout."""
    _print(Console(), text)


def say_on_stderr(text: str) -> None:
    """Print a line on stderr, which is for errors and progress."""
    _print(Console(stderr=True), text)


def say_on_first_rank(told: str) -> None:
    """Say on stderr, once for all ranks, what became of a run under DynaFlow."""
    if os.environ.get("RANK", "0") == "0":
        say_on_stderr(f"DynaFlow: {told}")


@contextmanager
def progress_bar(stages: int) -> Iterator[Tell]:
    """Show a bar of so many stages, with the time that is left. The caller says what begins."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage: _print(console, stage)
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), BarColumn(), text, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=stages)
        begun = 0

        def tell(stage: str) -> None:
            nonlocal begun
            bar.update(task, description=stage, completed=begun)
            begun += 1

        yield tell


@contextmanager
def progress_lines() -> Iterator[TellState]:
    """Show a line for each thing under way; on a terminal with the time that it has taken so far."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda name, state: _print(console, f"{name}: {state}")
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console) as lines:
        tasks: dict[str, Any] = {}

        def tell(name: str, state: str) -> None:
            if name in tasks:
                lines.update(tasks[name], description=f"{name}: {state}", completed=1)
            else:
                tasks[name] = lines.add_task(f"{name}: {state}", total=1)

        yield tell


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
