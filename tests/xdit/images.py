"""What ranks run: images of tiny pipelines, from embeddings of prompts, stock and under DynaFlow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from dynaflow_serving.integrations.xdit import enable, report
from dynaflow_serving.integrations.xdit.workload import initialize

TEXT_TOKENS, WIDTH = 8, 32
TINY: dict[str, Any] = {
    "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6)
}  # fmt: skip


def flux() -> tuple[Any, dict[str, Any]]:
    """FLUX.1: guidance is an argument, and a step is one call."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from xfuser.model_executor.models.transformers.transformer_flux import xFuserFlux1Transformer2DWrapper

    transformer = xFuserFlux1Transformer2DWrapper(
        in_channels=16, num_layers=1, num_single_layers=1, pooled_projection_dim=WIDTH, guidance_embeds=True, **TINY
    )
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **nothing)
    return pipe, {"prompt_embeds": (TEXT_TOKENS, WIDTH), "pooled_prompt_embeds": (WIDTH,)}


def qwen_image() -> tuple[Any, dict[str, Any]]:
    """Qwen-Image: guidance pairs, whose calls each make their own timestep."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
    from xfuser.model_executor.models.transformers.transformer_qwen import xFuserQwenImageTransformerWrapper

    transformer = xFuserQwenImageTransformerWrapper(in_channels=64, out_channels=16, num_layers=1, **TINY)
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipe = QwenImagePipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **nothing)
    return pipe, {"prompt_embeds": (TEXT_TOKENS, WIDTH), "negative_prompt_embeds": (TEXT_TOKENS, WIDTH)}


PIPELINES: Mapping[str, Callable[[], tuple[Any, dict[str, Any]]]] = {"flux": flux, "qwen_image": qwen_image}


def compared(kind: str, config: Mapping[str, Any], numbers: tuple[int, ...]) -> dict[str, Any]:
    """Make so many images at once, for each of `numbers`, stock and then under DynaFlow.

    Returns:
        The greatest differences; the steps of the transformer, and the operators on the network of each graph.
    """
    import xfuser_loaded
    from xfuser.core.distributed import get_runtime_state

    assert xfuser_loaded
    initialize(ulysses_degree=2)
    get_runtime_state().max_condition_sequence_length = TEXT_TOKENS
    pipe, embeddings = PIPELINES[kind]()
    pipe.set_progress_bar_config(disable=True)
    random = partial(torch.randn, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in pipe.transformer.eval().parameters():
            parameter.copy_(random(parameter.shape) * 0.1)
    given = {number: {name: random(number, *shape) for name, shape in embeddings.items()} for number in numbers}

    def generate(number: int) -> torch.Tensor:
        masks = {f"{n}_mask": torch.ones(number, TEXT_TOKENS) for n in given[number]} if kind == "qwen_image" else {}
        images: torch.Tensor = pipe(
            **given[number], **masks, height=64, width=64, num_inference_steps=3, output_type="latent",
            generator=torch.Generator().manual_seed(1),
        ).images  # fmt: skip
        return images

    stock = {number: generate(number) for number in numbers}
    enable(pipe, config)
    apart = {number: float((generate(number) - stock[number]).abs().max()) for number in numbers}
    (told,) = report(pipe)
    return {
        "apart": apart,
        "split": told.steps.split,
        "unsplit": dict(told.steps.unsplit),
        "network": [program.program.count("network") for program in told.programs],
    }
