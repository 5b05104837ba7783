"""`Config` is the YAML strategy config.

Contract
- `load` takes a path, a strategy name, a mapping or a Config.
- Every mistake is one `ConfigError` that says where it is and what is valid there.
- A `Config` is only data. Its strategy and options are checked when they are built (`build_selector`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from dynaflow_serving.core.plan import COMPUTE_STREAM
from dynaflow_serving.errors import ConfigError, unknown_name

OPERATOR_NAME = r"\w+::\w+"  # namespace::name, without an overload

M = TypeVar("M", bound=BaseModel)


class StreamOptions(BaseModel):
    """These are the options of one stream of a plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    priority: int | None = Field(
        default=None,
        description="This is the CUDA priority, of which the lower goes first. The default is -1 for stream 'network', "
        "else 0. It is a hint that executors without devices ignore.",
    )
    sm_share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="The stream may use at most this share of the device's multiprocessors (green context, "
        "experimental). Streams with equal shares have the same multiprocessors; different shares may overlap.",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> StreamOptions:
        if self.sm_share is not None and self.priority is not None:
            raise ValueError("the stream of a green context has no priority: give priority or sm_share, not both")
        return self


class ExecutorOptions(BaseModel):
    """These options, a part of the YAML config, say how plans are executed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    streams: dict[str, StreamOptions] = Field(
        default_factory=dict,
        description="The strategy's streams have these options, by name. The compute stream is the caller's and has "
        "no options.",
    )
    graph: Literal["off", "whole"] = Field(
        default="off",
        description="If 'whole', each plan is captured into one CUDA graph, per token offsets of the micro-batches, "
        "when they come up for the second time.",
    )
    max_graphs: int = Field(default=32, ge=1, description="With graph: whole, at most so many graphs are captured.")

    @field_validator("graph", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as a boolean

    @field_validator("streams")
    @classmethod
    def _not_the_callers(cls, streams: dict[str, StreamOptions]) -> dict[str, StreamOptions]:
        if COMPUTE_STREAM in streams:
            raise ValueError(f"stream {COMPUTE_STREAM!r} is the caller's own and has no options here")
        return streams


class TraceOptions(BaseModel):
    """These options ask for traces of real split steps, for chrome://tracing or Perfetto."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str = Field(description="The traces go to this folder, which is made if need be.")
    every: int = Field(100, ge=1, description="One split step in so many is traced.")
    limit: int = Field(20, ge=1, description="Each rank traces at most so many steps.")


class CheckOptions(BaseModel):
    """These options say which split steps also run un-split, and are compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int | None = Field(
        default=None, ge=1, description="Besides the first step of each kind, one split step in so many is compared."
    )
    tolerance: float | None = Field(
        default=None,
        ge=0,
        description="Outputs may differ by this much, relative to the greatest magnitude of the un-split output; 0 "
        "asks for equal bits. The default depends on the dtype (float32 1e-4, bfloat16 and float16 5e-2), because "
        "kernels sum in another order for another number of rows.",
    )
    folder: str = Field(
        default="dynaflow-mismatch", description="A reproducer goes to this folder when outputs differ."
    )


def _read_check(value: Any) -> Any:
    """Return the options that `check: first` and `check: never` stand for."""
    if value in ("first", "never"):
        return CheckOptions() if value == "first" else None
    if value is None or isinstance(value, dict | CheckOptions):
        return value
    raise ValueError("say first, never, or options such as {every: 100}")


class Config(ExecutorOptions):
    """A YAML file holds these settings."""

    strategy: str = Field(
        description="This names a registered strategy, or is the path of a .py file that registers one."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="These are the options of the strategy.")
    executor: Literal["auto", "sequential", "cpu", "cuda"] = Field(
        default="auto", description="'auto' means cuda on CUDA devices, else cpu."
    )
    capture: Literal["auto", "graph", "eager"] = Field(
        default="auto",
        description="The engine's graph is scheduled, or, without one, the code between annotated calls. 'auto' means "
        "the graph where the engine makes one.",
    )
    row_wise: tuple[Annotated[str, Field(pattern=f"^{OPERATOR_NAME}$")], ...] = Field(
        default=(),
        description="These custom operators, such as mylib::rotate, treat each token on its own, like those that are "
        "given to dynaflow_serving.row_wise.",
    )
    trace: TraceOptions | None = Field(default=None, description="If given, traces of real split steps are written.")
    check: Annotated[
        CheckOptions | None,
        BeforeValidator(_read_check, json_schema_input_type=Literal["first", "never"] | CheckOptions | None),
    ] = Field(
        default="first",
        validate_default=True,
        description="If 'first', the first split step of each program and number of micro-batches also runs un-split. "
        "A difference stops the strategy there. Options say more. If 'never', nothing is compared.",
    )
    fallback: bool = Field(
        default=False,
        description="If true, the stock engine runs with a warning, instead of an error, where DynaFlow cannot be "
        "active.",
    )


def load(source: str | Path | Mapping[str, Any] | Config) -> Config:
    """Read a config from a YAML file or a mapping, or make one from the name of a strategy.

    Raises:
        ConfigError: The file does not exist, or some of its content is not valid.
    """
    if isinstance(source, Config):
        return source
    if isinstance(source, Mapping):
        return _parse(dict(source), "the config")
    return _from_text(str(source))


def read_mapping(source: str, what: str, holds: str) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Args:
        source: The path of the file.
        what: The kind of the file, for errors.
        holds: The content that the mapping should have, for errors.

    Raises:
        ConfigError: The file does not exist, or holds no mapping.
    """
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"{what} file {source!r} does not exist (looked in {Path.cwd()})")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as e:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{source} must hold a mapping {holds}")
    return content


def parse_options(options: Iterable[str]) -> dict[str, Any]:
    """Read options of the form NAME=VALUE, the value in YAML, as a command line has them.

    Raises:
        ConfigError: One is not of that form.
    """
    found = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"--option {option!r} is not of the form NAME=VALUE")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--option {option!r} is not valid YAML after the '='") from None
    return found


def checked_options(model: type[M], options: Mapping[str, Any], strategy: str) -> M:
    """Return the `options` of `strategy` as an instance of its `model`.

    Raises:
        ConfigError: An option is unknown or not valid.
    """
    try:
        return model(**options)
    except ValidationError as e:
        raise ConfigError(_explain(e, model, f"options of strategy {strategy!r}")) from None


def _from_text(source: str) -> Config:
    """Read `source` as the path of a YAML file, or take it as the name of a strategy."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or (path.exists() and path.is_file() and path.suffix != ".py"):
        return _parse(read_mapping(source, "config", "with at least 'strategy: NAME'"), source)
    if path.suffix != ".py" and "/" in source:
        raise ConfigError(f"config file {source!r} does not exist (looked in {Path.cwd()})")
    return Config(strategy=source)


def _parse(content: dict[str, Any], where: str) -> Config:
    try:
        return Config(**content)
    except ValidationError as e:
        raise ConfigError(_explain(e, Config, where)) from None
    except TypeError as e:
        raise ConfigError(f"{where}: {e}") from None


def _explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """Return one sentence per mistake that pydantic found at `where`."""
    lines = []
    for item in error.errors():
        key = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            inside = model is Config and item["loc"][0] == "streams"
            lines.append(unknown_name("option", key, StreamOptions.model_fields if inside else model.model_fields))
        elif item["type"] == "missing":
            lines.append(f"{key!r} is missing. Valid: {', '.join(sorted(model.model_fields))}.")
        else:
            lines.append(f"{key}: {item['msg']} (got {item['input']!r})")
    return f"{where}: " + " ".join(lines)
