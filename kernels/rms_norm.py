"""Fused residual add + RMSNorm: it reads both inputs once and writes both outputs once.

Contract
- `add_rms_norm(x, residual, weight, *, eps) -> (total, normed)`, the order in which a model produces them.
- Numerics are those of the un-fused model: the sum is rounded to the dtype, and squares are summed in float32. The
  normed value is rounded before the weight is applied, as in Transformers' `LlamaRMSNorm`, or, with
  `round_first=False`, only after that, as in `torch.nn.functional.rms_norm`.
- One CTA computes a row, which stays in registers; a row has up to 16384 elements.
- It is unmeasured on a GPU. Tests compile it for sm_90 and run it by triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynaflow_serving.kernels import register_kernel
from dynaflow_serving.kernels.launch import as_rows, check, check_hidden, check_shape, warps


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, round_first: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return total, normed.to(x.dtype) * weight if round_first else (normed * weight).to(x.dtype)


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
    ROUND_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    left = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    added = (left + right).to(total.dtype.element_ty)
    tl.store(total + row * hidden + column, added, mask=inside)
    wide = added.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / hidden + eps)
    if ROUND_FIRST:
        scaled = scaled.to(total.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * hidden + column, (scaled * gain).to(total.dtype.element_ty), mask=inside)


@register_kernel("add_rms_norm", add_rms_norm_reference)
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, round_first: bool = True
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
            ROUND_FIRST=round_first,
            BLOCK=block,
            num_warps=warps(block),
        )
    return total, normed
