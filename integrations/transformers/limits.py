"""DynaFlow declines some models of transformers.

Contract
- `check_model` names the reason before the first forward; `check_training` does so for training without a graph.
- `call_causes` returns why one call cannot be split without a graph, before it has run.
- What draws random numbers in the layers is declined without a graph: micro-batches would draw others than the batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dynaflow_serving.config import Config
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations.limits import context_causes, executor_causes, refuse, unsupported
from dynaflow_serving.integrations.transformers.borders import parallel_linears, tensor_parallel_group
from dynaflow_serving.policy.selector import AUTO, build_selector

# Styles of parallel modules that communicate nowhere but at our borders.
STYLES = ("colwise", "rowwise")


def check_model(model: Any) -> None:
    """Check that `model` can run under DynaFlow.

    Raises:
        InactiveError: It cannot; the message says why.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise InactiveError(
            f"enable() takes a transformers PreTrainedModel, not {type(model).__name__}; for any other PyTorch model "
            "use dynaflow_serving.compile"
        )
    if reason := _declined(model):
        raise InactiveError(
            f"DynaFlow cannot run {type(model).__name__}: {reason}. Use it without DynaFlow, or set fallback: true."
        )


def _declined(model: Any) -> str:
    """Return why `model` is declined, or ""."""
    devices = {p.device for p in model.parameters()}
    if getattr(model.config, "is_encoder_decoder", False):
        return "encoder-decoder models are not supported yet"
    if len(devices) > 1:
        return f"its weights are on {len(devices)} devices (device_map); a plan runs on one"
    if any(d.type == "meta" for d in devices):
        return "its weights are on the meta device"
    if getattr(model, "is_quantized", False):
        return "quantized weights are not supported yet"
    return ""


def check_training(model: Any, config: Config) -> None:
    """Check that `model` can be trained under DynaFlow without a graph.

    Raises:
        InactiveError: It cannot; the message says why.
    """
    refuse("transformers", config, [*_config_causes(config, model), *_random_causes(model), *_parallel_causes(model)])


def call_causes(body: Any, given: Mapping[str, Any]) -> list[str]:
    """Return why a call of `body` in training cannot be split without a graph.

    Args:
        body: The module that is called.
        given: The arguments of the call, by name.
    """
    causes = []
    checkpoints = getattr(body, "gradient_checkpointing", False) and body.training  # Transformers drops the cache then
    asked = given.get("use_cache") if given.get("use_cache") is not None else getattr(body.config, "use_cache", False)
    if given.get("past_key_values") is not None or (asked and not checkpoints):
        causes.append("a KV cache is of the whole batch (pass use_cache=False, or set model.config.use_cache to False)")
    if given.get("is_causal") is not None:
        causes.append("is_causal as an argument changes the config during the call (set it in the config)")
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if given.get(name, getattr(body.config, name, False)):
            causes.append(f"{name}: layers make more than the last hidden state (set it to False, or capture: graph)")
    return causes


def _config_causes(config: Config, model: Any) -> list[str]:
    causes = executor_causes("transformers", config, model.device.type)
    if config.strategy == AUTO:
        causes.append("strategy 'auto' times captured graphs (name a strategy, or set capture: graph)")
        return causes
    selector = build_selector(config)
    causes += context_causes(config, selector, model.device.type)
    if selector.max_micro_batches < 2:
        causes.append(f"strategy {selector.name!r} does not split the batch (choose another, or set capture: graph)")
    return causes


def _random_causes(model: Any) -> Iterator[str]:
    body = model.base_model
    settings = {n: v for n, v in vars(body.config).items() if "drop" in n or n.endswith("_jitter_noise")}
    modules = {n: m.p for n, m in body.named_modules() if isinstance(m, torch.nn.Dropout)}
    for name, value in {**settings, **modules}.items():
        if isinstance(value, float) and value > 0:
            yield f"{name} {value}: micro-batches would draw other numbers than the whole batch (set it to 0)"


def _parallel_causes(model: Any) -> Iterator[str]:
    from torch.distributed.fsdp import FSDPModule

    body = model.base_model
    yield from unsupported({"PEFT without a graph": getattr(model, "_hf_peft_config_loaded", False)})
    group = tensor_parallel_group(body)
    if group is None or group.size() < 2:
        yield (
            "the layers communicate nothing, so nothing could be overlapped (load the model with tp_plan='auto' on "
            "several ranks)"
        )
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        yield "FSDP gathers weights per layer, which micro-batches would do in turn (leave it out)"
    names = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in [*body.named_modules(), *body.named_parameters()]}
    others = {style for name, style in (body.tp_plan or {}).items() if name in names} - set(STYLES)
    if group is not None and others:
        yield f"parallel style {', '.join(sorted(others))} communicates in a way of its own (set capture: graph)"
    if any(linear.bias is not None and linear.weight.placements[0].is_shard(1) for linear in parallel_linears(body)):
        yield "a row-parallel linear adds its bias behind its all-reduce (set capture: graph)"
