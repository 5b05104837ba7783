"""A Program with everything needed to run it. Both front-ends make one.

Contract
- An operator's function takes the operator's input values in order, and returns one output bare, several as a tuple.
- An `into` variant takes, after the inputs, one buffer for each of `Operator.into`.
- `CapturedProgram.rebuild` rebuilds the model's nested result from the Program's outputs.
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
    """A Program, the functions of its operators, and what a plan needs to cut, merge and return values.

    Attributes:
        program: the Program.
        functions: operator -> its function.
        into: operator -> its variant that writes into given buffers.
        buffers: value -> a function tokens -> the empty buffer that it is merged into.
        mergers: BATCH value -> a function parts -> the merged value; any other one is concatenated.
        constants: values of the Program's last inputs, tensors that the graph or the model holds.
        rebuild: a function outputs of the Program -> the model's result.
        pieces: operator -> its FX graph, where there is one.
        nodes: value -> the name of its node in the captured graph.
        one_stream: operators that share a stream within a micro-batch, because they run one frame.
        mirrored: whether autograd runs a split step's plan backwards (`planning.mirror`).
        in_turn: what runs parts of an operator that communicates within; None where there is a graph.
        static_context: whether the integration promises that context keeps its addresses and host values over steps.
        one_row: whether the graph is of batches of one row. It has no token axis, and runs in un-split steps only.
    """

    program: Program
    functions: dict[str, Callable[..., Any]]
    into: dict[str, Callable[..., Any]] = field(default_factory=dict)
    buffers: dict[str, Callable[[int], torch.Tensor]] = field(default_factory=dict)
    mergers: dict[str, Callable[[Sequence[torch.Tensor]], torch.Tensor]] = field(default_factory=dict)
    constants: tuple[Any, ...] = ()
    rebuild: Callable[[list[Any]], Any] = tuple
    pieces: dict[str, fx.GraphModule] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    one_stream: frozenset[str] = frozenset()
    mirrored: bool = False
    in_turn: Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], list[Any]] | None = None
    static_context: bool = False
    one_row: bool = False

    def token_counter(self) -> Callable[[Sequence[Any]], int]:
        """Return a function arguments -> number of tokens. Raises `PartitionError` if no input has a token axis."""
        if self.one_row:
            return lambda args: 1
        for i, v in enumerate(self.program.inputs):
            value = self.program.values[v]
            if value.axis is not None:
                return lambda args: int(args[i].shape[value.axis]) // value.rows
        raise PartitionError("no input of this graph has the batch dimension")
