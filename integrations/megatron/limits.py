"""DynaFlow declines some configurations of Megatron-LM.

Contract
- `check_decoder` names all causes before the first step.
- What draws random numbers in the layers is declined: micro-batches would draw others than the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dynaflow_serving.config import Config
from dynaflow_serving.integrations.limits import executor_causes, refuse, unsupported
from dynaflow_serving.policy.selector import AUTO, build_selector
from dynaflow_serving.strategy.tags import Tag


def check_decoder(block: Any, config: Config, device: str = "") -> None:
    """Check that a decoder can run under DynaFlow.

    Args:
        block: A `TransformerBlock`.
        config: DynaFlow's config.
        device: The type of the device that it will be on; by default, where it is.

    Raises:
        InactiveError: It cannot; the message says why.
    """
    settings = block.config
    device = device or next(block.parameters()).device.type
    refuse(
        "Megatron-LM",
        config,
        [*_causes(block, settings), *_moe_causes(settings), *_config_causes(device, config, settings)],
    )


def _config_causes(device: str, config: Config, settings: Any) -> list[str]:
    causes = executor_causes("Megatron-LM", config, device)
    if config.capture == "graph":
        causes.append("capture 'graph': Megatron-LM has no graph of its layers (set capture: auto)")
    selector = build_selector(config)
    taken, tags = selector.taken_whole, ", ".join(sorted(selector.taken_whole))
    if taken and selector.max_micro_batches > 1:
        causes.append(
            f"candidates that cut operators tagged {tags} beside candidates that split the batch "
            "(give each kind a config of its own)"
        )
    if taken and not (
        (Tag.EXPERTS in taken and settings.expert_model_parallel_size > 1)
        or (Tag.ROW_PARALLEL in taken and settings.tensor_model_parallel_size > 1)
    ):
        causes.append(f"{config.strategy} cuts operators tagged {tags}: they send nothing here")
    return causes + (_auto_causes(settings) if config.strategy == AUTO else [])


def _auto_causes(settings: Any) -> list[str]:
    """Return why `auto` cannot run forward and backward passes that no training step counts."""
    return [
        f"{name} changes with every pass, so strategy 'auto' cannot try any (name a strategy)"
        for name, present in {
            "gradient_accumulation_fusion": settings.gradient_accumulation_fusion,
            "the statistic of global_aux_loss": "global_aux_loss" in _load_balancing(settings),
            "the router's expert bias": settings.moe_router_enable_expert_bias,
            "pipeline parallelism": settings.pipeline_model_parallel_size > 1,
        }.items()
        if present
    ]


def _load_balancing(settings: Any) -> list[str]:
    kinds = settings.moe_router_load_balancing_type
    return kinds if isinstance(kinds, list) else [kinds]


def _causes(block: Any, settings: Any) -> Iterator[str]:
    yield from unsupported({
        "FP8 or FP4": settings.fp8 or settings.fp4,
        "context parallelism": settings.context_parallel_size > 1,
        "CPU offloading": settings.cpu_offloading or getattr(settings, "fine_grained_activation_offloading", False),
        "a CUDA graph (cuda_graph_impl)": getattr(settings, "cuda_graph_impl", "none") != "none",
        "delay_wgrad_compute": getattr(settings, "delay_wgrad_compute", False),
    })  # fmt: skip
    if settings.tp_comm_overlap:
        yield "tp_comm_overlap overlaps the same communication (drop --tp-comm-overlap)"
    if getattr(settings, "overlap_moe_expert_parallel_comm", False):
        yield "overlap_moe_expert_parallel_comm overlaps the same communication (drop the option)"
    if settings.hidden_dropout > 0 or settings.attention_dropout > 0:
        yield (
            f"dropout (hidden {settings.hidden_dropout}, attention {settings.attention_dropout}): micro-batches would "
            "draw other masks than the whole batch (set both to 0)"
        )
    if any(type(m).__module__.startswith("transformer_engine") for m in block.modules()):
        yield "layers of Transformer Engine communicate inside (use --transformer-impl local)"
    if max(settings.tensor_model_parallel_size, settings.expert_model_parallel_size) < 2:
        yield "the layers communicate nothing, so nothing could be overlapped (use tensor or expert parallelism)"


def _moe_causes(settings: Any) -> Iterator[str]:
    if not settings.num_moe_experts:
        return
    if settings.moe_token_dispatcher_type != "alltoall":
        yield f"token dispatcher {settings.moe_token_dispatcher_type!r} is not supported yet (use alltoall)"
    if settings.moe_expert_capacity_factor is not None:
        yield "moe_expert_capacity_factor: which tokens are dropped depends on the whole batch"
    if "sinkhorn" in _load_balancing(settings):
        yield "sinkhorn load balancing mixes the tokens of the batch"
    yield from unsupported({
        "moe_shared_expert_overlap": settings.moe_shared_expert_overlap,
        "moe_input_jitter_eps": settings.moe_input_jitter_eps,
        "moe_router_force_load_balancing": settings.moe_router_force_load_balancing,
        "moe_router_padding_for_quantization": settings.moe_router_padding_for_quantization,
    })  # fmt: skip
    coefficients = settings.moe_aux_loss_coeff
    weighted = any(coefficients) if isinstance(coefficients, list) else coefficients
    recomputed = settings.recompute_granularity == "full" or (
        settings.recompute_granularity == "selective" and "moe" in (settings.recompute_modules or ())
    )
    if recomputed and (weighted or settings.moe_z_loss_coeff):
        yield (
            "an auxiliary loss of a router that is recomputed: it is made in the backward pass, per micro-batch (set "
            "recompute_granularity to null or selective without moe, or both coefficients to 0)"
        )
