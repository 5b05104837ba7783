"""DynaFlow declines some pipelines and options of xDiT.

Contract
- `check_arguments` looks at the arguments of xDiT's runner, before weights load.
- `check_pipeline` looks at a pipeline and at xDiT's runtime state, before the first step.
- Each names all causes together, with the remedy where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dynaflow_serving.config import Config
from dynaflow_serving.integrations.limits import executor_causes, refuse

SYSTEM = "xDiT"
# Attention that skips what it takes for unimportant, from step to step: fragments of the names of xDiT's backends.
SPARSE = ("SPARGE", "VSA", "SPARSE", "SSTA")


def check_arguments(arguments: Any, config: Config) -> None:
    """Check the arguments of xDiT's runner.

    Args:
        arguments: An `xFuserArgs`.
        config: The strategy and its options.

    Raises:
        InactiveError: They cannot be run under DynaFlow.
    """
    schedules = ("use_hybrid_attn_schedule", "hybrid_attn_schedule", "use_hybrid_gemm_schedule", "hybrid_gemm_schedule")
    caches = ("cache_method", "use_teacache", "use_fbcache", "use_fast_attn", "use_cache")
    offloads = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_cpu_offload")
    sharding = "use_fsdp" if getattr(arguments, "use_fsdp", False) else ""
    sharding = "fully_shard_degree" if getattr(arguments, "fully_shard_degree", 1) > 1 else sharding
    causes = [
        *executor_causes(SYSTEM, config, "cuda" if torch.cuda.is_available() else "cpu"),
        *_parallelism(
            cfg=bool(arguments.use_cfg_parallel),
            pipeline=arguments.pipefusion_parallel_degree,
            sequence=(arguments.ulysses_degree or 1) * (arguments.ring_degree or 1),
        ),
        *(
            f"{name} changes what a step computes from step to step (leave it out)"
            for name in _given(arguments, schedules)
        ),
        *(
            f"{name} skips blocks, from what earlier steps computed (leave it out)"
            for name in _given(arguments, caches)
        ),
        *(f"{name} moves weights during the forward pass (leave it out)" for name in _given(arguments, offloads)),
        *([f"{sharding} gathers weights during the forward pass (leave it out)"] if sharding else []),
        *(["use_fp8_comms: exchanges in fp8 are not supported yet (leave it out)"] if arguments.use_fp8_comms else []),
        *_attention(str(arguments.attention_backend or ""), bool(arguments.vsa_drop_rates)),
    ]
    refuse(SYSTEM, config, causes)


def check_pipeline(pipe: Any, config: Config) -> None:
    """Check a pipeline whose transformers are on their device.

    Raises:
        InactiveError: It cannot be run under DynaFlow.
    """
    from dynaflow_serving.integrations.xdit import transformers_of

    modules = [getattr(module, "_orig_mod", module) for module in transformers_of(pipe)]
    device = next(modules[0].parameters()).device.type
    refuse(SYSTEM, config, [*executor_causes(SYSTEM, config, device), *_state_causes(), *_module_causes(modules)])


def _state_causes() -> Iterator[str]:
    from xfuser.core.distributed import get_runtime_state
    from xfuser.core.distributed.runtime_state import runtime_state_is_initialized

    if not runtime_state_is_initialized():
        yield "xDiT's runtime state is not initialised (call initialize_runtime_state before)"
        return
    state = get_runtime_state()
    parallel, runtime = state.parallel_config, state.runtime_config
    yield from _parallelism(
        cfg=parallel.cfg_degree > 1,
        pipeline=parallel.pp_degree,
        sequence=parallel.ulysses_degree * parallel.ring_degree,
    )
    if parallel.fs_degree > 1:
        yield "fully_shard_degree gathers weights during the forward pass (set it to 1)"
    if runtime.use_hybrid_attn_schedule:
        yield "use_hybrid_attn_schedule changes what a step computes from step to step (leave it out)"
    if state.fp8_comms is not None:
        yield "use_fp8_comms: exchanges in fp8 are not supported yet (leave it out)"
    yield from _attention(state.attention_backend.name, bool(runtime.vsa_drop_rates))


def _module_causes(modules: list[Any]) -> Iterator[str]:
    for module in modules:
        kind = type(module).__name__
        registry = getattr(module, "_diffusers_hook", None)
        if hasattr(module, "_hf_hook") or getattr(registry, "hooks", None):
            yield f"{kind} has hooks of accelerate or diffusers: offloading and caches are not supported yet"
        if getattr(module, "_is_cached", False) or getattr(module, "_cache_config", None) is not None:
            yield f"{kind} has a cache that skips blocks (call disable_cache)"


def _parallelism(cfg: bool, pipeline: int, sequence: int) -> Iterator[str]:
    if cfg:
        yield "guidance parallelism (use_cfg_parallel) leaves no pair of calls on a rank (use ulysses_degree instead)"
    if pipeline > 1:
        yield "PipeFusion (pipefusion_parallel_degree) runs patches of stale activations (use ulysses_degree instead)"
    if sequence < 2:
        yield "the transformer communicates nothing, so nothing could be overlapped (use ulysses_degree or ring_degree)"


def _attention(backend: str, drop_rates: bool) -> Iterator[str]:
    if drop_rates or any(part in backend.upper() for part in SPARSE):
        yield f"sparse attention (backend {backend or 'of drop rates'}) is not supported yet"


def _given(arguments: Any, names: tuple[str, ...]) -> Mapping[str, Any]:
    """Return those arguments among `names` that are set."""
    return {name: value for name in names if (value := getattr(arguments, name, None))}
