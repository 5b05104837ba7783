"""What xDiT asks of CUDA, answered on a machine without: the backend of collectives, events, where a pipeline lies.

Contract
- This is for the tests and for `dynaflow bench xdit` on CPUs. `install` comes before xfuser is imported, and changes
  torch, diffusers and xfuser for the whole process: only ranks that these start call it.
- Models, collectives (over gloo) and the runner are the real ones. Ring attention needs an attention that returns the
  logarithm of its sum: PyTorch's flash attention for CPUs takes the place of the one for GPUs.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import time
import types
from typing import Any

import torch

from dynaflow_serving.integrations.diffusion import cuda_stand_in


class Event:
    """An event of the CPU's own clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, *args: Any) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Event) -> float:
        return (later.seconds - self.seconds) * 1e3


@functools.cache
def install() -> None:
    """Let xfuser run on this machine's CPU."""
    cuda_stand_in.install()
    _answer_environment()
    cuda: Any = torch.cuda
    cuda.Event = Event
    _place_pipelines()
    _attend()


def _answer_environment() -> None:
    """Import xfuser, which reads its environment while it is imported."""
    spec = importlib.util.find_spec("xfuser")
    assert spec is not None and spec.submodule_search_locations is not None
    bare = types.ModuleType("xfuser")
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules["xfuser"] = bare  # xfuser.envs without xfuser/__init__
    envs: Any = importlib.import_module("xfuser.envs")
    envs.get_device_version = lambda: None
    envs.get_torch_distributed_backend = lambda: "gloo"
    envs.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True  # asked only where there is CUDA
    del sys.modules["xfuser"]
    importlib.import_module("xfuser").envs = envs  # type: ignore[attr-defined]


def _place_pipelines() -> None:
    from diffusers import DiffusionPipeline

    stock = DiffusionPipeline.to

    @functools.wraps(stock)
    def to(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        places = ["cpu" if isinstance(place, str) and place.startswith("cuda") else place for place in args]
        return stock(pipe, *places, **kwargs)

    DiffusionPipeline.to = to


def _attend() -> None:
    import xfuser.core.distributed.fp8_comms as fp8_comms
    import yunchang.globals
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType
    from xfuser.model_executor.layers import usp

    usp.PROCESS_GROUP = fp8_comms.PROCESS_GROUP = yunchang.globals.PROCESS_GROUP

    def flash(query: Any, key: Any, value: Any, dropout_p: float, is_causal: bool, attention_kwargs: Any = None) -> Any:
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attention(query, key, value, dropout_p, is_causal)

    ATTENTION_FUNCTION_REGISTRY[AttentionBackendType.SDPA_FLASH] = flash
