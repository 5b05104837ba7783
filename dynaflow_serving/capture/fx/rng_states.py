"""The forward and the backward graph of AOT autograd, without random states around operators that draw nothing.

Contract
- Gradient checkpointing runs operators again in the backward pass. Torch's partitioner saves the random state for each
  that may draw, and attention is among them, even with a dropout of 0.
- An operator that draws nothing is called as it is. One that draws stays as torch leaves it: it is refused later.
- Source: `torch._functorch.partitioners.default_partition` and `functionalize_rng_ops`. Torch 2.13 puts the states
  behind the device mesh that tensor parallelism saves, where its own runtime expects none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dynaflow_serving.capture.independence.prove import draws_nothing


class _Idle:
    """An operator that draws nothing, without the tags by which torch knows those that may."""

    def __init__(self, operator: torch._ops.OpOverload) -> None:
        self.operator = operator
        self.__name__, self.__module__ = operator.__name__, operator.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.operator(*args, **kwargs)


def partition_joint_graph(
    joint: fx.GraphModule, inputs: Sequence[Any], **options: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a joint graph into its forward and its backward graph, as `default_partition` does."""
    from torch._functorch.partitioners import default_partition  # seconds, which inference need not pay

    for node in joint.graph.nodes:
        if _is_idle(node):
            node.target = _Idle(node.target)
    parts: tuple[fx.GraphModule, fx.GraphModule] = default_partition(joint, inputs, **options)
    for part in parts:
        for node in part.graph.nodes:
            if isinstance(node.target, _Idle):
                node.target = node.target.operator
        part.recompile()
    return parts


def _is_idle(node: fx.Node) -> bool:
    operator = node.target
    if not isinstance(operator, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in operator.tags:
        return False
    schema = operator._schema.arguments
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    return draws_nothing(given | dict(zip((a.name for a in schema), node.args)) | node.kwargs)
