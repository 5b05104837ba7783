"""Copies that functionalization leaves of collectives in place.

Contract
- `torch.distributed.all_reduce(x)` is traced to an all-reduce of `x`, and a copy of its result into `x`. In a
  functional graph that copy is the result itself, and reads `x` for its shape only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dynaflow_serving.capture.fx.symbols import expression, fake_value


def drop_copies_of_collectives(gm: fx.GraphModule) -> None:
    """Replace copies of what a collective alone has made by their source; `gm` is changed."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy.default):
        into, source = node.args[:2]
        if source.target is torch.ops._c10d_functional.wait_tensor.default and len(source.users) == 1:
            old, new = fake_value(into), fake_value(source)
            if _layout(old) == _layout(new):
                node.replace_all_uses_with(source)
                gm.graph.erase_node(node)
    gm.recompile()


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what two tensors with the same memory layout have in common; no size is guarded on."""
    return tensor.dtype, *map(expression, (*tensor.shape, *tensor.stride()))
