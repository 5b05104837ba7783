"""DynaFlow declines some settings and features of vLLM, each by name and before weights load.

Contract
- `check` sees the final VllmConfig, after vLLM has resolved modes and platform rewrites. It raises `InactiveError` with
  all causes and their remedies.
- `check_annotations` raises `AnnotationError` for a class or function that does not exist in vLLM and torch. If it
  exists, but is not part of the model's graph, capturing the graph finds that out.
- docs/user-guide/refusals.md is made from this file.
"""

from __future__ import annotations

import difflib
import operator
import sys
from collections.abc import Iterable
from typing import Any

import torch

from dynaflow_serving.config import Config
from dynaflow_serving.errors import AnnotationError
from dynaflow_serving.integrations.limits import (
    context_causes,
    executor_causes,
    rank_causes,
    refuse,
    unsplit_causes,
    unsupported,
)
from dynaflow_serving.integrations.vllm.experts import exchanges_tokens
from dynaflow_serving.strategy.rules import Rule, SplitFunc, SplitModule
from dynaflow_serving.strategy.selector import Selector


def check(vllm_config: Any, config: Config, selector: Selector) -> None:
    """Check that DynaFlow can be active under `config`.

    Raises:
        InactiveError: It cannot; the message lists all causes.
    """
    from vllm.platforms import current_platform

    causes = [*_mode(vllm_config, config.capture), *_cuts(vllm_config, selector.annotations)]
    causes += [*_unsplit(vllm_config, selector), *unsplit_causes("vLLM", selector)]
    device, ranks = current_platform.device_type, vllm_config.parallel_config.tensor_parallel_size
    causes += [*_features(vllm_config), *_data_parallelism(vllm_config, selector)]
    causes += [*executor_causes("vLLM", config, device), *rank_causes(selector, ranks)]
    causes += context_causes(config, selector, device)
    refuse("vLLM", config, causes)


def check_annotations(vllm_config: Any, rules: Iterable[Rule]) -> None:
    """Check that the targets of all required rules exist.

    Raises:
        AnnotationError: One does not exist.
    """
    for rule in rules:
        if rule.required and isinstance(rule.target, str):
            known = _module_classes(vllm_config) if isinstance(rule, SplitModule) else _functions()
            if rule.target not in known:
                near = difflib.get_close_matches(rule.target, known, n=12, cutoff=0.3)
                raise AnnotationError(
                    f"{type(rule).__name__}({rule.target!r}) of the strategy matches nothing: no such "
                    f"{'module class' if isinstance(rule, SplitModule) else 'function'}. Nearest of {len(known)} "
                    f"known here: {', '.join(near)}."
                )


def _module_classes(vllm_config: Any) -> set[str]:
    """Return the names of the module classes that the model's code can use, as imported by vLLM's modules."""
    from vllm.model_executor.model_loader.utils import get_model_architecture

    get_model_architecture(vllm_config.model_config)
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("vllm.model_executor.") and m is not None]
    found = {v for m in modules for v in vars(m).values() if isinstance(v, type)}
    return {c.__name__ for c in found if issubclass(c, torch.nn.Module)}


def _functions() -> set[str]:
    """Return the names of torch's functions and of all registered operators, in every spelling that a rule may use."""
    import vllm.model_executor.layers.attention  # registers vLLM's operators  # noqa: F401
    from vllm import _custom_ops  # noqa: F401

    names = {n for space in (torch, torch.nn.functional, torch.Tensor, operator) for n in dir(space)}
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        names |= {f"{namespace}::{name}", f"{namespace}.{name}", name}
    return names


def _mode(vllm_config: Any, capture: str) -> list[str]:
    """Return the causes in the compilation mode."""
    from vllm.config import CompilationMode

    compilation = vllm_config.compilation_config
    if compilation.mode == CompilationMode.NONE:
        if capture == "graph":
            return ["capture: graph needs a compilation mode with a graph (drop --enforce-eager, or set capture: auto)"]
        return []
    if capture == "eager":
        return ["capture: eager runs the model without a graph (add --enforce-eager, or set capture: auto)"]
    if compilation.mode not in (CompilationMode.DYNAMO_TRACE_ONCE, CompilationMode.VLLM_COMPILE):
        mode = getattr(compilation.mode, "name", compilation.mode)
        return [f"compilation mode {mode} captures no graph for plugins (modes 0, 2 and 3 are supported)"]
    causes = []
    if compilation.mode == CompilationMode.DYNAMO_TRACE_ONCE and compilation.backend not in ("eager", "inductor"):
        causes.append(f"compilation backend {compilation.backend!r} (mode 2 supports 'inductor' and 'eager')")
    if compilation.use_inductor_graph_partition:
        causes.append("use_inductor_graph_partition hides the pieces (set it to false)")
    if compilation.cudagraph_copy_inputs:
        causes.append("cudagraph_copy_inputs wraps the compiled graph (set it to false)")
    return causes


def _cuts(vllm_config: Any, rules: Iterable[Rule]) -> list[str]:
    """Return a cause for each annotation that mode 3 cannot cut at."""
    from vllm.config import CompilationMode

    if vllm_config.compilation_config.mode != CompilationMode.VLLM_COMPILE:
        return []
    return [
        f"{type(rule).__name__}({rule.target!r}): mode 3 cuts its graph at operators named 'namespace::name' only "
        "(compilation mode 2 takes every annotation)"
        for rule in rules
        if not (isinstance(rule, SplitFunc) and isinstance(rule.target, str) and "::" in rule.target)
    ]


def _unsplit(vllm_config: Any, selector: Selector) -> list[str]:
    """Return a cause if the strategy only orders un-split steps, which mode 3 leaves to vLLM."""
    from vllm.config import CompilationMode

    if vllm_config.compilation_config.mode != CompilationMode.VLLM_COMPILE:
        return []
    if selector.max_micro_batches > 1 or not selector.schedules_unsplit:
        return []
    return [f"strategy {selector.name!r} never splits, and mode 3 runs un-split steps as vLLM does (set mode 2)"]


def _features(vllm_config: Any) -> list[str]:
    """Return a cause for each unsupported feature that is on."""
    parallel, model, offload = vllm_config.parallel_config, vllm_config.model_config, vllm_config.offload_config
    found = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "expert load balancing (EPLB)": parallel.enable_eplb,
        "vLLM's own dual-batch overlap": parallel.use_ubatching,
        "LoRA": vllm_config.lora_config is not None,
        "speculative decoding": vllm_config.speculative_config is not None,
        "KV transfer": vllm_config.kv_transfer_config is not None,
        "encoder cache transfer": getattr(vllm_config, "ec_transfer_config", None) is not None,
        "multimodal models": model.is_multimodal_model,
        "encoder-decoder models": model.is_encoder_decoder,
        "hybrid and state-space models": model.is_hybrid or model.is_attention_free,
        "pooling models": model.runner_type == "pooling",
        "prompt embeddings": model.enable_prompt_embeds,
        "KV-sharing fast prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        # Its hooks give the layer's weight buffer to a later layer after the first micro-batch.
        "weight offloading with prefetch": offload.offload_backend == "prefetch"
        or (offload.offload_backend == "auto" and offload.prefetch.offload_group_size > 0),
        # It keeps one record per step, by a token's row in the batch, so micro-batches would overwrite each other's.
        "returning routed experts": vllm_config.aux_output_config.enabled,
        "diffusion models": model.is_diffusion,
        "a model with its own state in Model Runner V2": _has_own_state(vllm_config),
    }
    return unsupported(found)


def _data_parallelism(vllm_config: Any, selector: Selector) -> list[str]:
    """Return a cause for each setting with which data-parallel ranks cannot share experts."""
    from vllm import envs
    from vllm.config import CompilationMode

    if not exchanges_tokens(vllm_config):
        return []
    parallel, mode = vllm_config.parallel_config, vllm_config.compilation_config.mode
    found = {
        "data parallelism of a mixture of experts without expert parallelism": not parallel.enable_expert_parallel,
        "data parallelism of a mixture of experts with tensor parallelism": parallel.tensor_parallel_size > 1,
        "data parallelism of a mixture of experts in Model Runner V2": vllm_config.use_v2_model_runner,
        # The exchange is inside an operator of the graph there.
        "data parallelism of a mixture of experts in a mode with a graph": mode != CompilationMode.NONE,
        # The guard of each rank would look at its steps after another number of steps.
        "data parallelism of a mixture of experts under strategy auto": len(selector.candidates) > 1,
        "elastic expert parallelism": parallel.enable_elastic_ep,
        # Its buffers are shared by all micro-batches.
        "data parallelism of a mixture of experts over symmetric memory": envs.VLLM_USE_NCCL_SYMM_MEM,
    }
    causes = unsupported(found)
    if parallel.all2all_backend != "allgather_reducescatter":
        causes.append(
            f"all-to-all backend {parallel.all2all_backend} keeps its exchange to itself (set --all2all-backend "
            "allgather_reducescatter)"
        )
    return causes


def _has_own_state(vllm_config: Any) -> bool:
    """Return whether the model prepares its inputs itself (`get_model_state_cls`), with a state that we do not know."""
    from vllm.model_executor.model_loader.utils import get_model_architecture

    if not vllm_config.use_v2_model_runner:
        return False
    return hasattr(get_model_architecture(vllm_config.model_config)[0], "get_model_state_cls")
