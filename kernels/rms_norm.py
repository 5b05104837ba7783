"""Fused residual add + RMSNorm: one read of both inputs, one write of both outputs.

Contract
- `add_rms_norm(x, residual, weight, *, eps) -> (total, normed)`, the order in which a model produces them.
- Numerics are those of the un-fused model (Transformers' `LlamaRMSNorm` after `residual + x`; vLLM's native
  `RMSNorm`, which does not round the sum first, differs by a rounding): the sum is rounded to the dtype, squares
  are summed in float32, the normed value is rounded before the weight is applied.
- One CTA a row, which stays in registers; rows of up to 16384 elements.
- Unmeasured on a GPU; compiled for sm_90 and run by triton's interpreter in tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynaflow_serving.kernels import register_kernel
from dynaflow_serving.kernels.launch import as_rows, check, check_hidden, check_shape, warps


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return total, normed.to(x.dtype) * weight


@triton.jit
def rms_norm_row(
    total: tl.tensor, weight: tl.tensor, column: tl.tensor, hidden: tl.tensor, eps: tl.tensor
) -> tl.tensor:
    """The normed row of `total`, which is 0 beyond `hidden`, in its dtype."""
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / hidden + eps)
    normed = (wide * scale).to(total.dtype).to(tl.float32)
    gain = tl.load(weight + column, mask=column < hidden, other=0.0).to(tl.float32)
    return (normed * gain).to(total.dtype)


@triton.jit
def add_rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    hidden: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    left = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    added = (left + right).to(total.dtype.element_ty)
    tl.store(total + row * hidden + column, added, mask=inside)
    tl.store(normed + row * hidden + column, rms_norm_row(added, weight, column, hidden, eps), mask=inside)


@register_kernel("add_rms_norm", add_rms_norm_reference)
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual: (..., hidden), weight: (hidden,), one dtype. Returns (x + residual, its RMSNorm), contiguous.

    Raises `ScheduleError` for other shapes, dtypes, and more than 16384 elements a row.
    """
    hidden = x.shape[-1]
    check("add_rms_norm", x=x, residual=residual, weight=weight)
    check_hidden("add_rms_norm", hidden)
    check_shape("add_rms_norm", "residual", residual, tuple(x.shape))
    check_shape("add_rms_norm", "weight", weight, (hidden,))
    left, right = as_rows(x), as_rows(residual)
    total, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    block = triton.next_power_of_2(hidden)
    if len(left):
        add_rms_norm_kernel[(len(left),)](
            left,
            right,
            weight.contiguous(),
            total,
            normed,
            hidden,
            left.stride(0),
            right.stride(0),
            eps,
            BLOCK=block,
            num_warps=warps(block),
        )
    return total, normed
