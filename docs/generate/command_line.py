"""docs/user-guide/command-line.md, from the `dynaflow` command itself.

Contract
- `python docs/generate/command_line.py` writes the page; `pages` has the rest of the contract.
- The text of a command and of an option is its help text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer.main
from pages import generated_by, table, write

from dynaflow_serving.cli import app

PAGE = "user-guide/command-line.md"
INTRODUCTION = """# Command line

Results go to stdout, progress and errors to stderr. An error is one paragraph, and the exit code is 2. A run that
completed, but whose verdict is bad (tokens differ, a plan is wrong), ends with exit code 1.
"""


def pages() -> dict[str, str]:
    """Return the page."""
    command: Any = typer.main.get_command(app)
    context = command.context_class(command, info_name="dynaflow")
    commands = command.commands
    overview = table(
        ("command", "what it does"),
        ((f"[`dynaflow {name}`](#dynaflow-{name})", sub.get_short_help_str(200)) for name, sub in commands.items()),
    )
    sections = [_section(name, sub, context) for name, sub in commands.items()]
    return {PAGE: "\n".join([INTRODUCTION, overview, *sections]) + generated_by("command_line.py")}


def _section(name: str, command: Any, parent: Any) -> str:
    context = command.context_class(command, info_name=name, parent=parent)
    usage = f"```console\n$ dynaflow {name} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    parts = [f"## dynaflow {name}\n", f"{command.help.strip()}\n", usage]
    if rows := list(_rows(command)):
        parts.append(table(("argument or option", "default", "what it is"), rows))
    return "\n".join(parts)


def _rows(command: Any) -> Iterator[tuple[str, str, str]]:
    for parameter in command.params:
        yield _name(parameter), _default(parameter), parameter.help or ""


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} `{parameter.metavar or parameter.display_type}`"


def _default(parameter: Any) -> str:
    """Return the default as one would type it; "-" for none, and for flags that are off."""
    value = parameter.default
    if parameter.required:
        return "required"
    if value is None or value is False or callable(value) or "Sentinel" in type(value).__name__ or value == ():
        return "-"
    return "on" if value is True else f"`{value}`"


if __name__ == "__main__":
    write(pages())
