"""What a plan calls: a function per operator, that moves a micro-batch's frame on or makes a border's call.

Contract
- Functions take the Program's input values in order and return one output bare, several as a tuple, as everywhere. A
  value that only its frame holds is None in the plan: it is there for the order and the lifetimes.
- Functions with `context` work on `Driver.frame`, which `enter` sets; those of plain borders on their inputs alone.
- A frame that calls another border than the recorded one, or with other constants, raises `Diverged`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from dynaflow_serving.capture.eager.frames import Call, Frame
from dynaflow_serving.capture.eager.program import ModelProgram, Part, same
from dynaflow_serving.capture.eager.recording import BorderCall, Seen, Stretch, tensors_of
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.errors import DynaflowError, ScheduleError

Key = int | str  # position or keyword of an argument


class Diverged(DynaflowError):
    """A micro-batch has taken another path through the model than the recorded one."""


class Driver:
    """The frames of the step in flight."""

    frame: Frame  # of the micro-batch whose operator runs


def build_capture(model: ModelProgram, driver: Driver) -> CapturedProgram:
    program = model.program
    leaves, spec = list(model.a.outputs), model.a.spec
    position = {v: i for i, v in enumerate(program.outputs)}
    slots = [position[model.value_of[model.given(s)]] if isinstance(s, Seen) else None for s in leaves]

    def rebuild(values: Sequence[Any]) -> Any:
        merged = [leaf if i is None else values[i] for i, leaf in zip(slots, leaves)]
        return pytree.tree_unflatten(merged, spec)

    functions: dict[str, Callable[..., Any]] = {}
    for part, operator in zip(model.parts, program.operators):
        event = model.a.events[part.event]
        if isinstance(event, Stretch):
            functions[part.name] = _stretch(model, driver, part, len(operator.outputs))
        elif part.plain:
            functions[part.name] = _plain_border(model, part, event)
        else:
            functions[part.name] = _border(model, driver, part, event, len(operator.outputs))
    stretches = frozenset(p.name for p in model.parts if isinstance(model.a.events[p.event], Stretch))
    constants = tuple(model.constants.values())
    return CapturedProgram(program, functions, constants=constants, rebuild=rebuild, one_stream=stretches)


def _stretch(model: ModelProgram, driver: Driver, part: Part, outputs: int) -> Callable[..., Any]:
    follow = _Follow(model, part, outputs)
    if part.event == 0:
        places = list(model.inputs)

        def start(*inputs: Any) -> Any:
            frame = driver.frame
            for leaf, value in zip(places, inputs):
                frame.leaves[leaf] = value
            args, kwargs = pytree.tree_unflatten(frame.leaves, frame.spec)
            return _bare(follow(frame, frame.start(args, kwargs)))

        return start
    event = model.border(part.event - 1)
    results = _results_from(model, event, part)

    def go_on(*inputs: Any) -> Any:
        frame = driver.frame
        result = frame.handed.pop() if frame.handed else results(inputs, frame.tokens)
        return _bare(follow(frame, frame.advance(result)))

    return go_on


def _border(model: ModelProgram, driver: Driver, part: Part, event: BorderCall, outputs: int) -> Callable[..., Any]:
    follow = _Follow(model, part, outputs) if part.moves else None
    position = {s: i for i, s in enumerate(part.inputs)}
    # Arguments that the frame could only be given stand-ins for.
    late = [
        (k, position[s]) for k, s in event.arguments.items() if isinstance(s, Seen) and s.producer == part.event - 2
    ]
    taken = [event.results.index(s) for s in part.outputs if s in event.results]
    extra = outputs - len(taken)

    def call(*inputs: Any) -> Any:
        frame = driver.frame
        assert frame.pending is not None
        border, args, kwargs = frame.pending
        for key, i in late:
            if isinstance(key, int):
                args = (*args[:key], inputs[i], *args[key + 1 :])
            else:
                kwargs = {**kwargs, key: inputs[i]}
        result = frame.call(border.function, *args, **kwargs)
        listed = (result,) if event.shape == "tensor" else result
        found = [listed[i] for i in taken]
        if follow is None:
            frame.handed = [result]
            return _bare([*found, *[None] * extra])
        return _bare([*found, *follow(frame, frame.advance(result))])

    return call


def _plain_border(model: ModelProgram, part: Part, event: BorderCall) -> Callable[..., Any]:
    function = event.border.function
    position = {s: i for i, s in enumerate(part.inputs)}
    listed = [(k, position.get(model.given(v)) if isinstance(v, Seen) else None, v) for k, v in event.arguments.items()]
    taken = [event.results.index(s) for s in part.outputs]

    def call(*inputs: Any) -> Any:
        args = [v if i is None else inputs[i] for k, i, v in listed if isinstance(k, int)]
        kwargs = {k: v if i is None else inputs[i] for k, i, v in listed if isinstance(k, str)}
        result = function(*args, **kwargs)
        return result if event.shape == "tensor" else _bare([result[i] for i in taken])

    return call


def _results_from(model: ModelProgram, event: BorderCall, part: Part) -> Callable[[Sequence[Any], int], Any]:
    """What the border has returned, put together again from the inputs of the operator after it."""
    position = {s: i for i, s in enumerate(part.inputs)}
    stand_in = _StandIns(model, event)

    def results(inputs: Sequence[Any], tokens: int) -> Any:
        if event.shape == "object":
            raise ScheduleError(f"{event.border.name} cannot be replaced by a kernel: it returns an object")
        made = [
            r if not isinstance(r, Seen) else inputs[position[r]] if r in position else stand_in.tensor(r, tokens)
            for r in event.results
        ]
        return event.returned(made)

    return results


class _StandIns:
    """Tensors without memory, of the size that a border's results will have."""

    def __init__(self, model: ModelProgram, event: BorderCall) -> None:
        self.event = event
        self.axes = {r: model.axis(r) for r in tensors_of(event.results)}

    def tensor(self, r: Seen, tokens: int) -> torch.Tensor:
        shape = list(r.shape)
        if found := self.axes[r]:
            shape[found[0]] = tokens * found[1]
        return torch.empty(shape, dtype=r.dtype, device="meta")

    def __call__(self, tokens: int) -> tuple[Any, list[Any]]:
        """What to return to the frame, and its tensors in the order of the event's results."""
        made = [self.tensor(r, tokens) if isinstance(r, Seen) else r for r in self.event.results]
        return self.event.returned(made), made


class _Stop:
    """A border that a frame must come to, and what its call must look like."""

    def __init__(self, model: ModelProgram, i: int, previous: int | None) -> None:
        self.event = model.border(i)
        self.name = self.event.border.name
        keys = list(self.event.arguments)
        self.positions = sum(isinstance(k, int) for k in keys)
        self.keywords = {k for k in keys if isinstance(k, str)}
        constants = [(k, v) for k, v in self.event.arguments.items() if not isinstance(v, Seen)]
        self.constants = constants if model.plain[i] else []  # another border's may be made in each step
        self.tensors = [k for k, v in self.event.arguments.items() if isinstance(v, Seen)]
        results = model.border(previous).results if previous is not None else []
        self.late = [
            (k, results.index(v)) for k, v in self.event.arguments.items() if isinstance(v, Seen) and v in results
        ]
        self.stand_ins = _StandIns(model, self.event)

    def check(self, call: Call | None, made: list[Any]) -> Call:
        name = self.name
        if call is None:
            raise Diverged(f"the model ended where it called {name} when it was recorded")
        if call.border is not self.event.border:
            raise Diverged(f"the model called {call.border.name} where it called {name} when it was recorded")
        if len(call.args) != self.positions or call.kwargs.keys() != self.keywords:
            raise Diverged(f"the model called {name} with other arguments than when it was recorded")
        for key, value in self.constants:
            if not same(argument(call, key), value):
                raise Diverged(f"the model called {name} with {key}={argument(call, key)!r}, recorded was {value!r}")
        for key in self.tensors:
            if not isinstance(argument(call, key), torch.Tensor):
                raise Diverged(f"the model called {name} without the tensor {key} that it had when it was recorded")
        for key, i in self.late:
            if argument(call, key) is not made[i]:
                raise Diverged(f"the model changed what it passes to {name} since it was recorded")
        return call


class _Follow:
    """Leads a frame past the stops of one operator, and picks the operator's outputs."""

    def __init__(self, model: ModelProgram, part: Part, outputs: int) -> None:
        self.stops = [_Stop(model, i, part.stops[n - 1] if n else None) for n, i in enumerate(part.stops)]
        self.spec = model.a.spec
        event = model.a.events[part.event]
        own = [s for s in part.outputs if not (isinstance(event, BorderCall) and s in event.results)]
        self.picks: list[tuple[int, Any] | None] = [self._place(model, part, s) for s in own]
        self.picks += [None] * (outputs - len(part.outputs))  # frame.N

    def _place(self, model: ModelProgram, part: Part, s: Seen) -> tuple[int, Any] | None:
        """(stop, argument) or (-1, leaf of the result) where the tensor shows; None if it stays in the frame."""
        for n, i in enumerate(part.stops):
            for key, v in model.border(i).arguments.items():
                if isinstance(v, Seen) and s in (v, model.given(v)):
                    return n, key
        if not part.stops:
            for leaf, v in enumerate(model.a.outputs):
                if isinstance(v, Seen) and s in (v, model.given(v)):
                    return -1, leaf
        return None

    def __call__(self, frame: Frame, call: Call | None) -> list[Any]:
        calls: list[Call] = []
        made: list[Any] = []
        for n, stop in enumerate(self.stops):
            if n:
                returned, made = self.stops[n - 1].stand_ins(frame.tokens)
                call = frame.advance(returned)
            calls.append(stop.check(call, made))
        leaves: list[Any] = []
        if not self.stops:
            if call is not None:
                raise Diverged(f"the model called {call.border.name} where it ended when it was recorded")
            leaves, spec = pytree.tree_flatten(frame.result)
            if spec != self.spec:
                raise Diverged("the model returned another structure than when it was recorded")
        return [
            None if p is None else leaves[p[1]] if p[0] < 0 else argument(calls[p[0]], p[1]) for p in self.picks
        ]  # fmt: skip


def argument(call: Call, key: Key) -> Any:
    return call.args[key] if isinstance(key, int) else call.kwargs[key]


def _bare(outputs: list[Any]) -> Any:
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
