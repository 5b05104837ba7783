"""Plan -> straight-line Python: one local variable per instance, one line per action.

Contract
- The text is plain Python that a person can read: `BoundPlan.source`.
- Only RECORD, WAIT, the switch of streams and FREE differ between executors: they override `Emitter`.
- Of our own nothing is left at run time but the calls: no look-ups, no hand-off per operator. Only a plan that is
  bound with a tracer takes the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.order import external_ports
from dynaflow_serving.core.plan import Action, ActionKind, Instance, Plan
from dynaflow_serving.core.program import Scope
from dynaflow_serving.executor.base import BoundPlan
from dynaflow_serving.executor.tracing import Tracer
from dynaflow_serving.kernels import Composed


class Emitter:
    """Writes the body of a plan in issue order, as one function."""

    def __init__(self, capture: CapturedProgram, plan: Plan, kernels: Mapping[str, Callable[..., Any]]) -> None:
        self.captured, self.program, self.plan = capture, capture.program, plan
        self.names: dict[str, Any] = {"cat": torch.cat}  # globals of the generated function
        self.tracer: Tracer | None = None
        self.variables: dict[Instance, str] = {}
        self.buffer_of: dict[tuple[str, int], Instance] = {}  # value @ micro-batch -> merge buffer
        self.in_place: set[Instance] = set()  # parts that their operator wrote into the buffer
        self.entered = -1
        n_constants = len(capture.constants)
        self.arguments = {v: f"a{i}" for i, v in enumerate(self.program.inputs)}
        taken = len(self.program.inputs) - n_constants
        for value, constant in zip(self.program.inputs[taken:], capture.constants, strict=True):
            self.names[self.arguments[value]] = constant
        self.taken = [self.arguments[v] for v in self.program.inputs[:taken]]
        for i, op in enumerate(self.program.operators):
            self.names[f"f{i}"] = capture.functions[op.name]
            self.names[f"g{i}"] = capture.into.get(op.name)
        self.index = {op.name: i for i, op in enumerate(self.program.operators)}
        self.names |= {f"k_{i}": k for i, k in enumerate(kernels.values())}
        self.kernel_names = {name: f"k_{i}" for i, name in enumerate(kernels)}
        self.kernels = kernels
        self.makers = {v: f"b{i}" for i, v in enumerate(capture.buffers)}
        self.names |= {self.makers[v]: maker for v, maker in capture.buffers.items()}
        self.mergers = {v: f"m{i}" for i, v in enumerate(capture.mergers)}
        self.names |= {self.mergers[v]: merge for v, merge in capture.mergers.items()}
        for v in self.program.inputs:
            if self.program.values[v].scope in (Scope.BATCH, Scope.LOCAL):
                self.variables[Instance(v, 0, plan.micro_batches)] = self.arguments[v]

    # -- what executors override ---------------------------------------------------------------------
    def record(self, action: Action) -> list[str]:
        return []

    def wait(self, action: Action) -> list[str]:
        return []

    def free(self, action: Action) -> list[str]:
        return [" = ".join(self.variables[i] for i in action.instances) + " = None"]

    def before(self, action: Action) -> list[str]:
        """Lines before any action (a switch of streams)."""
        return []

    def stream(self, action: Action) -> str:
        """The action's stream as a tracer takes it."""
        return "None"

    def body(self) -> list[str]:
        return [
            line
            for i, action in enumerate(self.plan.actions)
            for line in (*self.before(action), *self.traced(i, action))
        ]

    # -- shared --------------------------------------------------------------------------------------
    def build(self, tracer: Tracer | None = None) -> BoundPlan:
        """The bound plan. With a `tracer` each run tells it the time of every action that does work."""
        self.tracer = tracer
        if tracer is not None:
            self.names |= {"stamp": tracer.stamp, "mark": tracer.mark}
        lines = self.body()
        head = [f"({', '.join(self.taken)},) = args"] if self.taken else []
        head += [f"({', '.join(f'c{i}' for i in range(self.plan.micro_batches + 1))},) = bounds"]
        text = "\n".join(["def run(args, bounds, enter):", *(f"    {line}" for line in (*head, *lines, self.result()))])
        exec(compile(text, f"<plan {self.plan.strategy} {self.plan.digest}>", "exec"), self.names)
        return BoundPlan(self.plan, self.names["run"], text, tracer)

    def result(self) -> str:
        return f"return [{', '.join(self._output(v) for v in self.program.outputs)}]"

    def _output(self, value: str) -> str:
        n = self.plan.micro_batches
        if self.program.values[value].scope in (Scope.BATCH, Scope.LOCAL):
            return self.variable(Instance(value, 0, n))
        first = [var for i, var in self.variables.items() if i.value == value and i.start == 0]
        return first[0] if first else self.read(value, 0, n)

    def variable(self, instance: Instance) -> str:
        return self.variables.setdefault(instance, f"v{len(self.variables)}")

    def read(self, value: str, start: int, stop: int) -> str:
        scope = self.program.values[value].scope
        if scope is Scope.TOKENS and not (value in self.arguments and (start, stop) == (0, self.plan.micro_batches)):
            return self._rows(self.program.values[value].rows, start, stop)
        if scope in (Scope.TOKENS, Scope.SHARED) and value in self.arguments:
            return self.arguments[value]
        return self.variable(Instance(value, start, stop))

    def traced(self, index: int, action: Action) -> list[str]:
        """The lines of an action, with the time taken around those that do work."""
        lines = self.action(action)
        if (
            self.tracer is None
            or not lines
            or action.kind not in (ActionKind.RUN, ActionKind.REPLACE, ActionKind.MERGE)
        ):
            return lines
        stamp = f"stamp({self.stream(action)})"
        return [f"begun = {stamp}", *lines, f"mark({index}, begun, {stamp})"]

    def action(self, action: Action) -> list[str]:
        match action.kind:
            case ActionKind.RUN | ActionKind.REPLACE:
                return self._call(action)
            case ActionKind.SPLIT:
                whole, view = action.instances
                return [f"{self.variable(view)} = {self._narrow(whole, view)}"]
            case ActionKind.ALLOC:
                return [self._alloc(whole) for whole in action.instances]
            case ActionKind.MERGE:
                return self._merge(action.instances[0], action.instances[1:])
            case ActionKind.RECORD:
                return self.record(action)
            case ActionKind.WAIT:
                return self.wait(action)
        return self.free(action)

    def _alloc(self, whole: Instance) -> str:
        self.buffer_of.update({(whole.value, mb): whole for mb in range(whole.start, whole.stop)})
        return f"{self.variable(whole)} = {self.makers[whole.value]}({self._tokens(whole.start, whole.stop)})"

    def _call(self, action: Action) -> list[str]:
        inputs, outputs = external_ports(self.program, action.operators)
        arguments = [self.read(v, action.start, action.stop) for v in inputs]
        op = self.program.by_name[action.operators[0]]
        lines = []
        if any(self.program.by_name[n].context for n in action.operators) and self.entered != action.start:
            self.entered = action.start
            lines.append(f"enter({action.start})")
        if action.kind is ActionKind.REPLACE:
            function = self._kernel(action)
        elif action.into:
            function = f"g{self.index[op.name]}"
            for v in op.into:
                part = Instance(v, action.start, action.stop)
                arguments.append(
                    self._narrow(self.buffer_of[v, action.start], part)
                    if v in action.into
                    else f"{self.makers[v]}({self._tokens(action.start, action.stop)})"
                )
            self.in_place |= {Instance(v, action.start, action.stop) for v in action.into}
        else:
            function = f"f{self.index[op.name]}"
        targets = [
            "_"
            if self.program.values[v].scope is Scope.TOKENS
            else self.variable(Instance(v, action.start, action.stop))
            for v in outputs
        ]
        assign = f"{', '.join(targets)} = " if targets else ""
        return [*lines, f"{assign}{function}({', '.join(arguments)})"]

    def _kernel(self, action: Action) -> str:
        name, kernel = self.kernel_names[action.kernel], self.kernels[action.kernel]
        if isinstance(kernel, Composed):
            name = f"{name}_{self.index[action.operators[0]]}_{action.start}"
            self.names[name] = kernel(self.captured, self.plan, action)
        return name

    def _merge(self, whole: Instance, parts: tuple[Instance, ...]) -> list[str]:
        if self.buffer_of.get((whole.value, whole.start)) != whole:
            axis = self.program.values[whole.value].axis
            listed = ", ".join(map(self.variable, parts))
            if whole.value in self.mergers:
                return [f"{self.variable(whole)} = {self.mergers[whole.value]}(({listed},))"]
            return [f"{self.variable(whole)} = cat(({listed},), {axis})"]
        copied = [p for p in parts if p not in self.in_place]
        return [f"{self._narrow(whole, p)}.copy_({self.variable(p)})" for p in copied]

    def _narrow(self, whole: Instance, part: Instance) -> str:
        value = self.program.values[part.value]
        if part == whole:
            return self.variable(whole)
        offset = self._rows(value.rows, whole.start, part.start) if part.start > whole.start else "0"
        length = self._rows(value.rows, part.start, part.stop)
        return f"{self.variable(whole)}.narrow({value.axis}, {offset}, {length})"

    @classmethod
    def _rows(cls, per_token: int, start: int, stop: int) -> str:
        tokens = cls._tokens(start, stop)
        return tokens if per_token == 1 else f"{per_token} * ({tokens})"

    @staticmethod
    def _tokens(start: int, stop: int) -> str:
        return f"c{stop} - c{start}" if start else f"c{stop}"
