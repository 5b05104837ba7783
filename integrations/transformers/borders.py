"""Where the body of a tensor-parallel model is cut without a graph: at its communication.

Contract
- `use_local_products` has the linears of a body multiply local tensors, by Transformers' own switch. Then nothing but
  the functions below communicates, and a layer that is computed again calls the same ones.
- The input of a column-parallel linear is an identity forward, and an all-reduce backward. The output of a row-parallel
  linear is the other way round.
- Whether a mask is needed is read from the values of the batch, which no other code of a split forward may do. Each
  micro-batch asks for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dynaflow_serving.core.program import Gradient, Resource
from dynaflow_serving.strategy.rules import SplitFunc
from dynaflow_serving.strategy.tags import Tag

PARALLEL, MASKING = "transformers.distributed.tensor_parallel", "transformers.masking_utils"
_COMPUTE, _NETWORK = Resource.COMPUTE, Resource.NETWORK
RULES = (
    SplitFunc(
        f"{PARALLEL}.RowwiseParallel.transform_output_post_forward", "all_reduce", _NETWORK, (Tag.ALL_REDUCE,), "tp",
        gradient=Gradient(_COMPUTE),
    ),
    SplitFunc(f"{PARALLEL}._AllReduceBackward.apply", "copy", gradient=Gradient(_NETWORK, "tp")),
    *(
        SplitFunc(f"{MASKING}.create_{kind}causal_mask", "mask", context=True)
        for kind in ("", "sliding_window_", "chunked_")
    ),
)  # fmt: skip


def use_local_products(body: torch.nn.Module, use: bool = True) -> None:
    """Let the tensor-parallel linears of `body` multiply local tensors, or DTensors as usual. Values stay the same."""
    for linear in parallel_linears(body):
        linear._hf_quantized_needs_local_tp = use


def parallel_linears(body: torch.nn.Module) -> Iterator[Any]:
    """Yield the tensor-parallel linears of `body`."""
    from torch.distributed.tensor import DTensor

    for module in body.modules():
        if isinstance(module, torch.nn.Linear) and isinstance(module.weight, DTensor):
            yield module


def tensor_parallel_group(body: torch.nn.Module) -> Any:
    """Return the process group of the tensor-parallel linears of `body`; None if there are none."""
    for linear in parallel_linears(body):
        mesh = linear.weight.device_mesh
        return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
    return None
