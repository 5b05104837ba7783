"""The executor interface.

Contract
- `bind` turns a verified Plan into one callable; all the plan's structure is spent there, so that a run
  is straight-line Python (`codegen`).
- A bound plan is called with the program's inputs in order (constants excluded), the token offsets of
  the micro-batches (first 0, last the total) and `enter`, which is called on the caller's thread before
  an operator with context when the micro-batch changes. It returns the program's outputs in order.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from dynaflow_serving.ir import Plan
from dynaflow_serving.partition.capture import Capture

BoundPlan = Callable[[Sequence[Any], Sequence[int], Callable[[int], Any]], list[Any]]


class Executor(abc.ABC):
    name: ClassVar[str]

    @abc.abstractmethod
    def bind(self, capture: Capture, plan: Plan, kernels: Mapping[str, Callable[..., Any]]) -> BoundPlan:
        """Compile `plan`; `kernels` are the replacements that it names."""

    def close(self) -> None:  # noqa: B027  most executors have nothing to stop
        """Stop what the executor has started (threads)."""
