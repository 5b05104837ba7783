"""The functions that a plan calls: each advances a micro-batch's frame, or makes a border call.

Contract
- Functions take the Program's input values in order and return one output bare, several as a tuple, as everywhere. A
  value that only its frame holds is None in the plan: it stands for the order and the lifetimes.
- Functions of operators with context work on `ActiveFrame.frame`, those of plain border calls on their inputs alone.
- A frame that calls another border than the recorded one, or with other constants, raises `Diverged`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree

from dynaflow_serving.capture.eager.expected import Diverged, ExpectedCall, MetaResults
from dynaflow_serving.capture.eager.frames import NO_RESULT, Frame, PendingCall
from dynaflow_serving.capture.eager.operators import EagerOperator
from dynaflow_serving.capture.eager.program import EagerProgram
from dynaflow_serving.capture.eager.recording import BorderCall, RecordedTensor, Section
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.errors import ScheduleError


class ActiveFrame:
    """The frame of the micro-batch whose operator runs; the caller of a plan sets it."""

    frame: Frame


def capture_program(model: EagerProgram, active: ActiveFrame) -> CapturedProgram:
    """Return the Program with its functions, which work on `active`."""
    functions: dict[str, Callable[..., Any]] = {}
    sections = []
    for eager, operator in zip(model.cut.operators, model.program.operators):
        event = model.cut.recording.events[eager.event]
        if isinstance(event, Section):
            sections.append(operator.name)
            start = _start_function if eager.event == 0 else _section_function
            functions[operator.name] = start(model, active, eager, len(operator.outputs))
        elif eager.plain:
            functions[operator.name] = _plain_border_function(model, eager, event)
        elif eager.carried:
            functions[operator.name] = _carried_border_function(model, eager, event, len(operator.outputs))
        else:
            functions[operator.name] = _border_function(model, active, eager, event, len(operator.outputs))
    return CapturedProgram(
        model.program,
        functions,
        constants=tuple(model.constants.values()),
        rebuild=_rebuild_function(model),
        one_stream=frozenset(sections),
    )


def _rebuild_function(model: EagerProgram) -> Callable[[Sequence[Any]], Any]:
    leaves, spec = model.cut.recording.outputs, model.cut.recording.spec
    positions = {i: model.output_position(leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, RecordedTensor)}

    def rebuild(values: Sequence[Any]) -> Any:
        merged = list(leaves)
        for leaf, position in positions.items():
            merged[leaf] = values[position]
        return pytree.tree_unflatten(merged, spec)

    return rebuild


def _start_function(
    model: EagerProgram, active: ActiveFrame, operator: EagerOperator, outputs: int
) -> Callable[..., Any]:
    """The first section: puts the micro-batch's views into the forward's arguments, and starts the frame."""
    lead = _Lead(model, operator, outputs)
    cut_leaves = list(model.cut.pair.inputs)

    def start(*inputs: Any) -> Any:
        frame = active.frame
        for leaf, value in zip(cut_leaves, inputs):
            frame.argument_leaves[leaf] = value
        args, kwargs = pytree.tree_unflatten(frame.argument_leaves, frame.argument_spec)
        return _bare(lead(frame, frame.start(args, kwargs)))

    return start


def _section_function(
    model: EagerProgram, active: ActiveFrame, operator: EagerOperator, outputs: int
) -> Callable[..., Any]:
    """A section after a border call: advances the frame with the call's result."""
    lead = _Lead(model, operator, outputs)
    result_of_call = _result_from_inputs(model, operator)

    def go_on(*inputs: Any) -> Any:
        frame = active.frame
        result, frame.call_result = frame.call_result, NO_RESULT
        if result is NO_RESULT:  # the call was plain, merged or replaced: its results came through the plan
            result = result_of_call(inputs, frame.tokens)
        return _bare(lead(frame, frame.advance(result)))

    return go_on


def _border_function(
    model: EagerProgram, active: ActiveFrame, operator: EagerOperator, call: BorderCall, outputs: int
) -> Callable[..., Any]:
    """A border call that needs its frame: the frame's own arguments, in the frame's torch state."""
    lead = _Lead(model, operator, outputs) if operator.advances else None
    position = {t: i for i, t in enumerate(operator.inputs)}
    # The frame has meta tensors in place of the results of the border call before this one.
    awaited = {
        key: position[t]
        for key, t in call.arguments.items()
        if isinstance(t, RecordedTensor) and t.producer == operator.event - 2 and not t.is_argument
    }
    taken = [call.results.index(t) for t in operator.outputs if t in call.results]
    only_in_frame = [None] * (outputs - len(taken))

    def make_call(*inputs: Any) -> Any:
        frame = active.frame
        assert frame.pending is not None
        pending = frame.pending
        args, kwargs = _with_inputs(pending, awaited, inputs) if awaited else (pending.args, pending.kwargs)
        result = frame.call(pending.border.function, *args, **kwargs)
        results = (result,) if call.result_kind == "tensor" else result
        found = [results[i] for i in taken]
        if lead is not None:
            return _bare([*found, *lead(frame, frame.advance(result))])
        frame.call_result = result
        return _bare([*found, *only_in_frame])

    return make_call


def _with_inputs(
    call: PendingCall, awaited: dict[int | str, int], inputs: Sequence[Any]
) -> tuple[Sequence[Any], dict[str, Any]]:
    """Return the arguments of `call`, those of `awaited` taken from the operator's inputs."""
    args, kwargs = list(call.args), dict(call.kwargs)
    for key, i in awaited.items():
        if isinstance(key, int):
            args[key] = inputs[i]
        else:
            kwargs[key] = inputs[i]
    return args, kwargs


@dataclass(frozen=True, slots=True)
class _Source:
    """Where an argument of a plain border call comes from."""

    key: int | str  # its position or keyword
    position: int | None  # among the operator's inputs; None for a constant
    constant: Any


def _plain_border_function(model: EagerProgram, operator: EagerOperator, call: BorderCall) -> Callable[..., Any]:
    """A border call on the operator's inputs alone, whichever micro-batches they are of."""
    function = call.border.function
    position = {t: i for i, t in enumerate(operator.inputs)}
    sources = [
        _Source(k, position[model.cut.plan_tensor(v)], None) if isinstance(v, RecordedTensor) else _Source(k, None, v)
        for k, v in call.arguments.items()
    ]
    positional = [s for s in sources if isinstance(s.key, int)]
    by_keyword = [(s.key, s) for s in sources if isinstance(s.key, str)]
    taken = [call.results.index(t) for t in operator.outputs]

    def make_call(*inputs: Any) -> Any:
        args = [s.constant if s.position is None else inputs[s.position] for s in positional]
        kwargs = {key: s.constant if s.position is None else inputs[s.position] for key, s in by_keyword}
        result = function(*args, **kwargs)
        return result if call.result_kind == "tensor" else _bare([result[i] for i in taken])

    return make_call


def _carried_border_function(
    model: EagerProgram, operator: EagerOperator, call: BorderCall, outputs: int
) -> Callable[..., Any]:
    """A border call that is one of the operator's inputs."""
    position = operator.inputs.index(model.cut.carried_calls[operator.event])
    taken = [call.results.index(t) for t in operator.outputs]
    only_order = [None] * (outputs - len(taken))

    def make_call(*inputs: Any) -> Any:
        pending: PendingCall = inputs[position]
        result = pending.make()
        results = (result,) if call.result_kind == "tensor" else result
        return _bare([*(results[i] for i in taken), *only_order])

    return make_call


def _result_from_inputs(model: EagerProgram, operator: EagerOperator) -> Callable[[Sequence[Any], int], Any]:
    """Return a function (inputs of the section, tokens) -> the result of the border call before the section."""
    call = model.cut.recording.border_call(operator.event - 1)
    position = {t: i for i, t in enumerate(operator.inputs)}
    meta = MetaResults(model.cut, call)

    def result(inputs: Sequence[Any], tokens: int) -> Any:
        if call.result_kind == "object":
            raise ScheduleError(f"{call.border.name} cannot be replaced by a kernel: it returns an object")
        return call.returned([
            inputs[position[r]] if r in position else meta.tensor(r, tokens) if isinstance(r, RecordedTensor) else r
            for r in call.results
        ])  # fmt: skip

    return result


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a suspended frame shows a tensor."""

    call: int  # which of the calls that the frame has come to
    key: int | str | None  # which argument of it; None for the call itself

    def find(self, calls: Sequence[PendingCall]) -> Any:
        call = calls[self.call]
        return call if self.key is None else call.argument(self.key)


class _Lead:
    """Leads a frame past the border calls that an operator comes to, and picks the operator's outputs."""

    def __init__(self, model: EagerProgram, operator: EagerOperator, outputs: int) -> None:
        self.expected = [
            ExpectedCall(model.cut, event, operator.comes_to[i - 1] if i else None)
            for i, event in enumerate(operator.comes_to)
        ]
        self._spec = model.cut.recording.spec
        event = model.cut.recording.events[operator.event]
        results = event.results if isinstance(event, BorderCall) else []
        handed_over = [t for t in operator.outputs if t not in results]
        find = self._find_in_calls if self.expected else self._find_in_result
        self._places: list[Any] = [find(model, operator, t) for t in handed_over]
        self._only_order = [None] * (outputs - len(operator.outputs))  # values called frame.N

    def __call__(self, frame: Frame, call: PendingCall | None) -> list[Any]:
        """Go on from `call`, where the frame has stopped first, and return the outputs."""
        if not self.expected:
            leaves = self._leaves_of_result(frame, call)
            return [None if leaf is None else leaves[leaf] for leaf in self._places] + self._only_order
        calls = [self.expected[0].check(call, [])]
        for i in range(1, len(self.expected)):
            returned, meta_tensors = self.expected[i - 1].meta_results(frame.tokens)
            calls.append(self.expected[i].check(frame.advance(returned), meta_tensors))
        return [None if p is None else p.find(calls) for p in self._places] + self._only_order

    def _leaves_of_result(self, frame: Frame, call: PendingCall | None) -> list[Any]:
        if call is not None:
            raise Diverged(f"the model called {call.border.name} where it ended when it was recorded")
        leaves, spec = pytree.tree_flatten(frame.result)
        if spec != self._spec:
            raise Diverged("the model returned another structure than when it was recorded")
        return leaves

    @staticmethod
    def _find_in_calls(model: EagerProgram, operator: EagerOperator, tensor: RecordedTensor) -> _Place | None:
        """Return where the tensor shows as an argument; None if it stays in the frame."""
        for i, event in enumerate(operator.comes_to):
            if tensor is model.cut.carried_calls.get(event):
                return _Place(i, None)
            for key, argument in model.cut.recording.border_call(event).arguments.items():
                if isinstance(argument, RecordedTensor) and tensor in (argument, model.cut.plan_tensor(argument)):
                    return _Place(i, key)
        return None

    @staticmethod
    def _find_in_result(model: EagerProgram, operator: EagerOperator, tensor: RecordedTensor) -> int | None:
        """Return the leaf of the model's result that the tensor is; None if it stays in the frame."""
        for i, leaf in enumerate(model.cut.recording.outputs):
            if isinstance(leaf, RecordedTensor) and tensor in (leaf, model.cut.plan_tensor(leaf)):
                return i
        return None


def _bare(outputs: list[Any]) -> Any:
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
