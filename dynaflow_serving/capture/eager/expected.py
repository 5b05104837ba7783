"""The border call that a frame must come to, as it was recorded, and the meta tensors that let a frame run ahead.

Contract
- `ExpectedCall.check` raises `Diverged` where a frame calls another border than the recorded one. It does so too where
  the number of arguments, a constant, or a tensor from the call before is another.
- A meta tensor has the shape and dtype of a border's result for the frame's number of tokens, and no memory.
"""

from __future__ import annotations

from typing import Any

import torch

from dynaflow_serving.capture.eager.frames import PendingCall
from dynaflow_serving.capture.eager.operators import Cut
from dynaflow_serving.capture.eager.pairing import same_object
from dynaflow_serving.capture.eager.recording import BorderCall, RecordedTensor, tensors_of
from dynaflow_serving.errors import DynaflowError


class Diverged(DynaflowError):
    """A micro-batch has taken another path through the model than the recorded one."""


class MetaResults:
    """Makes meta tensors for the results of a border call."""

    def __init__(self, cut: Cut, call: BorderCall) -> None:
        self._call = call
        self._axes = {r: cut.pair.token_axis(r) for r in tensors_of(call.results)}

    def tensor(self, result: RecordedTensor, tokens: int) -> torch.Tensor:
        shape = list(result.shape)
        if axis := self._axes[result]:
            shape[axis.dim] = tokens * axis.rows
        return torch.empty(shape, dtype=result.dtype, device="meta")

    def __call__(self, tokens: int) -> tuple[Any, list[Any]]:
        """Return what the call returns, and the same as a list in the order of its results."""
        results = [self.tensor(r, tokens) if isinstance(r, RecordedTensor) else r for r in self._call.results]
        return self._call.returned(results), results


class ExpectedCall:
    """A recorded border call, to compare a frame's call with."""

    def __init__(self, cut: Cut, event: int, before: int | None) -> None:
        """Expect the call `event`; `before` is the call whose results the frame has as meta tensors, if any."""
        call = cut.recording.border_call(event)
        results_before = [] if before is None else cut.recording.border_call(before).results
        self.meta_results = MetaResults(cut, call)
        self._border, self._name = call.border, call.border.name
        self._positions = sum(isinstance(key, int) for key in call.arguments)
        self._keywords = {key for key in call.arguments if isinstance(key, str)}
        tensors = [key for key, v in call.arguments.items() if isinstance(v, RecordedTensor)]
        self._tensor_positions = [key for key in tensors if isinstance(key, int)]
        self._tensor_keywords = [key for key in tensors if isinstance(key, str)]
        constants = {key: v for key, v in call.arguments.items() if not isinstance(v, RecordedTensor)}
        self._constants = constants if cut.is_plain(event) else {}  # any other call may have new objects each time
        self._passed_on = {  # argument -> position among the results of the call before
            key: results_before.index(v)
            for key, v in call.arguments.items()
            if isinstance(v, RecordedTensor) and v in results_before
        }

    def check(self, call: PendingCall | None, meta_tensors: list[Any]) -> PendingCall:
        """Return `call` if it is the expected one.

        Args:
            call: at which the frame has stopped; None if it has ended.
            meta_tensors: what the frame got for the results of the call before.

        Raises:
            Diverged: it is another call.
        """
        name = self._name  # this runs at every stop of every micro-batch: it makes no call that it can do without
        if call is None:
            raise Diverged(f"the model ended where it called {name} when it was recorded")
        if call.border is not self._border:
            raise Diverged(f"the model called {call.border.name} where it called {name} when it was recorded")
        args, kwargs = call.args, call.kwargs
        if len(args) != self._positions or kwargs.keys() != self._keywords:
            raise Diverged(f"the model called {name} with other arguments than when it was recorded")
        for key, recorded in self._constants.items():
            if not same_object(value := call.argument(key), recorded):
                raise Diverged(f"the model called {name} with {key}={value!r}, recorded was {recorded!r}")
        for position in self._tensor_positions:
            if not isinstance(args[position], torch.Tensor):
                raise Diverged(_no_tensor(name, position))
        for keyword in self._tensor_keywords:
            if not isinstance(kwargs[keyword], torch.Tensor):
                raise Diverged(_no_tensor(name, keyword))
        for key, i in self._passed_on.items():
            if call.argument(key) is not meta_tensors[i]:
                raise Diverged(f"the model changed what it passes to {name} since it was recorded")
        return call


def _no_tensor(name: str, key: int | str) -> str:
    return f"the model called {name} without the tensor {key} that it had when it was recorded"
