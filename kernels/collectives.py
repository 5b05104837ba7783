"""Collectives of kernels: torch's functional operators, waited for, along any axis.

Contract
- The operators themselves (`torch.ops._c10d_functional`), which captured graphs hold too: their Python wrappers change
  names between releases of torch.
- Tensors are as long on all ranks; along another axis than the first, by a copy before or after.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def process_group(name: Any) -> dist.ProcessGroup:
    """The group that functional collectives call `name` (`ProcessGroup.group_name`)."""
    from torch._C._distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over the ranks."""
    ops = torch.ops._c10d_functional
    reduced: torch.Tensor = ops.wait_tensor(ops.all_reduce(x, "sum", group.group_name))
    return reduced


def reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup, axis: int = 0) -> torch.Tensor:
    """This rank's share of the sum: the rank-th of as many equal parts of `axis` as there are ranks."""
    ops = torch.ops._c10d_functional
    first = x.movedim(axis, 0).contiguous()
    share = ops.wait_tensor(ops.reduce_scatter_tensor(first, "sum", group.size(), group.group_name))
    result: torch.Tensor = share.movedim(0, axis).contiguous()
    return result


def all_gather(x: torch.Tensor, group: dist.ProcessGroup, axis: int = 0) -> torch.Tensor:
    """The ranks' tensors one after the other along `axis`."""
    ops = torch.ops._c10d_functional
    first = x.movedim(axis, 0).contiguous()
    whole = ops.wait_tensor(ops.all_gather_into_tensor(first, group.size(), group.group_name))
    result: torch.Tensor = whole.movedim(0, axis).contiguous()
    return result
