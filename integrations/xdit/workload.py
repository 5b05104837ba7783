"""`XDiTWorkload` is a denoising step of xDiT's Wan in `dynaflow bench xdit`.

Contract
- All ranks share the sequence: `wan` by Ulysses (all-to-alls), `wan_ring` by a ring.
- On a machine without CUDA, `cuda_stand_in` answers what xDiT asks of CUDA.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from dynaflow_serving.integrations import XDIT
from dynaflow_serving.integrations.diffusion.workload import WAN, DiffusionWorkload


class XDiTWorkload(DiffusionWorkload):
    """xDiT's Wan on one rank."""

    integration = XDIT
    models = {"wan": "ulysses_degree", "wan_ring": "ring_degree"}

    def make_model(self, name: str) -> torch.nn.Module:
        os.environ.setdefault("XDIT_LOGGING_LEVEL", "ERROR")
        if not torch.cuda.is_available():
            from dynaflow_serving.integrations.xdit import cuda_stand_in

            cuda_stand_in.install()
        initialize(**{self.models[name]: dist.get_world_size()})
        from xfuser.model_executor.models.transformers.transformer_wan import xFuserWanTransformer3DWrapper

        model: torch.nn.Module = xFuserWanTransformer3DWrapper(**WAN)
        return model


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
