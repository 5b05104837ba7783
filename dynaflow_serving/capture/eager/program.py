"""The Program of a recorded model: names, values and writes of its operators.

Contract
- The operators of a micro-batch are totally ordered: by dataflow, or by a value `frame.N` where that does not say so.
- A module border's parameters follow its arguments as inputs, for kernels that replace it.
- `Program.unsplittable` holds the reason why a model cannot be split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dynaflow_serving.capture.eager.operators import Cut, EagerOperator, cut_into_operators
from dynaflow_serving.capture.eager.pairing import RecordingPair, same_object
from dynaflow_serving.capture.eager.recording import BorderCall, RecordedTensor, Section, tensors_of
from dynaflow_serving.capture.names import operator_name, unique_names, value_name
from dynaflow_serving.core.order import in_one_order
from dynaflow_serving.core.program import Operator, Program, Resource, Scope, Value


@dataclass
class EagerProgram:
    """A Program, and how it relates to the recording."""

    program: Program
    cut: Cut  # its operators are in the order of the Program's
    value_of: dict[RecordedTensor, str]  # by the tensor as the plan knows it
    constants: dict[str, Any]  # values of the Program's last inputs

    def output_position(self, tensor: RecordedTensor) -> int:
        """Return the position of an output of the model among the Program's outputs."""
        return self.program.outputs.index(self.value_of[self.cut.plan_tensor(tensor)])


def make_program(pair: RecordingPair, states: Mapping[str, str]) -> EagerProgram:
    """Make the Program of a recorded model.

    Args:
        pair: the two recordings.
        states: name of a border -> the engine state that it reads and writes, one per module (attention -> "kv").
    """
    made = _ProgramMaker(cut_into_operators(pair, states)).make()
    pair.drop_tensors()
    return made


class _ProgramMaker:
    def __init__(self, cut: Cut) -> None:
        self.cut, self.pair, self.recording = cut, cut.pair, cut.recording
        self.values: dict[str, Value] = {}
        self.value_of: dict[RecordedTensor, str] = {}
        self.constants: dict[str, Any] = {}
        self.storages: dict[int, str] = {}  # number of a recorded storage -> the value that names it

    def make(self) -> EagerProgram:
        for leaf, tensor in self.pair.inputs.items():
            self._add_value(tensor, self.recording.names[leaf])
        operators = [self._operator(name, op) for name, op in zip(self._operator_names(), self.cut.operators)]
        results = tensors_of(self.recording.outputs)
        program = Program(
            inputs=(*(self.value_of[t] for t in self.pair.inputs.values()), *self.constants),
            outputs=tuple(dict.fromkeys(self.value_of[self.cut.plan_tensor(t)] for t in results)),
            values=self.values,
            operators=tuple(operators),
        )
        program = replace(program, unsplittable=self._problem(program))
        return EagerProgram(in_one_order(program, "frame"), self.cut, self.value_of, self.constants)

    def _operator_names(self) -> list[str]:
        names = []
        for operator in self.cut.operators:
            event = self.recording.events[operator.event]
            if isinstance(event, Section):
                names.append(operator_name(event.paths, ""))
            else:
                names.append(operator_name([event.path], event.border.name))
        return unique_names(names)

    def _operator(self, name: str, operator: EagerOperator) -> Operator:
        for i, tensor in enumerate(operator.outputs):
            self._add_value(tensor, value_name(name, i, len(operator.outputs)))
        event = self.recording.events[operator.event]
        inputs = tuple(self._input(t) for t in operator.inputs)
        outputs = tuple(self.value_of[t] for t in operator.outputs)
        touched = {self.values[v].storage for v in (*inputs, *outputs)}
        writes = tuple(self.storages[w] for w in event.writes if self.storages.get(w) in touched)
        if isinstance(event, Section):
            return Operator(name, Resource.COMPUTE, inputs, outputs, writes=writes, context=True)
        rule = event.border.rule
        return Operator(
            name,
            rule.resource,
            (*inputs, *self._parameters(event)),
            outputs,
            tags=rule.tags,
            writes=(*writes, *self._engine_states(event)),
            group=rule.group,
            gradient=rule.gradient,
            context=not (operator.plain or operator.carried),
        )

    def _parameters(self, call: BorderCall) -> list[str]:
        if call.border.module is None:
            return []
        return [self._constant(f"{call.border.path}.{n}", p) for n, p in call.border.module.named_parameters()]

    def _engine_states(self, call: BorderCall) -> list[str]:
        states = self.cut.states
        return [f"{states[call.border.name]}:{call.path}"] if call.border.name in states else []

    # -- values -------------------------------------------------------------------------------------
    def _add_value(self, tensor: RecordedTensor, name: str) -> None:
        name = name if name not in self.values else f"{name}.out"
        storage = self.storages.setdefault(tensor.storage, name)
        axis = self.pair.token_axis(tensor)
        if axis is None:
            self.values[name] = Value(name, Scope.LOCAL, storage=storage)
        else:
            self.values[name] = Value(name, Scope.BATCH, axis.dim, axis.rows, storage)
        self.value_of[tensor] = name

    def _input(self, tensor: RecordedTensor) -> str:
        if tensor not in self.value_of and self.pair.is_constant(tensor):
            self.value_of[tensor] = self._constant(f"constant.{len(self.constants)}", tensor.tensor)
        return self.value_of[tensor]

    def _constant(self, name: str, tensor: Any) -> str:
        """Return the value of a constant, called `name` unless it has one."""
        known = next((n for n, t in self.constants.items() if t is tensor), None)
        if known is not None:
            return known
        self.constants[name] = tensor
        self.values[name] = Value(name, Scope.SHARED)
        return name

    def _problem(self, program: Program) -> str:
        """Return why the model cannot be split; "" if it can."""
        if not self.pair.inputs:
            return "no argument of the model has a token axis"
        for leaf, tensor in self.recording.inputs.items():
            if leaf not in self.pair.inputs and tensor.shape != self.pair.counterpart(tensor).shape:
                return f"argument {self.recording.names[leaf]} depends on the number of tokens, but has no token axis"
        for output in program.outputs:
            if self.values[output].scope is not Scope.BATCH:
                return f"output {output} has no token axis"
        for one, other in zip(self.recording.outputs, self.pair.second.outputs):
            if not isinstance(one, RecordedTensor) and not same_object(one, other):
                return "the model returns an object that is made anew in each call"
        return self.recording.problem or self.pair.second.problem
