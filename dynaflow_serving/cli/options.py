"""What `bench` and `explain` share: which strategy, with which options, on which model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from dynaflow_serving.config import Config, load
from dynaflow_serving.errors import ConfigError, unknown_name
from dynaflow_serving.strategies import get_strategy

StrategyOption = Annotated[
    str | None,
    typer.Option("--strategy", "-s", metavar="NAME|FILE", help="Strategy name, YAML config, or .py strategy file."),
]
MicroBatchesOption = Annotated[
    int | None, typer.Option("--micro-batches", "-n", help="The strategy's option micro_batches.", show_default=False)
]
OptionOption = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="NAME=VALUE", help="An option of the strategy; may be repeated."),
]

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+$")


def configure(source: str | Path, micro_batches: int | None, options: list[str] | None) -> Config:
    """The config at `source` with the options given on the command line. Raises `ConfigError`."""
    config = load(source)
    changed = dict(config.options)
    for option in options or []:
        name, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"--option {option!r} is not of the form NAME=VALUE")
        try:
            changed[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--option {option!r} is not valid YAML after the '='") from None
    if micro_batches is not None:
        valid = get_strategy(config.strategy).Options.model_fields
        if "micro_batches" not in valid:
            raise ConfigError(
                f"--micro-batches: strategy {config.strategy!r} has no such option, it decides the number itself. "
                f"Its options: {', '.join(valid) or '(none)'}."
            )
        changed["micro_batches"] = micro_batches
    return load(config.model_copy(update={"options": changed}))


def resolve_model(name: str | None) -> tuple[str, bool]:
    """What to tell the engine, and whether that is on this machine.

    `name` is a directory, a kind of tiny model (None: llama), or a Hugging Face name such as Qwen/Qwen3-8B.
    """
    from dynaflow_serving.bench.tiny_models import ARCHITECTURES, make_tiny_model

    name = name or "llama"
    if (Path(name) / "config.json").is_file():
        return str(Path(name).resolve()), True
    if name in ARCHITECTURES:
        return str(make_tiny_model(name)), True
    if Path(name).exists():
        raise ConfigError(f"model {name!r} is not a model directory: it has no config.json")
    if HUB_NAME.match(name) and not name.startswith("."):
        return name, False
    raise ConfigError(
        f"model {name!r} does not exist. " + unknown_name("tiny model", name, ARCHITECTURES) + " Or give the path of a "
        "model directory, or a Hugging Face name such as Qwen/Qwen3-8B."
    )


def strategy_facts(config: Config) -> dict[str, Any]:
    """All options with their values, the defaults included."""
    options: dict[str, Any] = config.build().options.model_dump()
    return options
