"""`hook` has FastVideo's pipelines run their transformers under DynaFlow.

Contract
- `VideoGenerator` checks its arguments before it starts the ranks, and each rank before it loads weights.
- A transformer is put under DynaFlow when its pipeline is complete, and compiled if that was asked for.
- FastVideo keeps its attention out of graphs by default. Its own switch per layer lets Dynamo see the all-to-alls.
- A generation that asks for a cache that skips steps is refused.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from dynaflow_serving.config import Config
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations import FASTVIDEO
from dynaflow_serving.integrations.diffusion.denoiser import COMPONENTS, Denoiser
from dynaflow_serving.integrations.fastvideo.limits import check_arguments, check_generation
from dynaflow_serving.integrations.installed import conclude, fall_back
from dynaflow_serving.policy.selector import build_selector

REMEDY = "Use a guidance scale above 1, lower min_tokens, or remove DynaFlow"
_HOOKED, _DENOISERS = "_dynaflow_hooked", "_dynaflow_denoisers"

logger = logging.getLogger("dynaflow_serving")


def hook(config: Config) -> None:
    """Replace what builds and calls pipelines.

    Raises:
        ConfigError: The strategy or one of its options is not valid.
        InactiveError: That was done in this process already.
    """
    from fastvideo import VideoGenerator
    from fastvideo.pipelines.composed_pipeline_base import ComposedPipelineBase

    build_selector(config)  # what is wrong with it is an error now, not in the ranks
    if getattr(ComposedPipelineBase, _HOOKED, False):
        raise InactiveError("DynaFlow is active in this process already: activate it once")
    setattr(ComposedPipelineBase, _HOOKED, True)
    for owner, name, around in (
        (VideoGenerator, "__init__", _start),
        (ComposedPipelineBase, "load_modules", _load),
        (ComposedPipelineBase, "post_init", _complete),
        (ComposedPipelineBase, "forward", _generate),
    ):
        setattr(owner, name, functools.partialmethod(around, getattr(owner, name), config))


def _start(generator: Any, stock: Any, config: Config, fastvideo_args: Any, *args: Any, **kwargs: Any) -> None:
    _checked(fastvideo_args, config)
    stock(generator, fastvideo_args, *args, **kwargs)


def _load(pipeline: Any, stock: Any, config: Config, fastvideo_args: Any, *args: Any, **kwargs: Any) -> Any:
    pipeline.__dict__[_HOOKED] = _checked(fastvideo_args, config)
    return stock(pipeline, fastvideo_args, *args, **kwargs)


def _checked(arguments: Any, config: Config) -> bool:
    """Return whether FastVideo's arguments can be run; where the config does not let it fall back, raise if not."""
    try:
        check_arguments(arguments, config)
    except InactiveError as error:
        fall_back(config.fallback, error)
        return False
    return True


def _complete(pipeline: Any, stock: Any, config: Config) -> None:
    complete = pipeline.post_init_called
    stock(pipeline)
    if complete or not pipeline.__dict__.get(_HOOKED):
        return
    denoisers = []
    try:
        for name in COMPONENTS:
            if (module := pipeline.modules.get(name)) is not None:
                denoisers.append(_install(module, config))
        if not denoisers:
            raise InactiveError(f"{type(pipeline).__name__} has no transformer: DynaFlow schedules nothing else")
    except InactiveError as error:
        fall_back(config.fallback, error)
    pipeline.__dict__[_DENOISERS] = denoisers


def _install(module: Any, config: Config) -> Denoiser:
    see_attention(getattr(module, "_orig_mod", module))
    return Denoiser.install(module, config, FASTVIDEO)


def see_attention(transformer: Any) -> None:
    """Let Dynamo follow the attention layers of `transformer`."""
    for module in transformer.modules():
        if hasattr(module, "_set_compile_forward_enabled"):
            module._set_compile_forward_enabled(True)


def _generate(pipeline: Any, stock: Any, config: Config, batch: Any, fastvideo_args: Any) -> Any:
    if pipeline.__dict__.get(_HOOKED):
        check_generation(batch)
    result = stock(pipeline, batch, fastvideo_args)  # the first generation completes the pipeline
    if denoisers := pipeline.__dict__.get(_DENOISERS):
        told = conclude(config, [d.session for d in denoisers], "denoising steps", REMEDY)
        logger.info("DynaFlow: %s", told)
    return result
