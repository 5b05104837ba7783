"""Random Programs that compute: values with a token axis, sums and means over the tokens, views and writes in place.

Each comes with its functions, so that a plan of it can be run and compared with the operators run by hand on the whole
batch. The values are whole numbers in float64: sums are exact in any order of additions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.program import Operator, Program, Resource, Scope, Value

WIDTH = 3


class RandomSums:
    """Builds one Program; `capture` is the result."""

    def __init__(self, rng: random.Random, size: int) -> None:
        self.rng = rng
        self.values = {"x": Value("x", Scope.BATCH, 0), "w": Value("w", Scope.SHARED)}
        self.operators: list[Operator] = []
        self.functions: dict[str, Callable[..., Any]] = {}
        kinds = (self.batch, self.over_tokens, self.both, self.linear, self.view, self.write)
        while len(self.operators) < size:
            self.rng.choices(kinds, (2, 3, 1, 3, 1, 1))[0]()
        made = [v for v in self.values if v not in ("x", "w")]
        outputs = self.rng.sample(made, min(len(made), 3))
        program = Program(("x", "w"), tuple(outputs), self.values, tuple(self.operators))
        constants = (torch.tensor([2.0, -1.0, 3.0], dtype=torch.float64),)
        self.capture = CapturedProgram(program, self.functions, constants=constants)

    def add(self, inputs: list[str], outputs: list[Value], function: Callable[..., Any], **fields: Any) -> None:
        name = f"op{len(self.operators)}"
        self.values |= {v.name: v for v in outputs}
        resource = self.rng.choice(list(Resource))
        self.operators.append(Operator(name, resource, tuple(inputs), tuple(v.name for v in outputs), **fields))
        self.functions[name] = function

    def name(self) -> str:
        return f"v{len(self.values)}"

    def pick(self, scope: Scope, mean: bool = False) -> str:
        return self.rng.choice([v.name for v in self.values.values() if v.scope is scope and v.mean is mean] or [""])

    def batch(self) -> None:
        a, b = self.pick(Scope.BATCH), self.pick(Scope.BATCH)
        self.add([a, b], [Value(self.name(), Scope.BATCH, 0)], lambda a, b: a * 2 - b)

    def over_tokens(self) -> None:
        mean = self.rng.random() < 0.4
        over = (lambda x: x.mean(0)) if mean else (lambda x: x.sum(0))
        self.add([self.pick(Scope.BATCH)], [Value(self.name(), Scope.PARTIAL, mean=mean)], over)

    def both(self) -> None:
        """One operator with a sum of its own, and one that it is linear in."""
        if (given := self.pick(Scope.PARTIAL)) and self.rng.random() < 0.7:
            outputs = [Value(self.name(), Scope.BATCH, 0), Value(self.name() + "s", Scope.PARTIAL)]
            self.add([self.pick(Scope.BATCH), given], outputs, lambda x, s: (x + 1, s * 2 + x.sum(0)))

    def linear(self) -> None:
        mean = self.rng.random() < 0.4
        if (a := self.pick(Scope.PARTIAL, mean)) and (b := self.pick(Scope.PARTIAL, mean)):
            result = Value(self.name(), Scope.PARTIAL, mean=mean)
            self.add([a, b, "w"], [result], lambda a, b, w: a * w - b)

    def view(self) -> None:
        mean = self.rng.random() < 0.4
        if given := self.pick(Scope.PARTIAL, mean):
            result = Value(self.name(), Scope.PARTIAL, storage=self.values[given].storage, mean=mean)
            self.add([given], [result], lambda a: a.view(WIDTH))

    def write(self) -> None:
        if given := self.pick(Scope.PARTIAL, self.rng.random() < 0.4):
            self.add([given], [], torch.Tensor.neg_, writes=(self.values[given].storage,))


def by_hand(capture: CapturedProgram, x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of the operators run in order on the whole batch: no plan, no executor."""
    values: dict[str, Any] = dict(zip(capture.program.inputs, (x.clone(), *capture.constants), strict=True))
    for op in capture.program.operators:
        result = capture.functions[op.name](*(values[v] for v in op.inputs))
        values.update(zip(op.outputs, result if len(op.outputs) > 1 else [result], strict=bool(op.outputs)))
    return [values[v] for v in capture.program.outputs]
