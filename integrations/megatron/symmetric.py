"""Products with their collective in one kernel, through symmetric memory: `flux` on CUDA with sequence parallelism.

Contract
- `matmul_scatter` is a product and the reduce-scatter of its result, `gather_matmul` an all-gather and the product with
  its result. Both cut or join the first dimension, and the gradient of an input is the other one of the two.
- Torch's `symm_mem` operators compute tiles while others travel between the GPUs of one machine.
- `gather_matmul` keeps the gathered input for the gradient of the weight.
- Unmeasured, and not run on a GPU yet: tests run torch's own fallbacks of the operators on gloo.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def is_available(device: str, group: Any) -> bool:
    """Return whether the ranks of `group` are GPUs of this machine, as far as one can see without asking them."""
    return device == "cuda" and group is not None and 1 < dist.get_world_size(group) <= torch.cuda.device_count()


def matmul_scatter(x: torch.Tensor, weight: torch.Tensor, group: Any) -> torch.Tensor:
    """Return this rank's part [s / ranks, b, h] of the sum over the ranks of x [s, b, k] times weight [h, k]."""
    result: torch.Tensor = _MatmulScatter.apply(x, weight, group.group_name)  # type: ignore[no-untyped-call]
    return result


def gather_matmul(x: torch.Tensor, weight: torch.Tensor, group: Any) -> torch.Tensor:
    """Return [s, b, n], the x [s / ranks, b, h] of all ranks times weight [n, h]."""
    result: torch.Tensor = _GatherMatmul.apply(x, weight, group.group_name)  # type: ignore[no-untyped-call]
    return result


def _scattered(x: torch.Tensor, weight: torch.Tensor, group: str) -> torch.Tensor:
    result: torch.Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(x.contiguous(), weight, "sum", 0, group)
    return result


def _gathered(x: torch.Tensor, weight: torch.Tensor, group: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gathered input, and its product with `weight`."""
    gathered, (product,) = torch.ops.symm_mem.fused_all_gather_matmul(x.contiguous(), [weight], 0, group)
    return gathered, product


def _weight_gradient(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return gradient.flatten(0, 1).t() @ x.flatten(0, 1)


class _MatmulScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, group: str) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return _scattered(x, weight.t(), group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        gathered, x_gradient = _gathered(gradient, weight, ctx.group)
        return x_gradient, _weight_gradient(gathered, x), None


class _GatherMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, group: str) -> torch.Tensor:
        gathered, product = _gathered(x, weight.t(), group)
        ctx.save_for_backward(gathered, weight)
        ctx.group = group
        return product

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        gathered, weight = ctx.saved_tensors
        return _scattered(gradient, weight, ctx.group), _weight_gradient(gradient, gathered), None
