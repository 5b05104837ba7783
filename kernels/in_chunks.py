"""An operator with its communication, in chunks: the collectives of one chunk run beside the compute of the others.

This is what Comet (arXiv 2502.19811) does within a layer of experts, and Flux (arXiv 2406.06858) with a matrix product
and its collective, on the level of operators instead of tiles. The batch is not split.

Contract
- The operator treats the rows of its first input's dimension `dim` independently. All inputs but weights and constants
  that are as large there are cut alike; the others are shared by the chunks.
- The operator stops within, where it communicates: only a model without a graph has such operators
  (`CapturedProgram.in_turn`). With fewer rows than chunks, it runs as it is.
- It is equal to the operator as it is, up to the matmul kernel that fewer rows take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.plan import Action, Plan
from dynaflow_serving.core.program import Scope
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels import Composed


class InChunks(Composed):
    """The kernel that runs one operator in chunks."""

    def __init__(self, chunks: int, dim: int = 0) -> None:
        """Cut `dim` of the first input into so many chunks."""
        self.__name__ = f"in_chunks[{chunks},dim={dim}]"
        self.chunks, self.dim = chunks, dim

    def __call__(self, capture: CapturedProgram, plan: Plan, action: Action) -> Callable[..., Any]:
        """Raises `ScheduleError` for several operators, and where the model has a graph."""
        if len(action.operators) > 1:
            raise ScheduleError(f"{self.__name__} runs one operator, not {' + '.join(action.operators)}")
        if capture.in_turn is None:
            raise ScheduleError(
                f"{self.__name__} cannot cut {action.operators[0]}: only a model without a graph has operators that "
                "communicate within"
            )
        operator = capture.program.by_name[action.operators[0]]
        function, run_in_turn = capture.functions[operator.name], capture.in_turn
        cut = [capture.program.values[v].scope is not Scope.SHARED for v in operator.inputs]

        def call(*inputs: Any) -> Any:
            rows = inputs[0].shape[self.dim]
            if rows < self.chunks:
                return function(*inputs)
            ranges = chunks_of(rows, self.chunks)
            parts = [tuple(self._part(x, c, rows, a, b) for x, c in zip(inputs, cut)) for a, b in ranges]
            return _together(run_in_turn(function, parts), self.dim)

        return call

    def _part(self, value: Any, cut: bool, rows: int, start: int, stop: int) -> Any:
        if cut and isinstance(value, torch.Tensor) and value.dim() > self.dim and value.shape[self.dim] == rows:
            return value.narrow(self.dim, start, stop - start)
        return value


def chunks_of(rows: int, chunks: int) -> list[tuple[int, int]]:
    """Return the first row of each chunk, and the one behind its last; with fewer rows than chunks, some are empty."""
    return list(pairwise(rows * i // chunks for i in range(chunks + 1)))


def _together(results: Sequence[Any], dim: int) -> Any:
    """Join the results of the chunks, which are tensors or tuples of them."""
    if isinstance(results[0], tuple):
        return tuple(_together(parts, dim) for parts in zip(*results))
    return torch.cat(list(results), dim) if isinstance(results[0], torch.Tensor) else results[0]
