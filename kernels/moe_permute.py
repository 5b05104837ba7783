"""MoE permute and unpermute: token rows to expert-sorted rows for a dispatch, and their weighted sum back.

Contract
- `moe_permute(hidden, topk_ids, *, experts) -> (rows, positions, offsets)`: rows offsets[e] to offsets[e + 1] are the
  tokens of expert e, in token order (a stable sort, so the result does not depend on timing);
  positions[t, k] is the row of token t's k-th expert. `counts` of a dispatch are `offsets.diff()`.
- An id outside [0, experts) names no expert of this rank (vLLM's expert maps use -1): its position is -1, no row
  is made for it, and unpermute adds nothing. The rows from offsets[experts] on are unspecified.
- `moe_unpermute(rows, positions, weights) -> sum over k of weights[t, k] * rows[positions[t, k]]`, in float32.
- No synchronisation with the host: shapes depend on shapes only, so both can be captured in a CUDA graph.
- Each token row is read once and written `topk` times (and the reverse): the sort is torch's, the moves are Triton's.
- Unmeasured on a GPU; compiled for sm_90 and run by triton's interpreter in tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels import register_kernel
from dynaflow_serving.kernels.launch import as_rows, check, check_device, check_shape, warps

BLOCK = 1024


def expert_positions(topk_ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions, offsets) of `moe_permute`, for topk_ids of shape (tokens, topk). int32."""
    ids = topk_ids.flatten()
    key = torch.where((ids >= 0) & (ids < experts), ids, experts)
    ordered, order = torch.sort(key, stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(experts + 1, device=ids.device, dtype=ids.dtype), out_int32=True)
    positions = torch.empty(len(ids), dtype=torch.int32, device=ids.device)
    positions[order] = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
    return torch.where(key < experts, positions, -1).view_as(topk_ids), offsets


def moe_permute_reference(
    hidden: torch.Tensor, topk_ids: torch.Tensor, *, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One expert after the other, by masks; the unspecified rows are 0."""
    rows = hidden.new_zeros(topk_ids.numel(), hidden.shape[1])
    positions = torch.full(topk_ids.shape, -1, dtype=torch.int32, device=hidden.device)
    offsets = torch.zeros(experts + 1, dtype=torch.int32, device=hidden.device)
    for e in range(experts):
        tokens, which = torch.where(topk_ids == e)
        first = int(offsets[e])
        offsets[e + 1] = last = first + len(tokens)
        rows[first:last] = hidden[tokens]
        positions[tokens, which] = torch.arange(first, last, dtype=torch.int32, device=hidden.device)
    return rows, positions, offsets


def moe_unpermute_reference(rows: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    picked = rows[positions.clamp(min=0).long()].float()  # (tokens, topk, hidden)
    picked = torch.where((positions >= 0)[..., None], picked, 0.0)
    return (picked * weights.float()[..., None]).sum(1).to(rows.dtype)


@triton.jit
def permute_kernel(
    hidden: tl.tensor,
    positions: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(hidden + token * stride + column, mask=inside)
    for k in tl.static_range(TOPK):
        row = tl.load(positions + token * TOPK + k).to(tl.int64)
        tl.store(rows + row * width + column, value, mask=inside & (row >= 0))


@triton.jit
def unpermute_kernel(
    rows: tl.tensor,
    positions: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOPK):
        row = tl.load(positions + token * TOPK + k).to(tl.int64)
        weight = tl.load(weights + token * TOPK + k).to(tl.float32)
        value = tl.load(rows + row * stride + column, mask=inside & (row >= 0), other=0.0).to(tl.float32)
        total += tl.where(row >= 0, weight, 0.0) * value
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)


@register_kernel("moe_permute", moe_permute_reference)
def moe_permute(
    hidden: torch.Tensor, topk_ids: torch.Tensor, *, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden: (tokens, width), topk_ids: (tokens, topk) int32 or int64.

    Returns rows (tokens * topk, width), positions (tokens, topk) int32, offsets (experts + 1,) int32.
    Raises `ScheduleError` for other shapes and dtypes.
    """
    check("moe_permute", hidden=hidden)
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise ScheduleError(f"kernel 'moe_permute': topk_ids is {topk_ids.dtype}; valid: int32, int64")
    if hidden.dim() != 2 or topk_ids.dim() != 2 or len(topk_ids) != len(hidden):
        raise ScheduleError(
            f"kernel 'moe_permute': hidden is (tokens, width) and topk_ids (tokens, topk) with as many tokens, not "
            f"{tuple(hidden.shape)} and {tuple(topk_ids.shape)}"
        )
    positions, offsets = expert_positions(topk_ids, experts)
    source, width, topk = as_rows(hidden), hidden.shape[1], topk_ids.shape[1]
    rows = torch.empty(topk_ids.numel(), width, dtype=hidden.dtype, device=hidden.device)
    if rows.numel():
        grid = (len(source), triton.cdiv(width, BLOCK))
        permute_kernel[grid](
            source, positions, rows, width, source.stride(0), TOPK=topk, BLOCK=BLOCK, num_warps=warps(BLOCK)
        )
    return rows, positions, offsets


@register_kernel("moe_unpermute", moe_unpermute_reference)
def moe_unpermute(rows: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """rows: (tokens * topk, width), positions: (tokens, topk) int32 as `moe_permute` made them, weights alike, any
    float dtype. Returns (tokens, width) in the dtype of rows. Raises `ScheduleError` for other shapes and dtypes.
    """
    check("moe_unpermute", rows=rows)
    check_device("moe_unpermute", weights)
    if positions.dtype is not torch.int32 or positions.dim() != 2 or rows.dim() != 2:
        raise ScheduleError(
            f"kernel 'moe_unpermute': positions is (tokens, topk) of int32 and rows (tokens * topk, width), not "
            f"{tuple(positions.shape)} of {positions.dtype} and {tuple(rows.shape)}"
        )
    check_shape("moe_unpermute", "weights", weights, tuple(positions.shape))
    check_shape("moe_unpermute", "rows", rows, (positions.numel(), rows.shape[1]))
    source, width, (tokens, topk) = as_rows(rows), rows.shape[1], positions.shape
    out = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    if out.numel():
        unpermute_kernel[(tokens, triton.cdiv(width, BLOCK))](
            source,
            positions.contiguous(),
            weights.contiguous(),
            out,
            width,
            source.stride(0),
            TOPK=topk,
            BLOCK=BLOCK,
            num_warps=warps(BLOCK),
        )
    return out
