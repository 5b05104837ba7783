"""`dynaflow xdit` and `dynaflow fastvideo`: run a diffusion system under a strategy, as its own command line does.

Contract
- `xdit` is one rank of xDiT's runner, so torchrun starts it: `torchrun ... --no-python dynaflow xdit -c FILE -- ARGS`.
- `fastvideo` runs an unchanged script, which starts its ranks itself.
- The systems' exceptions and exit codes are their own. If no step was split, the exit code of `xdit` is 2.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from dynaflow_serving.cli.options import ConfigOption, MicroBatchesOption, OptionOption, configure
from dynaflow_serving.cli.output import say_on_first_rank
from dynaflow_serving.errors import ConfigError

RunnerArguments = Annotated[list[str], typer.Argument(metavar="-- ARGS...", help="The arguments of xDiT's runner.")]
ScriptArguments = Annotated[
    list[str], typer.Argument(metavar="-- SCRIPT ARGS...", help="The script and its arguments.")
]


def xdit(
    arguments: RunnerArguments,
    config: ConfigOption = "comm_overlap",
    micro_batches: MicroBatchesOption = None,
    option: OptionOption = None,
) -> None:
    """Run xDiT's command line under a strategy, as one rank of torchrun."""
    from dynaflow_serving.integrations.xdit.launcher import launch

    told = launch(configure(config, micro_batches, option), arguments)
    say_on_first_rank(told)


def fastvideo(
    script: ScriptArguments,
    config: ConfigOption = "comm_overlap",
    micro_batches: MicroBatchesOption = None,
    option: OptionOption = None,
) -> None:
    """Run a script that uses FastVideo under a strategy."""
    from dynaflow_serving.integrations.fastvideo.script import CONFIG, SCRIPT

    if not Path(script[0]).is_file():
        raise ConfigError(f"the script {script[0]} does not exist; give it after --, with its arguments")
    chosen = configure(config, micro_batches, option).model_dump_json()
    command = [sys.executable, "-m", "dynaflow_serving.integrations.fastvideo.script", *script[1:]]
    finished = subprocess.run(command, env={**os.environ, CONFIG: chosen, SCRIPT: script[0]}, check=False)
    raise typer.Exit(finished.returncode)
