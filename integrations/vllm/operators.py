"""vLLM's graphs are cut at these operators, some of which touch state that their schema does not show.

Contract
- Attention and KV-cache update read the module-global forward context, so they have `context`.
- The KV cache of a layer is a state. The update writes it (or an attention without one), and attention reads it.
- Collectives are NETWORK operators of group "tp". The CPU's shared-memory all-reduce works in place, as its schema
  says.
- Mixture-of-experts kernels are operators of their own. They read the forward context on CUDA, and share one scratch
  pad with attention on CPU, so both stay on the compute stream.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from dynaflow_serving.capture.fx.effects import EffectTable
from dynaflow_serving.core.program import Resource
from dynaflow_serving.strategy.rules import Rule, SplitFunc
from dynaflow_serving.strategy.tags import Tag

KV_UPDATE = ("vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update")
ATTENTION = ("vllm::unified_attention_with_output", "vllm::unified_mla_attention_with_output")
EXPERTS = ("vllm::moe_forward", "vllm::moe_forward_shared", "_C::cpu_fused_moe")
COLLECTIVES = {
    "_C::shm_allreduce": Tag.ALL_REDUCE,
    "vllm::all_reduce": Tag.ALL_REDUCE,
    "vllm::reduce_scatter": Tag.REDUCE_SCATTER,
    "vllm::all_gather": Tag.ALL_GATHER,
}


def rules() -> tuple[Rule, ...]:
    """Return the rules that cut vLLM's graphs."""
    memory, compute, network = Resource.MEMORY, Resource.COMPUTE, Resource.NETWORK
    return (
        *(SplitFunc(n, "kv_update", memory, (Tag.KV_UPDATE,), context=True, required=False) for n in KV_UPDATE),
        *(SplitFunc(n, "attention", memory, (Tag.ATTENTION,), context=True, required=False) for n in ATTENTION),
        *(SplitFunc(n, "experts", compute, (Tag.EXPERTS,), context=True, required=False) for n in EXPERTS),
        *(SplitFunc(n, str(tag), network, (tag,), "tp", required=False) for n, tag in COLLECTIVES.items()),
    )


def effects() -> EffectTable:
    """Return the states that operators read and write, by the name of the operator."""
    return {
        **{name: _kv_written for name in KV_UPDATE},
        **{name: _kv_attended for name in ATTENTION},
    }


def collective_names() -> list[str]:
    """Return the collectives that exist on this platform, spelled as vLLM's split points."""
    import torch

    return [n for n in COLLECTIVES if hasattr(getattr(torch.ops, n.partition("::")[0]), n.partition("::")[2])]


def _kv_written(node: fx.Node) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (), (_state(node),)


def _kv_attended(node: fx.Node) -> tuple[tuple[str, ...], tuple[str, ...]]:
    updated_before = _argument(node, "kv_cache_dummy_dep") is not None
    return ((_state(node),), ()) if updated_before else ((), (_state(node),))


def _state(node: fx.Node) -> str:
    """Return the state of the layer's KV cache, named by the layer or by the graph input that carries its name."""
    return f"kv:{_argument(node, 'layer_name')}"


def _argument(node: fx.Node, name: str) -> Any:
    """Return the argument that the operator's schema calls `name`, or None where it is left out."""
    if name in node.kwargs:
        return node.kwargs[name]
    target: Any = node.target
    schema = target._schema if hasattr(target, "_schema") else getattr(target, target.overloads()[0])._schema
    position = [a.name for a in schema.arguments].index(name)
    return node.args[position] if position < len(node.args) else None
