"""The `dynaflow` command.

Contract
- A `DynaflowError` is shown as one paragraph on stderr, never as a traceback, and the exit code is 2. A run that
  completed but whose verdict is bad (tokens differ, a plan is wrong) ends with exit code 1.
- Results go to stdout, progress and errors to stderr.
- A command only parses its options, calls the package that does the work, and prints. It imports that package inside
  its function, so that this module is imported quickly.
- An engine is imported in a child process only, when a command runs it. `megatron` and `xdit` are such processes
  themselves.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from dynaflow_serving.cli import bench, check, diffusion, doctor, explain, megatron, schema, simulate, tune
from dynaflow_serving.cli.output import say_on_stderr
from dynaflow_serving.errors import DynaflowError


class Commands(TyperGroup):
    """Shows a `DynaflowError` of any command, also where `app` is called instead of `main`."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DynaflowError as e:
            say_on_stderr(f"dynaflow: error: {e}")
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run an LLM engine's forward pass under a programmable schedule: benchmark it, look at it, check it.",
)
app.command("bench")(bench.bench)
app.command("tune")(tune.tune)
app.command("megatron")(megatron.megatron)
app.command("xdit")(diffusion.xdit)
app.command("fastvideo")(diffusion.fastvideo)
app.command("explain")(explain.explain)
app.command("simulate")(simulate.simulate)
app.command("check")(check.check)
app.command("schema")(schema.schema)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command of this process's arguments."""
    app()
