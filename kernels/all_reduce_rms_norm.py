"""All-reduce + residual add + RMSNorm as reduce-scatter, add and norm on the rank's tokens, all-gather.

TokenWeave's shape (arXiv 2505.11329) of functional collectives: the norm is computed once per token
instead of once per token and rank, and its input is written once instead of `world size` times.

Contract
- Results equal all-reduce, add, norm, up to the order of the sum; all ranks hold the same bits.
- `gather_total=False`: of the returned sum only the rows of `own_tokens` are defined, which is enough where only
  the next such kernel reads it, for the same tokens; it saves a third of the traffic.
- Ranks hold ceil(tokens / ranks) tokens, the last ones fewer: uneven counts are padded, by a copy.
- Runs on gloo and NCCL. The collectives are launched by torch: `symmetric.py` has the one-kernel form.
- Unmeasured on a GPU.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from dynaflow_serving.kernels import register_kernel
from dynaflow_serving.kernels.collectives import (
    all_gather,
    all_reduce,
    own_tokens,
    padded,
    process_group,
    reduce_scatter,
)
from dynaflow_serving.kernels.reduce_rms_norm import check_arguments
from dynaflow_serving.kernels.rms_norm import add_rms_norm, add_rms_norm_reference


def all_reduce_add_rms_norm_reference(
    partial: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float = 1e-6,
    group: str,
    gather_total: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    return add_rms_norm_reference(all_reduce(partial, process_group(group)), residual, weight, eps=eps)


@register_kernel("all_reduce_add_rms_norm", all_reduce_add_rms_norm_reference)
def all_reduce_add_rms_norm(
    partial: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float = 1e-6,
    group: str,
    gather_total: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """partial, residual: (tokens, hidden), weight: (hidden,); `group`: the process group's name.

    Returns (all-reduced partial + residual, its RMSNorm). Raises `ScheduleError` for other shapes and dtypes.
    """
    check_arguments("all_reduce_add_rms_norm", partial, residual, weight)
    tokens = len(partial)
    if not tokens:
        return torch.empty_like(partial), torch.empty_like(partial)
    pg = process_group(group)
    own = own_tokens(tokens, pg.rank(), pg.size())
    shard = reduce_scatter(padded(partial, 0, tokens + -tokens % pg.size()), pg)
    mine = slice(own.start, own.stop)
    total, normed = add_rms_norm(shard[: len(own)], residual[mine], weight, eps=eps)
    gathered = _gather(normed, len(shard), tokens, pg)
    if gather_total:
        return _gather(total, len(shard), tokens, pg), gathered
    everywhere = torch.empty_like(residual)
    everywhere[mine] = total
    return everywhere, gathered


def _gather(shard: torch.Tensor, share: int, tokens: int, group: dist.ProcessGroup) -> torch.Tensor:
    return all_gather(padded(shard, 0, share), group)[:tokens]
