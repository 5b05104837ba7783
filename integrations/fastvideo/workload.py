"""`FastVideoWorkload` is a denoising step of FastVideo's Wan in `dynaflow bench fastvideo`.

Contract
- All ranks share the sequence by all-to-alls. Each call is made in FastVideo's forward context.
- On a machine without CUDA, `cuda_stand_in` answers what FastVideo asks of CUDA.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from dynaflow_serving.integrations import FASTVIDEO
from dynaflow_serving.integrations.diffusion.workload import TEXT_TOKENS, WAN, DiffusionWorkload


class FastVideoWorkload(DiffusionWorkload):
    """FastVideo's Wan on one rank."""

    integration = FASTVIDEO
    models = {"wan": None}

    def make_model(self, name: str) -> torch.nn.Module:
        if not torch.cuda.is_available():
            from dynaflow_serving.integrations.fastvideo import cuda_stand_in

            cuda_stand_in.install()
        from fastvideo.configs.models.dits import WanVideoConfig
        from fastvideo.configs.models.dits.wanvideo import WanVideoArchConfig
        from fastvideo.distributed.parallel_state import maybe_init_distributed_environment_and_model_parallel
        from fastvideo.models.dits.wanvideo import WanTransformer3DModel

        from dynaflow_serving.integrations.fastvideo.pipelines import see_attention

        maybe_init_distributed_environment_and_model_parallel(1, dist.get_world_size())
        config = WanVideoConfig(arch_config=WanVideoArchConfig(**WAN))
        config.arch_config.text_len = TEXT_TOKENS
        model: torch.nn.Module = WanTransformer3DModel(config=config, hf_config={})
        see_attention(model)
        return model

    def context(self) -> AbstractContextManager[Any]:
        from fastvideo.forward_context import set_forward_context

        made: AbstractContextManager[Any] = set_forward_context(current_timestep=0, attn_metadata=None)
        return made
