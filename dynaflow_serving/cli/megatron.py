"""`dynaflow megatron`: run a Megatron-LM training script, unchanged, under a strategy.

Contract
- It is one rank of the training, so torchrun starts it: `torchrun ... --no-python dynaflow megatron -c FILE -- SCRIPT`.
- The script's exceptions and exit codes are its own. If no step was split, the exit code is 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynaflow_serving.cli.options import ConfigOption, MicroBatchesOption, OptionOption, configure
from dynaflow_serving.cli.output import say_on_first_rank

ScriptArgument = Annotated[
    list[str], typer.Argument(metavar="-- SCRIPT ARGS...", help="The training script and its arguments.")
]


def megatron(
    script: ScriptArgument,
    config: ConfigOption = "round_robin",
    micro_batches: MicroBatchesOption = None,
    option: OptionOption = None,
) -> None:
    """Run a Megatron-LM training script under a strategy, as one rank of torchrun."""
    from dynaflow_serving.integrations.megatron.launcher import launch

    told = launch(configure(config, micro_batches, option), Path(script[0]), script[1:])
    say_on_first_rank(told)
