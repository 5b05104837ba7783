"""What several test modules share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dynaflow_serving.compile import batch_symbols
from dynaflow_serving.executor import Executor
from dynaflow_serving.ir import Plan, Step
from dynaflow_serving.partition import Capture, partition
from dynaflow_serving.partition.effects import EffectTable
from dynaflow_serving.scheduler import OpScheduler


def trace(fn: Callable[..., Any], *examples: torch.Tensor, dim: int = 0) -> fx.GraphModule:
    """The Dynamo graph of `fn`, with dimension `dim` of every example symbolic."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> fx.GraphModule:
        graphs.append(gm)
        return gm

    for example in examples:
        if example.dim() > dim:
            torch._dynamo.mark_dynamic(example, dim)
    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True)(*examples)
    assert len(graphs) == 1
    return graphs[0]


def capture(fn: Callable[..., Any], *examples: torch.Tensor, dim: int = 0, **options: Any) -> Capture:
    """`fn` as a Program; its inputs are sizes, then tensors, in the graph's order (see `arguments`)."""
    gm = trace(fn, *examples, dim=dim)
    return partition(gm, tokens=batch_symbols(gm, dim), **options)


def arguments(program_inputs: tuple[str, ...], tensors: dict[str, torch.Tensor], tokens: int) -> list[Any]:
    """The values of `program_inputs`: tensors by name, the number of tokens for every other."""
    return [tensors.get(name, tokens) for name in program_inputs]


def replaced(plan: Plan, steps: list[Step]) -> Plan:
    return dataclasses.replace(plan, steps=tuple(steps))


def names(capture: Capture) -> list[str]:
    return [o.name for o in capture.program.operators]


__all__ = [
    "Capture",
    "EffectTable",
    "Executor",
    "OpScheduler",
    "arguments",
    "capture",
    "names",
    "replaced",
    "trace",
]
