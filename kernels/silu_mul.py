"""SiLU-mul: the activation between the two products of a gated MLP, reading gate and up in place.

Contract
- `silu_mul(gate_up) -> silu(gate) * up`, where gate is the first and up the second half of the last dimension
  (vLLM's `silu_and_mul`, the layout of a merged gate-up projection).
- SiLU is computed in float32 and rounded to the dtype before the product, as the un-fused model does.
- Unmeasured on a GPU; compiled for sm_90 and run by triton's interpreter in tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels import register_kernel
from dynaflow_serving.kernels.launch import as_rows, check, warps

BLOCK = 1024


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@triton.jit
def silu_mul_kernel(
    gate_up: tl.tensor, out: tl.tensor, width: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, (silu * up).to(out.dtype.element_ty), mask=inside)


@register_kernel("silu_mul", silu_mul_reference)
def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up: (..., 2 * width). Returns (..., width), contiguous. Raises `ScheduleError` for an odd last dimension."""
    check("silu_mul", gate_up=gate_up)
    if gate_up.shape[-1] % 2 or not gate_up.shape[-1]:
        raise ScheduleError(
            f"kernel 'silu_mul': the last dimension holds gate and up, so it is even, not {gate_up.shape[-1]}"
        )
    rows, width = as_rows(gate_up), gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    if len(rows):
        grid = (len(rows), triton.cdiv(width, BLOCK))
        silu_mul_kernel[grid](rows, out, width, rows.stride(0), BLOCK=BLOCK, num_warps=warps(BLOCK))
    return out
