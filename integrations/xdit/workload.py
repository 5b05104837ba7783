"""`XDiTWorkload` is a denoising step of xDiT's Wan or FLUX.1 in `dynaflow bench xdit`.

Contract
- All ranks share the sequence: `wan` and `flux` by Ulysses (all-to-alls), `wan_ring` by a ring.
- FLUX.1 is distilled: guidance is an argument, and a step is one call.
- On a machine without CUDA, `cuda_stand_in` answers what xDiT asks of CUDA.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from dynaflow_serving.integrations import XDIT
from dynaflow_serving.integrations.diffusion.workload import (
    TEXT_TOKENS,
    TEXT_WIDTH,
    WAN,
    Calls,
    DiffusionWorkload,
    Random,
)

FLUX: dict[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 64,
    "num_attention_heads": 8, "joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": TEXT_WIDTH,
    "guidance_embeds": True, "axes_dims_rope": (16, 24, 24),
}  # fmt: skip


class XDiTWorkload(DiffusionWorkload):
    """A transformer of xDiT on one rank."""

    integration = XDIT
    models = {"wan": "ulysses_degree", "wan_ring": "ring_degree", "flux": "ulysses_degree"}

    def make_model(self, name: str) -> torch.nn.Module:
        os.environ.setdefault("XDIT_LOGGING_LEVEL", "ERROR")
        if not torch.cuda.is_available():
            from dynaflow_serving.integrations.xdit import cuda_stand_in

            cuda_stand_in.install()
        initialize(**{self.models[name]: dist.get_world_size()})
        model: torch.nn.Module
        if name == "flux":
            from xfuser.core.distributed import get_runtime_state
            from xfuser.model_executor.models.transformers.transformer_flux import xFuserFlux1Transformer2DWrapper

            get_runtime_state().max_condition_sequence_length = TEXT_TOKENS
            model = xFuserFlux1Transformer2DWrapper(**FLUX)
        else:
            from xfuser.model_executor.models.transformers.transformer_wan import xFuserWanTransformer3DWrapper

            model = xFuserWanTransformer3DWrapper(**WAN)
        return model

    def make_calls(self, name: str, rows: int, tokens: int, random: Random) -> Calls:
        if name != "flux":
            return super().make_calls(name, rows, tokens, random)
        call = {
            "hidden_states": random(rows, tokens, FLUX["in_channels"]),
            "encoder_hidden_states": random(rows, TEXT_TOKENS, TEXT_WIDTH),
            "pooled_projections": random(rows, TEXT_WIDTH), "timestep": torch.full((rows,), 0.5),
            "guidance": torch.full((rows,), 3.5), "img_ids": torch.arange(tokens * 3.0).view(tokens, 3) // 3,
            "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        }  # fmt: skip
        return [call]


def initialize(pipe: Any = None, **degrees: int) -> None:
    """Initialise xDiT's runtime state for ranks that share the sequence.

    Args:
        pipe: A diffusers pipeline; by default one without components.
        degrees: `ulysses_degree` and `ring_degree`.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
    from xfuser import xFuserArgs
    from xfuser.core.distributed import init_distributed_environment, initialize_runtime_state
    from xfuser.model_executor.models.transformers.transformer_wan import xFuserWanTransformer3DWrapper

    backend = "sdpa_flash" if degrees.get("ring_degree", 1) > 1 else "sdpa"
    arguments = xFuserArgs(model="wan", attention_backend=backend, **degrees)
    init_distributed_environment(rank=dist.get_rank(), world_size=dist.get_world_size())
    config, _ = arguments.create_config()
    if pipe is None:
        smallest = xFuserWanTransformer3DWrapper(**{**WAN, "num_layers": 1})
        scheduler = FlowMatchEulerDiscreteScheduler()
        pipe = WanPipeline(tokenizer=None, text_encoder=None, transformer=smallest, vae=None, scheduler=scheduler)
    initialize_runtime_state(pipe, config)
