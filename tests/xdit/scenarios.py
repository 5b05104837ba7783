"""What ranks run: generations of a pipeline, stock and under DynaFlow."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from tiny_wan import ARGUMENTS

from dynaflow_serving.integrations.xdit import enable, report
from dynaflow_serving.integrations.xdit.workload import initialize

warnings.filterwarnings("ignore")


def load_pipeline(folder: str, **degrees: int) -> Any:
    """Return the pipeline in `folder` with xDiT's transformers."""
    import xfuser_loaded
    from diffusers import WanPipeline
    from xfuser.model_executor.models.transformers.transformer_wan import xFuserWanTransformer3DWrapper

    assert xfuser_loaded
    stock = WanPipeline.from_pretrained(folder)
    names = [n for n in ("transformer", "transformer_2") if getattr(stock, n, None) is not None]
    transformers = {n: xFuserWanTransformer3DWrapper.from_pretrained(folder, subfolder=n) for n in names}
    pipe = WanPipeline.from_pretrained(folder, **transformers)
    pipe.set_progress_bar_config(disable=True)
    initialize(pipe, **degrees)
    return pipe


def generate(pipe: Any, **changes: Any) -> torch.Tensor:
    """Return the latents of one generation."""
    generator = torch.Generator().manual_seed(7)
    latents: torch.Tensor = pipe(generator=generator, output_type="latent", **{**ARGUMENTS, **changes}).frames
    return latents


def compared(
    folder: str,
    degrees: dict[str, int],
    config: Mapping[str, Any],
    generations: dict[str, dict[str, Any]],
    disturbances: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Make each generation stock, and then under DynaFlow; the same for those that are disturbed.

    Returns:
        The greatest difference of each; the steps of the transformers after the generations, and after each
        disturbance.
    """
    pipe = load_pipeline(folder, **degrees)
    stock = {name: generate(pipe, **changes) for name, changes in generations.items()}
    stock |= {kind: disturbed(pipe, kind) for kind in disturbances}
    enable(pipe, config)
    apart = {name: (generate(pipe, **changes) - stock[name]).abs().max() for name, changes in generations.items()}
    reports = report(pipe)
    found = {
        "split": [r.steps.split for r in reports],
        "unsplit": [dict(r.steps.unsplit) for r in reports],
        "network": [p.program.count("network") for r in reports for p in r.programs],
    }
    for kind in disturbances:
        apart[kind] = (disturbed(pipe, kind) - stock[kind]).abs().max()
        found[kind] = dict(report(pipe)[0].steps.unsplit)
    return {**found, "apart": {name: float(value) for name, value in apart.items()}}


LATENTS_CHANGE, CALL_RAISES = "the latents change between the calls of a pair", "the second call raises"


def disturbed(pipe: Any, kind: str) -> torch.Tensor:
    """Generate; before the sixth call of the transformer something happens."""
    forward, calls = pipe.transformer.forward, 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6 and kind == LATENTS_CHANGE:
            kwargs["hidden_states"].mul_(0.5)
        if calls == 6 and kind == CALL_RAISES:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    pipe.transformer.forward = call
    try:
        return generate(pipe, num_inference_steps=5)
    except KeyboardInterrupt:
        pipe.transformer.forward = forward
        return generate(pipe, num_inference_steps=5)
    finally:
        pipe.transformer.forward = forward


def dies(folder: str) -> str:
    """Rank 1 ends in the middle of a generation; return what rank 0 raises."""
    import os

    import torch.distributed as dist

    pipe = load_pipeline(folder, ulysses_degree=2)
    enable(pipe, "comm_overlap")
    generate(pipe, num_inference_steps=3)
    if dist.get_rank() == 1:
        os._exit(9)
    try:
        generate(pipe, num_inference_steps=3)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"
