"""Random FX graphs, and random schedules of the Programs that they are captured as.

Values are small integers in float64, so all arithmetic is exact and the order of additions does not show.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from dynaflow_serving.capture.fx.matching import KEY
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.order import external_ports
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.strategy.schedule import Schedule, Task

WIDTH = 4
STREAMS = ("compute", "network", "memory")


class RandomGraph:
    """An FX graph over values of shape [tokens, 4], [tokens, 2] and their transposes, with fake values."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.graph = rng, fx.Graph()
        self.root = torch.nn.Module()
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.values: list[fx.Node] = []
        for i in range(rng.randint(1, 3)):
            self._input(f"x{i}")
        for i in range(2):
            weight = torch.tensor([[rng.choice((-1.0, 0.0, 1.0)) for _ in range(WIDTH)] for _ in range(WIDTH)])
            self.root.register_buffer(f"w{i}", weight.double())
        self.weights = [self._get_attr(f"w{i}") for i in range(2)]

    def _input(self, name: str) -> None:
        node = self.graph.placeholder(name)
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
        if self.values:  # all inputs have the same number of tokens
            with self.mode:
                node.meta["val"] = torch.empty_like(self.values[0].meta["val"])
        else:
            example = torch.empty(7, WIDTH, dtype=torch.float64)
            node.meta["val"] = self.mode.from_tensor(example, symbolic_context=context)
        self.values.append(node)

    def _get_attr(self, name: str) -> fx.Node:
        node = self.graph.get_attr(name)
        node.meta["val"] = self.mode.from_tensor(getattr(self.root, name))
        return node

    def call(self, op: str, target: Any, *args: Any) -> fx.Node:
        node = self.graph.create_node(op, target, args)
        fakes = fx.node.map_arg(args, lambda n: n.meta["val"])
        with self.mode:
            fn = target if op == "call_function" else getattr(torch.Tensor, target)
            node.meta["val"] = fn(*fakes)
        self.values.append(node)
        return node

    def shape(self, node: fx.Node) -> tuple[str, ...]:
        return tuple(str(s) for s in node.meta["val"].shape)

    def like(self, node: fx.Node) -> fx.Node:
        return self.rng.choice([v for v in self.values if self.shape(v) == self.shape(node)])

    def grow(self) -> fx.Node:
        rng, a = self.rng, self.rng.choice(self.values[-5:])
        kind = rng.choice(("unary", "binary", "binary", "matmul", "in_place", "in_place", "view", "transpose", "cat"))
        width = WIDTH if str(WIDTH) in self.shape(a) else 2
        tall = self.shape(a)[1] == str(width)
        if kind == "matmul" and tall and width == WIDTH:
            return self.call("call_function", rng.choice((torch.matmul, operator.matmul)), a, rng.choice(self.weights))
        if kind == "in_place":
            if rng.random() < 0.5:
                return self.call("call_method", "add_", a, self.like(a))
            return self.call("call_method", rng.choice(("neg_", "relu_")), a)
        if kind == "view" and tall and width == WIDTH:
            return self.call("call_method", "narrow", a, 1, rng.choice((0, 2)), 2)
        if kind == "transpose":
            return self.call("call_method", "transpose", a, 0, 1)
        if kind == "cat" and tall and width == 2:
            return self.call("call_function", torch.cat, [a, self.like(a)], 1)
        if kind == "unary":
            return self.call("call_function", rng.choice((torch.relu, torch.neg, operator.neg)), a)
        target = rng.choice((torch.add, operator.add, operator.sub, torch.maximum))
        return self.call("call_function", target, a, self.like(a))

    def build(self, size: int) -> tuple[fx.GraphModule, set[Any]]:
        start = 0
        for i in range(size):
            node = self.grow()
            if i >= start and self.rng.random() < 0.6:
                start = i + self.rng.randint(1, 3)
                label = {"name": f"op{i}", "resource": self.rng.choice(("compute", "memory", "network"))}
            if i < start:
                node.meta["custom"] = {KEY: {**label, "tags": [], "group": self.rng.choice(("", "", "world"))}}
        outputs = self.rng.sample(self.values, min(len(self.values), self.rng.randint(1, 3)))
        self.graph.output(tuple(outputs))
        gm = fx.GraphModule(self.root, self.graph)
        return gm, {self.values[0].meta["val"].shape[0].node.expr}


def fused(capture: CapturedProgram, operators: tuple[str, ...]) -> Callable[..., Any]:
    """A kernel that does what `operators` do one after the other."""
    program = capture.program
    inputs, outputs = external_ports(program, operators)

    def kernel(*args: Any) -> Any:
        values = dict(zip(inputs, args, strict=True))
        for op in (program.by_name[n] for n in operators):
            results = capture.functions[op.name](*(values[v] for v in op.inputs))
            values.update(zip(op.outputs, results if len(op.outputs) > 1 else [results], strict=bool(op.outputs)))
        results = tuple(values[v] for v in outputs)
        return results if len(results) > 1 else results[0] if results else None

    kernel.__name__ = "fused_" + "_".join(operators)
    return kernel


def random_schedule(rng: random.Random, capture: CapturedProgram, micro_batches: int, wild: bool) -> Schedule:
    """Ready operators in random order on random streams; `wild`: also merged and replaced."""
    s = Schedule(capture.program, micro_batches)
    kernels: dict[tuple[str, ...], Callable[..., Any]] = {}
    while ready := s.get_ready_ops():
        task, stream = rng.choice(ready), rng.choice(STREAMS)
        group = [task]
        while wild and rng.random() < 0.6:  # the same operator of the next micro-batches
            group += [t for t in ready if t.name == task.name and t.micro_batch == group[-1].micro_batch + 1]
        replace = None
        if wild and rng.random() < 0.3 and (after := s.successors(task)):
            follower = rng.choice(after)
            names = (task.name, follower.name)
            replace = kernels.setdefault(names, fused(capture, names))
            group += [Task(follower.operator, t.micro_batch) for t in group]
        try:
            s.execute(group, stream, replace=replace)
        except ScheduleError:  # the follower needs more, or the operator cannot be merged
            s.execute(task, stream)
    return s
