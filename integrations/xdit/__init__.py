"""`enable` puts the transformers of an xDiT pipeline under DynaFlow.

Contract
- A script calls `enable(pipe, FILE)` once the pipeline is built and xDiT's runtime state is initialised;
  `dynaflow xdit` does so for xDiT's own command line.
- A pipeline that cannot run under DynaFlow raises `InactiveError`, before the first step. With `fallback: true` it
  stays the stock pipeline, and there is a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from dynaflow_serving.config import Config, load
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations import XDIT
from dynaflow_serving.integrations.diffusion.denoiser import COMPONENTS, Denoiser
from dynaflow_serving.integrations.installed import fall_back, installed_in
from dynaflow_serving.session.report import WorkerReport

Pipeline = TypeVar("Pipeline")


def enable(pipe: Pipeline, source: str | Mapping[str, Any] | Config = "comm_overlap") -> Pipeline:
    """Run the transformers of `pipe` under DynaFlow.

    Args:
        pipe: A diffusers pipeline whose transformers are xDiT's.
        source: A YAML file, a strategy name, a mapping or a `Config`.

    Returns:
        The `pipe` itself.

    Raises:
        ConfigError: The config is wrong.
        InactiveError: The pipeline or the release is not supported, and the config does not let it fall back.
    """
    config = load(source)
    try:
        XDIT.check_release()
        from dynaflow_serving.integrations.xdit.limits import check_pipeline

        check_pipeline(pipe, config)
        for module in transformers_of(pipe):
            Denoiser.install(module, config, XDIT)
    except InactiveError as error:
        fall_back(config.fallback, error)
    return pipe


def report(pipe: Any) -> list[WorkerReport]:
    """Return the report of each transformer of `pipe` so far.

    Raises:
        InactiveError: The pipeline is not enabled.
    """
    return [installed_in(module, "xdit").session.report() for module in transformers_of(pipe)]


def transformers_of(pipe: Any) -> list[Any]:
    """Return the transformers of a pipeline, of which some have two.

    Raises:
        InactiveError: There is none.
    """
    found = [module for name in COMPONENTS if (module := getattr(pipe, name, None)) is not None]
    if not found:
        raise InactiveError(f"{type(pipe).__name__} has no transformer: DynaFlow schedules nothing else of a pipeline")
    return found
