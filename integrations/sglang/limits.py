"""DynaFlow declines some settings and features of SGLang, each by name and before weights load.

Contract
- `check` sees the resolved arguments, and raises `InactiveError` with all causes and their remedies.
- `reason_to_run_whole` looks at features of single requests. A step with such a request runs un-split, and is counted
  with the reason.
- docs/user-guide/refusals.md is made from this file.
"""

from __future__ import annotations

from typing import Any

from dynaflow_serving.config import Config
from dynaflow_serving.integrations.limits import (
    context_causes,
    executor_causes,
    rank_causes,
    refuse,
    unsplit_causes,
    unsupported,
)
from dynaflow_serving.strategy.selector import Selector

# Only some requests set these fields of ForwardBatch, of which each micro-batch would need its own part.
PER_REQUEST = {
    "input_embeds": "input embeddings",
    "replace_embeds": "input embeddings",
    "token_type_ids": "token types",
    "token_indices_to_pool": "pooling",
    "multi_item_delimiter_indices": "multi-item scoring",
    "mm_token_modalities": "multimodal inputs",
    "spec_info": "speculative decoding",
}


def check(server_args: Any, config: Config, selector: Selector) -> None:
    """Check that DynaFlow can be active under `config`; SGLang has resolved `server_args`.

    Raises:
        InactiveError: It cannot; the message lists all causes.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view

    view, model = resolving_view(server_args), model_config_of(server_args)
    causes = [*_device(view, config, selector), *_graphs(view), *_features(view), *_model(model)]
    refuse("SGLang", config, causes)


def reason_to_run_whole(forward_batch: Any) -> str:
    """Return why no strategy may split this step, or "" if one may."""
    mode = forward_batch.forward_mode
    if not (mode.is_decode() or mode.is_extend()) or mode.is_target_verify():
        return f"forward mode {mode.name.lower()}"
    found = [what for field, what in PER_REQUEST.items() if getattr(forward_batch, field) is not None]
    return f"a request with {found[0]}" if found else ""


def _device(view: Any, config: Config, selector: Selector) -> list[str]:
    """Return the causes in the device, the executor, the kind of capture and the strategy."""
    device = str(view.device).partition(":")[0]
    if causes := executor_causes("SGLang", config, device):
        return causes
    if config.capture == "graph":
        return ["capture: graph: SGLang makes no graph of its models (set capture: auto, or eager)"]
    if selector.max_micro_batches < 2:
        return [f"strategy {config.strategy!r} never splits, and un-split steps run as SGLang runs them"]
    needs = [*rank_causes(selector, view.tp_size), *context_causes(config, selector, device)]
    return [*needs, *unsplit_causes("SGLang", selector)]


def _graphs(view: Any) -> list[str]:
    """Return a cause for each setting by which SGLang compiles the model in one piece."""
    causes = []
    if view.enable_torch_compile:
        causes.append("--enable-torch-compile compiles the model as one piece (drop it)")
    graphs = view.cuda_graph_config
    if not view.disable_cuda_graph and graphs is not None and graphs.prefill.backend == "tc_piecewise":
        causes.append("prefill graphs by torch.compile (--cuda-graph-backend-prefill=tc_piecewise; breakable works)")
    return causes


def _features(view: Any) -> list[str]:
    """Return a cause for each unsupported feature that is on."""
    found = {
        "speculative decoding": view.speculative_algorithm is not None,
        "pipeline parallelism": view.pp_size > 1,
        "data parallelism": view.dp_size > 1,
        "attention data parallelism": view.attn_dp_size > 1 or view.enable_dp_attention,
        "context parallelism": view.attn_cp_size > 1 or view.dcp_size > 1 or view.enable_prefill_cp,
        "expert parallelism": view.ep_size > 1,
        f"MoE all-to-all backend {view.moe_a2a_backend}": view.moe_a2a_backend not in (None, "none"),
        "expert load balancing (EPLB)": view.enable_eplb,
        "recording of experts": view.expert_distribution_recorder_mode is not None,
        "elastic expert parallelism": view.elastic_ep_backend is not None,
        "DWDP": (view.dwdp_size or 1) > 1,
        "SGLang's two-batch overlap": view.enable_two_batch_overlap,
        "SGLang's single-batch overlap": view.enable_single_batch_overlap,
        "prefill-decode multiplexing": view.enable_pdmux,
        "prefill-decode disaggregation": view.disaggregation_mode != "null" or view.enable_pd_role_switch,
        "LoRA": bool(view.enable_lora) or bool(view.lora_paths),
        "embedding models": view.is_embedding,
        "encoder disaggregation": view.encoder_only or view.language_only,
        "diffusion language models": view.dllm_algorithm is not None,
        "HiSparse": view.enable_hisparse,
        "sequence parallelism of the norms": view.enable_layernorm_sp,
        "scattered attention inputs": view.enable_attn_tp_input_scattered,
        "symmetric memory": view.enable_symm_mem,
        "megakernels": view.enable_nvidia_megakernel or view.enable_amd_monokernel,
        "layer offloading": view.cpu_offload_gb > 0 or view.offload_group_size > 0,
        "paged experts": view.enable_paged_experts,
        "KTransformers experts": view.kt_weight_path is not None,
        "returning auxiliary hidden states": view.enable_return_aux_hidden_states,
        "returning routed experts": view.enable_return_routed_experts,
        "returning the indexer's top-k": view.enable_return_indexer_topk,
        "bounded replay of sliding windows": (
            view.enable_encoder_swa_bounded_replay or view.enable_decoder_swa_bounded_replay
        ),
        "Ray": view.use_ray,
    }
    return unsupported(found)


def _model(model: Any) -> list[str]:
    """Return a cause for each unsupported property of the model."""
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch

    found = {
        "multimodal models": model.is_multimodal,
        "encoder-decoder models": model.is_encoder_decoder,
        "pooling and embedding models": not model.is_generation,
        "models with multi-head latent attention": model.attention_arch == AttentionArch.MLA,
        "hybrid and state-space models": mambaish_config(model) is not None,
        "sliding-window models with two KV pools": model.is_hybrid_swa,
    }
    return unsupported(found, "are")
