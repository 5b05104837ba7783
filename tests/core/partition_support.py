"""What the tests of graph -> Program share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import arguments
from torch import fx, nn

from dynaflow_serving.capture.mark import mark
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.program import Resource
from dynaflow_serving.executor.sequential import SequentialExecutor
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.session.plan_cache import no_context
from dynaflow_serving.strategies import get_strategy


def run_split(c: CapturedProgram, inputs: dict[str, torch.Tensor], total: int, cuts: tuple[int, ...] = (3,)) -> Any:
    """The outputs under NanoFlow's order, on the sequential executor."""
    plan = lower(get_strategy("nanoflow")().record(c.program, len(cuts) + 1), "nanoflow")
    verify(c.program, plan)
    taken = c.program.inputs[: len(c.program.inputs) - len(c.constants)]
    values = arguments(taken, inputs, total)
    return c.rebuild(SequentialExecutor().bind(c, plan, {})(values, [0, *cuts, total], no_context))


@mark("twice", Resource.NETWORK, ["t"])
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def fake_graph(build: Callable[[fx.Graph, fx.Node], Any]) -> tuple[fx.GraphModule, set[Any]]:
    """A plain FX graph of one input [tokens, 4] whose nodes have fake values."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    graph = fx.Graph()
    x = graph.placeholder("x")
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x.meta["val"] = mode.from_tensor(torch.empty(6, 4), symbolic_context=sizes)
    graph.output(build(graph, x))
    root = nn.Module()
    root.register_buffer("weight", torch.ones(4))
    with mode:
        for node in graph.nodes:
            if node.op == "call_function":
                node.meta["val"] = node.target(*fx.node.map_arg(node.args, lambda n: n.meta["val"]))
            elif node.op == "get_attr":
                node.meta["val"] = mode.from_tensor(root.weight)
    return fx.GraphModule(root, graph), {x.meta["val"].shape[0].node.expr}
