"""What megatron-core asks of CUDA, answered on a machine without: streams, events, random states, `device="cuda"`.

Contract
- This is for the tests and for `dynaflow bench megatron` on CPUs. `install` changes torch for the whole process: only
  ranks that these start call it.
- Nothing here computes. Collectives, autograd, the schedule and the optimizer are the real ones, over gloo.
- `TORCHDYNAMO_DISABLE` keeps Megatron's `jit_fuser` from compiling, which needs a C++ compiler.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class Nothing:
    """A stream or an event that is always done."""

    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self


class OnCPU(TorchFunctionMode):
    """Makes tensors on the CPU where the code says `device="cuda"`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        return func(*args, **kwargs)


@functools.cache
def install() -> None:
    """Let megatron-core run on this machine's CPU."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    stream, cuda = Nothing(), torch.cuda
    answers: dict[str, Any] = {
        "current_device": lambda: CPU,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "set_device": lambda device: None,
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda *args: None,
        "Stream": Nothing,
        "Event": Nothing,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": torch.default_generator.manual_seed,
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda *args: (9, 0),
        "memory_allocated": lambda *args: 0,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment, method-assign]
    kind = torch.Tensor.type  # the optimizer looks for the name of a CUDA tensor

    def type_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return kind(self, *args, **kwargs) if args or kwargs else f"torch.cuda.{kind(self).rpartition('.')[2]}"

    torch.Tensor.type = type_on_cuda  # type: ignore[assignment, method-assign]
    for name, dtype in {"Float": torch.float32, "Long": torch.int64, "Int": torch.int32}.items():
        setattr(cuda, f"{name}Tensor", _factory(dtype))
    _adapt_megatron()
    OnCPU().__enter__()  # type: ignore[no-untyped-call]  # for the rest of the process


def _factory(dtype: torch.dtype) -> Any:
    def make(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    return make


def _adapt_megatron() -> None:
    """Replace what megatron-core 0.16.1 does with CUDA by name."""
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    import megatron.core.transformer.torch_norm as torch_norm

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    moe_utils.te_general_gemm = None  # 0.16.1 names it without Transformer Engine, too

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = on_host

    def norm(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> torch.nn.Module:
        """Megatron's own refuses sequence parallelism."""
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        made: torch.nn.Module = kind(hidden_size, eps=eps)
        for parameter in made.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return made

    torch_norm.WrappedTorchNorm.__new__ = staticmethod(norm)
