"""The collectives of kernels: torch's functional operators, waited for, along any axis.

Contract
- Kernels call the operators themselves (`torch.ops._c10d_functional`), which captured graphs hold too. Their Python
  wrappers change names between releases of torch.
- Ranks hold equal shares of the tokens (`own_tokens`); the last ones are padded (`padded`).
- Tensors are equally long on all ranks. Another axis than the first costs a copy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from dynaflow_serving.capture.fx.matching import calls
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.strategy.rules import function_names


def group_of_sum(capture: CapturedProgram, name: str) -> dist.ProcessGroup:
    """The group of operator `name`, which is one all-reduce of a sum.

    Raises:
        ScheduleError: it is anything else.
    """
    reduces = [n for n in calls(capture.pieces[name]) if function_names(n) & {"_c10d_functional::all_reduce"}]
    others = [n for n in calls(capture.pieces[name]) if n not in reduces and not function_names(n) & {"wait_tensor"}]
    if len(reduces) != 1 or others or reduces[0].args[1] != "sum":
        raise ScheduleError(f"{name} is not one _c10d_functional.all_reduce of a sum")
    return process_group(reduces[0].args[2])


def process_group(name: Any) -> dist.ProcessGroup:
    """The group that functional collectives call `name` (`ProcessGroup.group_name`)."""
    from torch._C._distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


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


def own_tokens(tokens: int, rank: int, ranks: int) -> range:
    """The tokens that `rank` reduces: adjacent ranges of equal length, the last ones shorter or empty."""
    share = math.ceil(tokens / ranks)
    return range(min(rank * share, tokens), min((rank + 1) * share, tokens))


def padded(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """`x`, contiguous, with zeros behind it up to `size` along `axis`."""
    missing = size - x.shape[axis]
    if not missing:
        return x.contiguous()
    later_axes = x.dim() - axis - 1
    return torch.nn.functional.pad(x, [0, 0] * later_axes + [0, missing])
