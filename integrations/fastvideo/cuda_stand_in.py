"""What FastVideo asks of CUDA, answered on a machine without: the local device, attention, autocast.

Contract
- This is for the tests and for `dynaflow bench fastvideo` on CPUs. `install` changes torch and fastvideo for the whole
  process: only ranks and scripts that these start call it, at their top.
- Models, pipelines and collectives (over gloo) are the real ones.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from dynaflow_serving.integrations.diffusion import cuda_stand_in


class Autocast(torch.autocast):
    """Casts on the CPU where a stage says "cuda"."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


@functools.cache
def install() -> None:
    """Let fastvideo run on this machine's CPU."""
    cuda_stand_in.install()
    import fastvideo
    import fastvideo.distributed.communication_op as communication
    from fastvideo.platforms.cpu import CpuPlatform

    assert fastvideo
    _replace("get_local_torch_device", lambda: torch.device("cpu"))
    warm_up = communication.warmup_sequence_parallel_communication
    _replace(warm_up.__name__, lambda device=None: warm_up(torch.device("cpu")))
    attention = "fastvideo.attention.backends.sdpa.SDPABackend"
    CpuPlatform.get_attn_backend_cls = classmethod(lambda cls, *args, **kwargs: attention)
    torch.autocast = Autocast  # type: ignore[misc]


def _replace(name: str, function: Callable[..., Any]) -> None:
    """Replace a function of fastvideo in all modules that have imported it."""
    for module in list(sys.modules.values()):
        if module is not None and module.__name__.startswith("fastvideo") and name in vars(module):
            setattr(module, name, function)
