"""DynaFlow declines some arguments of FastVideo.

Contract
- `check_arguments` names all causes together, with the remedy where there is one, before weights load.
- `check_generation` looks at what one generation asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dynaflow_serving.config import Config
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations.limits import executor_causes, refuse

SYSTEM = "FastVideo"
# Attention that skips what it takes for unimportant.
SPARSE = (
    "VIDEO_SPARSE_ATTN",
    "VIDEO_SPARSE_ATTN_H3",
    "BSA_ATTN",
    "VMOBA_ATTN",
    "SLA_ATTN",
    "SAGE_SLA_ATTN",
    "NABLA_ATTN",
)


def check_arguments(arguments: Any, config: Config) -> None:
    """Check a `FastVideoArgs`.

    Raises:
        InactiveError: It cannot be run under DynaFlow.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    refuse(SYSTEM, config, [*executor_causes(SYSTEM, config, device), *_causes(arguments)])


def check_generation(batch: Any) -> None:
    """Check what one generation asks for.

    Raises:
        InactiveError: It cannot be run under DynaFlow.
    """
    if getattr(batch, "enable_teacache", False):
        raise InactiveError("enable_teacache skips steps, from what earlier ones computed: leave it out under DynaFlow")


def _causes(arguments: Any) -> Iterator[str]:
    if arguments.training_mode:
        yield "training is not supported yet"
    sequence = arguments.num_gpus if arguments.sp_size == -1 else arguments.sp_size
    if sequence < 2:
        yield "the transformer communicates nothing, so nothing could be overlapped (set sp_size to 2 or more)"
    if arguments.tp_size > 1:
        yield "tensor parallelism is not supported yet (set tp_size to 1, and sp_size instead)"
    if arguments.distributed_executor_backend != "mp":
        yield f"executor backend {arguments.distributed_executor_backend!r} is not supported yet (use mp)"
    if arguments.use_fsdp_inference:
        yield "use_fsdp_inference gathers weights during the forward pass (set it to False)"
    if arguments.dit_layerwise_offload:
        yield "dit_layerwise_offload moves weights during the forward pass (set it to False)"
    if arguments.inference_torch_compile:
        yield "inference_torch_compile compiles each block on its own (use enable_torch_compile)"
    if arguments.VSA_sparsity or (arguments.attention_backend or "").upper() in SPARSE:
        yield "sparse attention is not supported yet (choose another attention backend)"
