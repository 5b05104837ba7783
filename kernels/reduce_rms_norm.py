"""Reduce + residual add + RMSNorm + broadcast in one kernel, on few CTAs (TokenWeave, arXiv 2505.11329).

Contract
- The kernel finds the partial sums of all ranks, and the places for the results, through tables of addresses: peers'
  symmetric memory between GPUs (`symmetric.py`), tensors of one device in `reduce_add_rms_norm`.
- Partial sums are added in float32 in rank order and rounded once, as a two-shot all-reduce does; from there on the
  numerics are those of `add_rms_norm`. One rank computes a row and sends it, so all ranks hold the same bits.
- `ctas` CTAs take the rows in turn: a few leave the SMs to the GEMM of the other micro-batch (TokenWeave: 2 to 8).
- Unmeasured on a GPU; compiled for sm_90 and run by triton's interpreter in tests, on all ranks' shards in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels import register_kernel
from dynaflow_serving.kernels.launch import check, check_hidden, check_shape, warps
from dynaflow_serving.kernels.rms_norm import add_rms_norm_reference, rms_norm_row


def reduce_add_rms_norm_reference(
    partials: Sequence[torch.Tensor], residual: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, ctas: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    reduced = torch.stack([p.float() for p in partials]).sum(0).to(residual.dtype)
    return add_rms_norm_reference(reduced, residual, weight, eps=eps)


@triton.jit
def pointer(table: tl.tensor, index: tl.tensor, like: tl.tensor) -> tl.tensor:
    """The address at `table[index]`, as a pointer of the type of `like`. Rows start at multiples of 16 bytes
    where `hidden` allows it; that tensors do is for the caller to see to."""
    return tl.multiple_of(tl.load(table + index).to(tl.pointer_type(like.dtype.element_ty)), 16)


@triton.jit
def reduce_rms_norm_kernel(
    partials: tl.tensor,  # addresses of (tokens, hidden), SOURCES of them
    totals: tl.tensor,  # addresses of (tokens, hidden), TOTALS of them
    normeds: tl.tensor,  # addresses of (tokens, hidden), NORMEDS of them
    residual: tl.tensor,  # (tokens, hidden) in the memory of this rank
    weight: tl.tensor,
    first: tl.tensor,  # the rows first to first + rows are this launch's
    rows: tl.tensor,
    hidden: tl.tensor,
    eps: tl.tensor,
    SOURCES: tl.constexpr,
    TOTALS: tl.constexpr,
    NORMEDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = (first + row).to(tl.int64) * hidden
        reduced = tl.zeros((BLOCK,), tl.float32)
        for rank in tl.static_range(SOURCES):
            part = pointer(partials, rank, residual)
            reduced += tl.load(part + start + column, mask=inside, other=0.0).to(tl.float32)
        reduced = reduced.to(residual.dtype.element_ty).to(tl.float32)
        kept = tl.load(residual + start + column, mask=inside, other=0.0).to(tl.float32)
        total = (reduced + kept).to(residual.dtype.element_ty)
        for rank in tl.static_range(TOTALS):
            tl.store(pointer(totals, rank, residual) + start + column, total, mask=inside)
        normed = rms_norm_row(total, weight, column, hidden, eps)
        for rank in tl.static_range(NORMEDS):
            tl.store(pointer(normeds, rank, residual) + start + column, normed, mask=inside)


def addresses(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A table of addresses for the kernel. Raises `ScheduleError` for a tensor it may not assume 16-byte rows of."""
    if any(t.data_ptr() % 16 for t in tensors):
        raise ScheduleError("kernel 'reduce_add_rms_norm': a tensor does not start at a multiple of 16 bytes: clone it")
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device=tensors[0].device)


def launch(
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    rows: range,
    ctas: int,
) -> None:
    """The rows `rows` of one launch. `tables`: addresses of partials, totals and normeds, all (tokens, hidden),
    contiguous, in the dtype of `residual`; they stay alive until the launch has finished."""
    if ctas < 1:
        raise ScheduleError(f"kernel 'reduce_add_rms_norm': ctas is {ctas}; valid: 1 and more")
    if not len(rows):
        return
    hidden = residual.shape[1]
    block = triton.next_power_of_2(hidden)
    reduce_rms_norm_kernel[(min(ctas, len(rows)),)](
        *tables,
        residual,
        weight,
        rows.start,
        len(rows),
        hidden,
        eps,
        SOURCES=len(tables[0]),
        TOTALS=len(tables[1]),
        NORMEDS=len(tables[2]),
        BLOCK=block,
        num_warps=warps(block),
    )


def check_arguments(name: str, partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise `ScheduleError` unless these are (tokens, hidden) twice, contiguous, and (hidden,)."""
    check(name, partial=partial, residual=residual, weight=weight)
    if partial.dim() != 2:
        raise ScheduleError(f"kernel {name!r}: partial is (tokens, hidden), not {tuple(partial.shape)}")
    check_hidden(name, partial.shape[1])
    check_shape(name, "residual", residual, tuple(partial.shape))
    check_shape(name, "weight", weight, (partial.shape[1],))
    for what, tensor in {"partial": partial, "residual": residual, "weight": weight}.items():
        if not tensor.is_contiguous():
            raise ScheduleError(f"kernel {name!r}: {what} is not contiguous, and addresses need that it is")


@register_kernel("reduce_add_rms_norm", reduce_add_rms_norm_reference)
def reduce_add_rms_norm(
    partials: Sequence[torch.Tensor], residual: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, ctas: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel in one process: `partials` (one per rank, on one device) and residual are (tokens, hidden).

    Returns (sum of partials + residual, its RMSNorm). Raises `ScheduleError` for other shapes and dtypes, and
    for what is not contiguous.
    """
    if not partials:
        raise ScheduleError("kernel 'reduce_add_rms_norm': partials is empty; needed is one tensor per rank")
    for partial in partials:
        check_arguments("reduce_add_rms_norm", partial, residual, weight)
    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    tables = addresses(partials), addresses([total]), addresses([normed])
    launch(tables, residual, weight, eps, range(len(residual)), ctas)
    return total, normed
