"""A Program with everything needed to run it: what either front-end makes.

Contract
- Operator callables take the Program's input values in order and return one output bare, several as a tuple. `into`
  variants take, after the inputs, one buffer for each of `Operator.into`.
- The model's nested output structure is rebuilt by `CapturedProgram.rebuild`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dynaflow_serving.core.program import Program
from dynaflow_serving.errors import PartitionError

# Called with the number of the micro-batch before an operator with context, when the micro-batch changes.
Enter = Callable[[int], Any]

# What runs a plan: (program inputs without constants, token offsets of the micro-batches, enter) -> outputs.
PlanFunction = Callable[[Sequence[Any], Sequence[int], Enter], list[Any]]


@dataclass
class CapturedProgram:
    """A Program with everything needed to run it."""

    program: Program
    functions: dict[str, Callable[..., Any]]
    into: dict[str, Callable[..., Any]] = field(default_factory=dict)
    buffers: dict[str, Callable[[int], torch.Tensor]] = field(default_factory=dict)  # value -> empty(tokens)
    mergers: dict[str, Callable[[Sequence[torch.Tensor]], torch.Tensor]] = field(default_factory=dict)  # else: cat
    constants: tuple[Any, ...] = ()  # values of the last program inputs: tensors held by the graph
    rebuild: Callable[[list[Any]], Any] = tuple
    pieces: dict[str, fx.GraphModule] = field(default_factory=dict)  # operator -> its graph, where known
    nodes: dict[str, str] = field(default_factory=dict)  # value -> the node of the captured graph that it is
    one_stream: frozenset[str] = frozenset()  # operators that share a stream within a micro-batch: they run one frame
    static_context: bool = False  # the integration's promise: context keeps its addresses and host values over steps

    def token_counter(self) -> Callable[[Sequence[Any]], int]:
        """A function arguments -> number of tokens. Raises `PartitionError` if no input has a token axis."""
        for i, v in enumerate(self.program.inputs):
            value = self.program.values[v]
            if value.axis is not None:
                return lambda args: int(args[i].shape[value.axis]) // value.rows
        raise PartitionError("no input of this graph has the batch dimension")
