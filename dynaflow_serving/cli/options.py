"""The options that several commands share, and what they are turned into.

Contract
- An option that two commands have is declared here once, as an annotated type.
- The imports that take long are inside the functions, so that `dynaflow --help` is quick.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynaflow_serving.errors import ConfigError

if TYPE_CHECKING:
    from dynaflow_serving.config import Config

StrategyOption = Annotated[
    str | None,
    typer.Option("--strategy", "-s", metavar="NAME|FILE", help="Strategy name, YAML config, or .py strategy file."),
]
ConfigOption = Annotated[
    str, typer.Option("--config", "-c", metavar="NAME|FILE", help="Strategy name, YAML config, or .py strategy file.")
]
MicroBatchesOption = Annotated[
    int | None, typer.Option("--micro-batches", "-n", help="The strategy's option micro_batches.", show_default=False)
]
OptionOption = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="NAME=VALUE", help="An option of the strategy; may be repeated."),
]
TensorParallelOption = Annotated[
    int, typer.Option("--tensor-parallel", "-tp", "--tp", min=1, help="Ranks of a tensor-parallel group.")
]
CompiledOption = Annotated[
    bool | None,
    typer.Option(
        "--compiled/--uncompiled",
        help="vLLM: with or without compilation and CUDA graphs. Default: the engine's; on a CPU `bench` compiles "
        "nothing.",
        show_default=False,
    ),
]
MaxBatchedTokensOption = Annotated[
    int | None, typer.Option(min=2, help="Tokens of one step at most. Default: the engine's.", show_default=False)
]
JSONOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]


def configure(source: str | Path, micro_batches: int | None, options: list[str] | None) -> Config:
    """Read the config at `source` and change it by the options of the command line.

    Args:
        source: The name of a strategy, or the path of a YAML or .py file.
        micro_batches: The value of the strategy's option of that name; None keeps the config's.
        options: Items of the form NAME=VALUE, the value in YAML.

    Raises:
        ConfigError: The config or one of the options is not valid.
    """
    from dynaflow_serving.config import load, parse_options
    from dynaflow_serving.policy.selector import build_selector, options_of

    config = load(source)
    changed = config.options | parse_options(options or [])
    if micro_batches is not None:
        valid = options_of(config.strategy).model_fields
        if "micro_batches" not in valid:
            raise ConfigError(
                f"--micro-batches: strategy {config.strategy!r} has no such option, it decides the number itself. "
                f"Its options: {', '.join(valid) or '(none)'}."
            )
        changed["micro_batches"] = micro_batches
    config = config.model_copy(update={"options": changed})
    build_selector(config)  # what is wrong with it is an error now, before an engine starts
    return config


def command_line() -> str:
    """Return this process's command as one would type it, without the folder of the program."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
