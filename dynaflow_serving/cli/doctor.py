"""`dynaflow doctor`: what is installed, and what of it can be used together.

Contract
- What is missing or not supported is a line of the answer, never an error.
- No engine is imported: releases are read from the packages' metadata.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def doctor() -> None:
    """Show what is installed here: torch, devices, engines with the supported releases, executors, strategies."""
    from rich.console import Console

    console = Console()
    console.print(_table("Environment", ("", ""), _environment()))
    console.print(_table("Engines", ("engine", "installed", "supported releases", "usable"), _engines()))
    console.print(_table("Executors", ("executor", "usable"), _executors()))
    console.print(_table("Strategies", ("strategy", "options (defaults)"), _strategies()))


def _table(title: str, columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _environment() -> Iterator[tuple[str, ...]]:
    import torch

    yield "dynaflow-serving", _version("dynaflow-serving")
    yield "Python", platform.python_version()
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    yield "triton", _version("triton")
    yield "transformers", _version("transformers")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        yield f"cuda:{i}", torch.cuda.get_device_name(i)
    if not count:
        yield "CUDA devices", "none"


def _engines() -> Iterator[tuple[str, ...]]:
    from dynaflow_serving.errors import InactiveError
    from dynaflow_serving.integrations import INTEGRATIONS

    for integration in INTEGRATIONS.values():
        installed = integration.installed_version()
        try:
            integration.check_release()
            usable = "yes"
        except InactiveError:
            usable = "no: not installed" if installed is None else "no: this release is not supported"
        yield integration.name, installed or "-", ", ".join(integration.supported), usable


def _executors() -> Iterator[tuple[str, ...]]:
    from dynaflow_serving.errors import DynaflowError
    from dynaflow_serving.executor import EXECUTORS, get_executor

    for name in EXECUTORS:
        try:
            get_executor(name).close()
            yield name, "yes"
        except DynaflowError as e:
            yield name, f"no: {e}"


def _strategies() -> Iterator[tuple[str, ...]]:
    from dynaflow_serving.policy.selector import options_of, strategy_names

    for name in strategy_names():
        defaults = options_of(name).model_validate({}).model_dump()
        yield name, ", ".join(f"{option}={value}" for option, value in defaults.items()) or "(none)"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
