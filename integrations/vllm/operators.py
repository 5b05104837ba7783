"""vLLM's graphs are cut at these operators, some of which touch state that their schema does not show.

Contract
- Attention and KV-cache update read the module-global forward context, so they have `context`.
- The KV cache of a layer is a state. The update writes it (or an attention without one), and attention reads it.
- Collectives are NETWORK operators of group "tp". The CPU's shared-memory all-reduce works in place, as its schema
  says.
- Mixture-of-experts kernels are operators of their own. They read the forward context on CUDA, and share one scratch
  pad with attention on CPU, so both stay on the compute stream.
- `ROW_WISE` are vLLM's kernels that treat each token on its own. What quantizes a whole tensor by its greatest element
  (`dynamic_scaled_fp8_quant`) does not, and is not among them.
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
    "_c10d_functional::all_reduce": Tag.ALL_REDUCE,  # a CPU without AVX-512 has no shared-memory all-reduce
}
ROW_WISE = (
    *COLLECTIVES,
    *EXPERTS,
    # matrix products: x [tokens, ...] and weights
    *(f"_C::{name}" for name in (
        "onednn_mm", "onednn_scaled_mm", "weight_packed_linear", "fp8_scaled_mm_cpu", "int8_scaled_mm_with_quant",
        "int4_scaled_mm_cpu", "cpu_gemm_wna16", "cutlass_scaled_mm", "cutlass_scaled_mm_azp", "cutlass_scaled_fp4_mm",
        "cutlass_w4a8_mm", "machete_mm", "marlin_gemm", "gptq_gemm", "awq_gemm", "dsv3_fused_a_gemm",
    )),
    *(f"vllm::{name}" for name in (
        "rocm_unquantized_gemm", "marlin_gemm", "w8a8_triton_block_scaled_mm_func", "triton_w4a16_gemm",
        "fp8_gemm_nt_op", "cuda_flashinfer_bf16_gemm", "min_latency_fused_qkv_a_proj",
    )),
    # norms, activations and rotary embeddings
    *(f"_C::{name}" for name in (
        "rms_norm", "fused_add_rms_norm", "gemma_rms_norm", "rms_norm_static_fp8_quant",
        "fused_add_rms_norm_static_fp8_quant", "rms_norm_dynamic_per_token_quant", "rms_norm_per_block_quant",
        "layer_norm", "fused_add_layer_norm", "fused_qk_norm_rope", "rotary_embedding", "silu_and_mul",
        "silu_and_mul_with_clamp", "silu_and_mul_quant", "silu_and_mul_per_block_quant", "mul_and_silu", "gelu_and_mul",
        "gelu_tanh_and_mul", "fatrelu_and_mul", "swigluoai_and_mul", "gelu_new", "gelu_fast", "gelu_quick", "gelu_tanh",
        "relu_squared", "activation_lut_bf16",
    )),
    "vllm_ir::rms_norm", "vllm_ir::fused_add_rms_norm", "vllm::mrope", "vllm::flashinfer_rotary_embedding",
    # quantization with given scales, or with one per token or per group of a token
    *(f"_C::{name}" for name in (
        "static_scaled_fp8_quant", "dynamic_per_token_scaled_fp8_quant", "static_scaled_int8_quant",
        "dynamic_scaled_int8_quant", "per_token_group_fp8_quant", "per_token_group_quant_int8",
    )),
    # experts of a token and their weights
    *(f"_moe_C::{name}" for name in ("topk_softmax", "topk_sigmoid", "grouped_topk", "moe_sum")),
    "_C::vocab_parallel_embedding",
)  # fmt: skip


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
