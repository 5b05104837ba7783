"""The YAML strategy config.

Contract
- `load` takes a path, a strategy name, a mapping or a Config; every mistake is one `ConfigError` that says
  where it is and what is valid there.
- A `Config` is data: what its strategy and options mean is checked when they are built (`policy.build_selector`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dynaflow_serving.core.plan import COMPUTE_STREAM
from dynaflow_serving.errors import ConfigError, unknown_name

M = TypeVar("M", bound=BaseModel)


class StreamOptions(BaseModel):
    """One stream of a plan, by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    priority: int | None = Field(
        default=None,
        description="CUDA priority, lower goes first; default -1 for stream 'network', else 0; a hint that executors "
        "without devices ignore",
    )
    sm_share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the device's multiprocessors that the stream may use at most (green context, "
        "experimental); streams with one share have the same multiprocessors, different shares may overlap",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> StreamOptions:
        if self.sm_share is not None and self.priority is not None:
            raise ValueError("the stream of a green context has no priority: give priority or sm_share, not both")
        return self


class ExecutorOptions(BaseModel):
    """How plans are executed; part of the YAML config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    streams: dict[str, StreamOptions] = Field(
        default_factory=dict,
        description="options of the strategy's streams, by name; the compute stream is the caller's and has none",
    )
    graph: Literal["off", "whole"] = Field(
        default="off",
        description="whole: capture each plan, per token offsets of the micro-batches, into one CUDA graph when they "
        "come up for the second time",
    )
    max_graphs: int = Field(default=32, ge=1, description="with graph: whole, how many graphs are captured at most")

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
    """Traces of real split steps, for chrome://tracing or Perfetto."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str = Field(description="where the traces go; made if need be")
    every: int = Field(100, ge=1, description="one split step in so many is traced")
    limit: int = Field(20, ge=1, description="how many traces are written at most, per rank")


class ShadowOptions(BaseModel):
    """Split steps that are also run un-split, and compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int = Field(100, ge=1, description="one split step in so many is compared")
    tolerance: float | None = Field(
        None,
        ge=0,
        description="greatest difference, relative to the greatest magnitude of the un-split output; 0: bit for bit; "
        "default: by dtype (float32 1e-4, bfloat16 and float16 5e-2), because kernels sum in another order for another "
        "number of rows",
    )
    folder: str = Field("dynaflow-mismatch", description="where a reproducer goes when outputs differ")


class Config(ExecutorOptions):
    """What a YAML file holds."""

    strategy: str = Field(description="name of a registered strategy, or the path of a .py file that registers one")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the strategy")
    executor: Literal["auto", "sequential", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda on CUDA devices, else cpu"
    )
    capture: Literal["auto", "graph", "eager"] = Field(
        default="auto",
        description="what is scheduled: the engine's graph, or, without one, the code between annotated calls; auto: "
        "the graph where the engine makes one",
    )
    trace: TraceOptions | None = Field(default=None, description="write traces of real split steps")
    shadow: ShadowOptions | None = Field(default=None, description="run some split steps un-split too, and compare")
    fallback: bool = Field(
        default=False,
        description="run the stock engine with a warning, instead of an error, where DynaFlow cannot be active",
    )


def load(source: str | Path | Mapping[str, Any] | Config) -> Config:
    """Read a config. Raises `ConfigError`."""
    if isinstance(source, Config):
        return source
    if isinstance(source, Mapping):
        return _parse(dict(source), "the config")
    return _from_text(str(source))


def read_mapping(source: str, what: str, holds: str) -> dict[str, Any]:
    """The mapping in the YAML file `source`; `holds` says, in an error, what it should be. Raises `ConfigError`."""
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


def checked_options(model: type[M], options: Mapping[str, Any], strategy: str) -> M:
    """`options` of `strategy` as its `model`. Raises `ConfigError`."""
    try:
        return model(**options)
    except ValidationError as e:
        raise ConfigError(_explain(e, model, f"options of strategy {strategy!r}")) from None


def _from_text(source: str) -> Config:
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
