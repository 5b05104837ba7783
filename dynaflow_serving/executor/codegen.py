"""Plan -> straight-line Python: one local variable per instance, one line per action.

Contract
- The text is plain Python that a person can read: `BoundPlan.source`.
- Only RECORD, WAIT, the switch of streams and FREE differ between executors: they override `Emitter`.
- At run time nothing of ours is left but the calls: no look-ups, no hand-off per operator. Only a plan that is
  bound with a tracer takes the time.

Two operators, two micro-batches and two streams give this function for the cpu executor, where w0 is the thread of
the second stream:

    def run(args, bounds, enter):
        (a0,) = args
        c0, c1, c2 = bounds
        e0 = closed_event()
        e1 = closed_event()
        e2 = closed_event()
        e3 = closed_event()
        run = PlanRun([e0, e1, e2, e3])
        wait = run.wait
        v1 = v2 = v3 = v4 = v5 = v6 = v7 = None
        def stream0():
            nonlocal v5, v6, v7
            wait(e0)
            v5 = b0(c2)  # alloc z@0:2
            wait(e1)
            v6 = g0(v2, v5.narrow(0, 0, c1))  # run all_reduce @0 into z
            wait(e2)
            v7 = g0(v4, v5.narrow(0, c1, c2 - c1))  # run all_reduce @1 into z
            e3.release()
        try:
            w0.submit(run, stream0)
            e0.release()
            v1 = a0.narrow(0, 0, c1)  # split x@0:2 -> x@0
            v2 = f0(v1)  # run project @0
            v1 = None
            e1.release()
            v3 = a0.narrow(0, c1, c2 - c1)  # split x@0:2 -> x@1
            v4 = f0(v3)  # run project @1
            v3 = None
            e2.release()
            wait(e3)
            v2 = v4 = v6 = v7 = None
        except BaseException as error:
            run.fail(error)
        run.finish()
        return [v5]

The letters: a argument or constant, b maker of a buffer, c token offset of a micro-batch, e event, f operator,
g operator that writes into a given buffer, k replacement kernel, m merger, s stream, v instance, w worker thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.order import external_ports
from dynaflow_serving.core.plan import Action, ActionKind, Instance, Plan
from dynaflow_serving.core.program import PER_MICRO_BATCH, Scope
from dynaflow_serving.executor.base import BoundPlan
from dynaflow_serving.executor.tracing import Tracer
from dynaflow_serving.kernels import Composed

TIMED = (ActionKind.RUN, ActionKind.REPLACE, ActionKind.MERGE)  # what a tracer is told of
COMMENTED = (*TIMED, ActionKind.SPLIT, ActionKind.ALLOC)  # the others are as short as their comment would be


class Emitter:
    """Writes one plan as a function, in issue order."""

    def __init__(self, captured: CapturedProgram, plan: Plan, kernels: Mapping[str, Callable[..., Any]]) -> None:
        self.captured, self.program, self.plan, self.kernels = captured, captured.program, plan, kernels
        self.globals: dict[str, Any] = {"cat": torch.cat}
        """Of the generated function."""
        self.variables: dict[Instance, str] = {}
        self.assigned: dict[str, set[str]] = defaultdict(set)
        """Stream -> the variables that its lines assign."""
        self.tracer: Tracer | None = None
        self._buffer_of: dict[tuple[str, int], Instance] = {}  # value @ micro-batch -> its merge buffer
        self._in_buffer: set[Instance] = set()  # parts that their operator wrote into the buffer
        self._entered = -1  # the micro-batch of the latest `enter`
        self.arguments = {v: f"a{i}" for i, v in enumerate(self.program.inputs)}
        self._place_inputs()
        operators = [op.name for op in self.program.operators]
        self._functions = self._add_globals("f", {name: captured.functions[name] for name in operators})
        self._into = self._add_globals("g", {name: captured.into[name] for name in operators if name in captured.into})
        self._kernels = self._add_globals("k", kernels)
        self._buffer_makers = self._add_globals("b", captured.buffers)
        self._mergers = self._add_globals("m", captured.mergers)

    def _place_inputs(self) -> None:
        """The last inputs are constants, which are globals; the others are taken from `args`."""
        taken = len(self.program.inputs) - len(self.captured.constants)
        for value, constant in zip(self.program.inputs[taken:], self.captured.constants, strict=True):
            self.globals[self.arguments[value]] = constant
        self._parameters = [self.arguments[v] for v in self.program.inputs[:taken]]
        for v in self.program.inputs:
            if self.program.values[v].scope in PER_MICRO_BATCH:
                self.variables[self._whole(v)] = self.arguments[v]

    def _add_globals(self, letter: str, objects: Mapping[str, Any]) -> dict[str, str]:
        """Make globals of `objects`, by their keys."""
        names = {key: f"{letter}{i}" for i, key in enumerate(objects)}
        self.globals |= {names[key]: value for key, value in objects.items()}
        return names

    # -- what executors override ---------------------------------------------------------------------
    def record(self, action: Action) -> list[str]:
        return []

    def wait(self, action: Action) -> list[str]:
        return []

    def free(self, action: Action) -> list[str]:
        return [" = ".join(self.assign(action, i) for i in action.instances) + " = None"]

    def before(self, action: Action) -> list[str]:
        """Lines before any action (a switch of streams)."""
        return []

    def stream(self, action: Action) -> str:
        """The action's stream as a tracer takes it."""
        return "None"

    def body(self) -> list[str]:
        lines = []
        for index, action in enumerate(self.plan.actions):
            lines += [*self.before(action), *self.timed_lines(index, action)]
        return lines

    # -- the function --------------------------------------------------------------------------------
    def bind(self, tracer: Tracer | None = None) -> BoundPlan:
        """Compile the function. With a `tracer` each run tells it the time of every action that does work."""
        self.tracer = tracer
        if tracer is not None:
            self.globals |= {"stamp": tracer.stamp, "mark": tracer.mark}
        body = self.body()
        offsets = [f"c{i}" for i in range(self.plan.micro_batches + 1)]
        head = [_unpack(self._parameters, "args")] if self._parameters else []
        head.append(_unpack(offsets, "bounds"))
        result = f"return [{', '.join(map(self._output, self.program.outputs))}]"
        source = "\n".join(["def run(args, bounds, enter):", *(f"    {line}" for line in (*head, *body, result))])
        exec(compile(source, f"<plan {self.plan.strategy} {self.plan.digest}>", "exec"), self.globals)
        return BoundPlan(self.plan, self.globals["run"], source, tracer)

    def _output(self, value: str) -> str:
        if self.program.values[value].scope in PER_MICRO_BATCH:
            return self.variable(self._whole(value))
        first = [name for i, name in self.variables.items() if i.value == value and i.start == 0]
        return first[0] if first else self._read(value, 0, self.plan.micro_batches)

    # -- one action ----------------------------------------------------------------------------------
    def timed_lines(self, index: int, action: Action) -> list[str]:
        """The lines of an action, with the time taken around those that do work."""
        lines = self._lines(action)
        if lines and action.kind in COMMENTED:
            lines[-1] += f"  # {action}"
        if self.tracer is None or not lines or action.kind not in TIMED:
            return lines
        stamp = f"stamp({self.stream(action)})"
        return [f"begun = {stamp}", *lines, f"mark({index}, begun, {stamp})"]

    def _lines(self, action: Action) -> list[str]:
        match action.kind:
            case ActionKind.RUN | ActionKind.REPLACE:
                return [*self._enter(action), self._call(action)]
            case ActionKind.SPLIT:
                whole, view = action.instances
                return [f"{self.assign(action, view)} = {self._narrow(whole, view)}"]
            case ActionKind.ALLOC:
                return [self._alloc(action, whole) for whole in action.instances]
            case ActionKind.MERGE:
                return self._merge(action, action.instances[0], action.instances[1:])
            case ActionKind.RECORD:
                return self.record(action)
            case ActionKind.WAIT:
                return self.wait(action)
        return self.free(action)

    def _enter(self, action: Action) -> list[str]:
        """Operators with context find that of their micro-batch."""
        context = any(self.program.by_name[name].context for name in action.operators)
        if not context or self._entered == action.start:
            return []
        self._entered = action.start
        return [f"enter({action.start})"]

    def _call(self, action: Action) -> str:
        inputs, outputs = external_ports(self.program, action.operators)
        arguments = [self._read(v, action.start, action.stop) for v in inputs]
        if action.kind is ActionKind.REPLACE:
            function = self._kernel(action)
        elif action.into:
            function = self._into[action.operators[0]]
            arguments += self._given_buffers(action)
        else:
            function = self._functions[action.operators[0]]
        targets = [
            "_"
            if self.program.values[v].scope is Scope.TOKENS
            else self.assign(action, Instance(v, action.start, action.stop))
            for v in outputs
        ]
        call = f"{function}({', '.join(arguments)})"
        return f"{', '.join(targets)} = {call}" if targets else call

    def _given_buffers(self, action: Action) -> list[str]:
        """What the operator writes into: its part of a merge buffer, or a buffer of its own."""
        buffers = []
        for v in self.program.by_name[action.operators[0]].into:
            if v in action.into:
                part = Instance(v, action.start, action.stop)
                self._in_buffer.add(part)
                buffers.append(self._narrow(self._buffer_of[v, action.start], part))
            else:
                buffers.append(self._make_buffer(v, action.start, action.stop))
        return buffers

    def _kernel(self, action: Action) -> str:
        name, kernel = self._kernels[action.kernel], self.kernels[action.kernel]
        if isinstance(kernel, Composed):
            name = f"{name}_{self._functions[action.operators[0]]}_{action.start}"
            self.globals[name] = kernel(self.captured, self.plan, action)
        return name

    def _alloc(self, action: Action, whole: Instance) -> str:
        self._buffer_of.update({(whole.value, mb): whole for mb in range(whole.start, whole.stop)})
        return f"{self.assign(action, whole)} = {self._make_buffer(whole.value, whole.start, whole.stop)}"

    def _make_buffer(self, value: str, start: int, stop: int) -> str:
        return f"{self._buffer_makers[value]}({_tokens(start, stop)})"

    def _merge(self, action: Action, whole: Instance, parts: tuple[Instance, ...]) -> list[str]:
        if self._buffer_of.get((whole.value, whole.start)) == whole:
            copied = [p for p in parts if p not in self._in_buffer]
            return [f"{self._narrow(whole, p)}.copy_({self.variable(p)})" for p in copied]
        listed = f"({', '.join(map(self.variable, parts))},)"
        if self.program.values[whole.value].scope is Scope.PARTIAL:  # one after the other: all runs give the same bits
            merged = " + ".join(self._share(whole, p) for p in parts)
        elif whole.value in self._mergers:
            merged = f"{self._mergers[whole.value]}({listed})"
        else:
            merged = f"cat({listed}, {self.program.values[whole.value].axis})"
        return [f"{self.assign(action, whole)} = {merged}"]

    def _share(self, whole: Instance, part: Instance) -> str:
        """What `part` adds to `whole`: itself, or a mean weighted by its share of the tokens."""
        if not self.program.values[whole.value].mean:
            return self.variable(part)
        # a weight, not a count: the sum of a whole batch may be too great for 16 bits
        return f"{self.variable(part)} * (({_tokens(part.start, part.stop)}) / ({_tokens(whole.start, whole.stop)}))"

    # -- expressions ---------------------------------------------------------------------------------
    def variable(self, instance: Instance) -> str:
        return self.variables.setdefault(instance, f"v{len(self.variables)}")

    def assign(self, action: Action, instance: Instance) -> str:
        """The variable of `instance`, which `action` assigns."""
        self.assigned[action.stream].add(self.variable(instance))
        return self.variable(instance)

    def _whole(self, value: str) -> Instance:
        return Instance(value, 0, self.plan.micro_batches)

    def _read(self, value: str, start: int, stop: int) -> str:
        """`value` as an operator of the micro-batches start to stop takes it."""
        scope = self.program.values[value].scope
        is_argument = value in self.arguments
        if scope is Scope.TOKENS and not (is_argument and (start, stop) == (0, self.plan.micro_batches)):
            return _rows(self.program.values[value].rows, start, stop)
        if scope in (Scope.TOKENS, Scope.SHARED) and is_argument:
            return self.arguments[value]
        return self.variable(Instance(value, start, stop))

    def _narrow(self, whole: Instance, part: Instance) -> str:
        """`part` as a view of `whole`."""
        value = self.program.values[part.value]
        if part == whole:
            return self.variable(whole)
        offset = _rows(value.rows, whole.start, part.start) if part.start > whole.start else "0"
        length = _rows(value.rows, part.start, part.stop)
        return f"{self.variable(whole)}.narrow({value.axis}, {offset}, {length})"


def _unpack(names: list[str], sequence: str) -> str:
    return f"{', '.join(names)} = {sequence}" if len(names) > 1 else f"({names[0]},) = {sequence}"


def _rows(per_token: int, start: int, stop: int) -> str:
    """The number of rows of the micro-batches start to stop."""
    tokens = _tokens(start, stop)
    return tokens if per_token == 1 else f"{per_token} * ({tokens})"


def _tokens(start: int, stop: int) -> str:
    """The number of tokens of the micro-batches start to stop."""
    return f"c{stop} - c{start}" if start else f"c{stop}"
