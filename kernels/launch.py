"""Helpers of every Triton launch: rows of a tensor, checks of the arguments, the number of warps.

Contract
- Kernels see a tensor as rows of its last dimension: unit stride inside a row, any stride between rows.
  A layout without such a view (the last dimension strided, leading dimensions that do not fold) is copied.
- An argument that a kernel cannot take is a `ScheduleError` that names both. No kernel has a backward: it refuses
  arguments that require a gradient, since it would silently not compute it.
- `INTERPRETED`: triton runs kernels in Python on the CPU, because TRITON_INTERPRET=1 was set before triton
  was first imported; timings taken so mean nothing.
"""

from __future__ import annotations

import torch
import triton

from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels.limits import DTYPES, MAX_HIDDEN

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


def check(kernel: str, **tensors: torch.Tensor) -> None:
    """Raise `ScheduleError` unless all `tensors` share one supported dtype and one device that can launch, and none
    wants a gradient."""
    (first_name, first), *others = tensors.items()
    if torch.is_grad_enabled() and (wanting := [n for n, t in tensors.items() if t.requires_grad]):
        raise ScheduleError(
            f"kernel {kernel!r} has no backward, but {wanting[0]} requires a gradient: run under torch.no_grad(), or "
            "train with a strategy without replace="
        )
    if first.dtype not in DTYPES:
        valid = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ScheduleError(f"kernel {kernel!r}: {first_name} is {first.dtype}; valid: {valid}")
    for name, tensor in others:
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise ScheduleError(
                f"kernel {kernel!r}: {name} is {tensor.dtype} on {tensor.device}, "
                f"but {first_name} is {first.dtype} on {first.device}; they must be alike"
            )
    if first.device.type != "cuda" and not INTERPRETED:
        raise ScheduleError(
            f"kernel {kernel!r} runs on CUDA, its arguments are on {first.device}: move them, or, for tests on a "
            "CPU, set TRITON_INTERPRET=1 before triton is imported"
        )


def check_shape(kernel: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ScheduleError(f"kernel {kernel!r}: {name} has shape {tuple(tensor.shape)}, needed is {shape}")


def check_hidden(kernel: str, hidden: int) -> None:
    if not 0 < hidden <= MAX_HIDDEN:
        raise ScheduleError(f"kernel {kernel!r}: rows of {hidden} elements; valid: 1 to {MAX_HIDDEN}")


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Reshape `tensor` to (rows, last dimension) with unit stride in a row: a view where there is one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def warps(block: int) -> int:
    """Choose how many warps a CTA of `block` elements has: a thread holds 8 to 32 elements."""
    return min(max(block // 512, 1), 16)
