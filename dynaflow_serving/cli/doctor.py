"""`dynaflow doctor`: what is installed, and what of it can be used together.

Contract
- What is missing or not supported is a line of the answer, never an error.
- No engine is imported: releases are read from the packages' metadata.
- With --release, the symbols of a system's `patches.md` are compared with the tested release's. If one is changed or
  gone, the command ends with exit code 1.
"""

from __future__ import annotations

import platform
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynaflow_serving.cli.output import say, say_on_stderr
from dynaflow_serving.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dynaflow_serving.integrations.base import Integration
    from dynaflow_serving.releases.patches import Finding
    from dynaflow_serving.releases.sources import Sources

ReleaseOption = Annotated[
    str | None,
    typer.Option(
        "--release",
        metavar="SYSTEM[==VERSION|=PATH]",
        help="Instead: does this release of a system, by default its newest, have what the integration touches? The "
        "path is that of a wheel or of the package's folder; the rest is fetched with pip.",
        show_default=False,
    ),
]


def doctor(release: ReleaseOption = None) -> None:
    """Show what is installed here: torch, devices, engines with the supported releases, executors, strategies."""
    from rich.console import Console

    console = Console()
    if release is not None:
        _check_release(console, release)
        return
    console.print(_table("Environment", ("", ""), _environment()))
    console.print(_table("Engines", ("engine", "installed", "supported releases", "usable"), _engines()))
    console.print(_table("Executors", ("executor", "usable"), _executors()))
    console.print(_table("Strategies", ("strategy", "options (defaults)"), _strategies()))


def _check_release(console: Console, asked: str) -> None:
    """Show what became of each symbol that the integration touches.

    Raises:
        ConfigError: `asked` names no system or no release.
        DynaflowError: pip cannot fetch a release.
    """
    from dynaflow_serving.integrations import INTEGRATIONS
    from dynaflow_serving.releases.patches import Verdict, compare, symbols

    name, equals, which = asked.partition("=")
    if name not in INTEGRATIONS:
        raise ConfigError(unknown_name("system", name, INTEGRATIONS))
    if equals and not which.lstrip("="):
        raise ConfigError(f"--release {asked}: say {name}==VERSION, {name}=PATH, or {name} for its newest release")
    integration = INTEGRATIONS[name]
    with tempfile.TemporaryDirectory(prefix="dynaflow-release-") as folder:
        tested, other = _sources(integration, which or "=", Path(folder))
        say_on_stderr(f"comparing {other.what} with {tested.what}, which was tested")
        found = list(compare(symbols(integration), tested, other))
    differences = [f for f in found if f.verdict in (Verdict.CHANGED, Verdict.GONE)]
    if differences:
        title = f"Of what the integration touches in {name}, {other.what} changed:"
        console.print(_table(title, ("symbol", "", "in the sources"), _differences(differences)))
    counts = Counter(f.verdict for f in found)
    say(", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict))
    if unchecked := [f.symbol for f in found if f.verdict is Verdict.UNCHECKED]:
        say(f"not checked, for no definition has that name: {', '.join(unchecked)}")
    if differences:
        raise typer.Exit(1)


def _sources(integration: Integration, which: str, folder: Path) -> tuple[Sources, Sources]:
    """Return the sources of the tested release and of the other one; `folder` is for wheels."""
    from dynaflow_serving.releases.sources import downloaded, given, installed

    def fetched(version: str) -> Sources:
        say_on_stderr(f"fetching {integration.package} {version or '(the newest)'}")
        return downloaded(integration, version, folder / (version or "newest"))

    tested = installed(integration) or fetched(integration.supported[-1])
    other = fetched(which[1:]) if which.startswith("=") else given(integration, Path(which))
    return tested, other


def _differences(found: list[Finding]) -> Iterator[tuple[str, ...]]:
    from rich.markup import escape

    for finding in found:
        yield finding.symbol, finding.verdict, escape("\n".join(finding.differences))


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
