"""SiLU-mul: the activation between the two products of a gated MLP.

Contract
- `silu_mul(gate, up) -> silu(gate) * up`. The two may be halves of one merged projection: their rows are read in place.
- SiLU is computed in float32 and rounded to the dtype before the product, as the un-fused model does.
- It is unmeasured on a GPU. Tests compile it for sm_90 and run it by triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynaflow_serving.kernels import register_kernel
from dynaflow_serving.kernels.launch import as_rows, check, check_shape, warps

BLOCK = 1024


def silu_mul_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


@triton.jit
def silu_mul_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    silu = (x * tl.sigmoid(x)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, (silu * y).to(out.dtype.element_ty), mask=inside)


@register_kernel("silu_mul", silu_mul_reference)
def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up: (..., width), one dtype. Returns the same shape, contiguous. Raises `ScheduleError` for others."""
    check("silu_mul", gate=gate, up=up)
    check_shape("silu_mul", "up", up, tuple(gate.shape))
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        left, right, width = as_rows(gate), as_rows(up), gate.shape[-1]
        grid = (len(left), triton.cdiv(width, BLOCK))
        silu_mul_kernel[grid](
            left, right, out, width, left.stride(0), right.stride(0), BLOCK=BLOCK, num_warps=warps(BLOCK)
        )
    return out
