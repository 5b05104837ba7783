"""Graph -> Program: where a graph is cut, shapes, structure and collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from partition_support import fake_graph, run_split, twice
from rounding import assert_same
from support import capture, names, trace
from torch import fx, nn

from dynaflow_serving.capture.fx import partition
from dynaflow_serving.capture.fx.symbols import batch_symbols
from dynaflow_serving.capture.mark import mark
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.program import Resource, Scope
from dynaflow_serving.errors import AnnotationError
from dynaflow_serving.strategy.rules import SplitFunc, SplitModule


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.sin(block(x))
        return x


# -- where it is cut ---------------------------------------------------------------------------------------
def test_marks_become_operators_with_their_resource_and_tags() -> None:
    c = capture(lambda x: twice(x.sin()).cos(), torch.randn(6, 4))
    marked = [o for o in c.program.operators if o.tags == ("t",)]
    assert [o.resource for o in marked] == [Resource.NETWORK]
    assert names(c) == ["compute.0", "twice", "compute.1"]


@pytest.mark.parametrize("target", [torch.sin, "sin"])
def test_split_func_at_dynamo_level(target: Any) -> None:
    c = capture(Net(), torch.randn(6, 4), rules=[SplitFunc(target, "wave", tags=("w",))])
    assert [o.name for o in c.program.operators if o.tags == ("w",)] == ["wave.0", "wave.1"]  # outside the blocks


@pytest.mark.parametrize("target", [nn.Linear, "Linear"])
def test_split_module_at_dynamo_level(target: Any) -> None:
    c = capture(Net(), torch.randn(6, 4), rules=[SplitModule(target, "gemm", tags=("g",))])
    assert len([o for o in c.program.operators if "g" in o.tags]) == 4
    c = capture(Net(), torch.randn(6, 4), rules=[SplitModule("Block", "block", tags=("b",))])
    assert [o.name for o in c.program.operators if "b" in o.tags] == ["blocks.0.block", "blocks.1.block"]


def aot(fn: Callable[..., Any], *examples: torch.Tensor, rules: Any = ()) -> tuple[CapturedProgram, fx.GraphModule]:
    """`fn` at the ATen level."""
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm

    for example in examples:
        torch._dynamo.mark_dynamic(example, 0)
    torch._dynamo.reset()
    with torch.no_grad():
        backend = aot_autograd(fw_compiler=keep, keep_inference_input_mutations=True)
        torch.compile(fn, backend=backend, fullgraph=True)(*examples)
    gm = graphs[0]
    return partition(gm, tokens=batch_symbols(gm, 0), rules=rules), gm


def test_marks_and_rules_at_aot_level() -> None:
    c, _ = aot(lambda x: twice(x.sin()).cos(), torch.randn(6, 4))
    assert [o.resource for o in c.program.operators if "t" in o.tags] == [Resource.NETWORK]
    c, _ = aot(Net(), torch.randn(6, 4), rules=[SplitFunc("aten.sin", "wave", tags=("w",))])
    assert len([o for o in c.program.operators if "w" in o.tags]) == 2
    c, _ = aot(Net(), torch.randn(6, 4), rules=[SplitModule("Block", "block", tags=("b",))])
    assert len([o for o in c.program.operators if "b" in o.tags]) == 2


def test_a_rule_that_matches_nothing_lists_what_could_have() -> None:
    with pytest.raises(
        AnnotationError, match=r"SplitFunc matches nothing: unknown target 'sine'.*'?sin'?.*Valid:.*sin"
    ):
        capture(Net(), torch.randn(6, 4), rules=[SplitFunc("sine")])
    with pytest.raises(AnnotationError, match=r"SplitModule matches nothing.*Did you mean 'Linear'"):
        capture(Net(), torch.randn(6, 4), rules=[SplitModule("Linea")])
    capture(Net(), torch.randn(6, 4), rules=[SplitFunc("sine", required=False)])


def test_wrong_marks() -> None:
    with pytest.raises(AnnotationError, match=r"unknown resource 'netwrk'. Did you mean 'network'"):
        mark("a", "netwrk")
    with pytest.raises(AnnotationError, match="one word"):
        mark("a b")


def test_independent_branches_are_operators_of_their_own() -> None:
    w = torch.randn(4, 4)

    def model(x: torch.Tensor) -> torch.Tensor:
        h = x.sin()
        routed = twice(h @ w)
        shared = (h @ w).relu() @ w
        return routed + shared

    c = capture(model, torch.randn(6, 4))
    (network,) = (o for o in c.program.operators if o.resource is Resource.NETWORK)
    after = [o for o in c.program.operators if o is not network and not set(o.inputs) & set(network.outputs)]
    assert len(after) >= 2, c.program.to_text()  # what feeds the network operator, and the shared branch


# -- shapes and structure ----------------------------------------------------------------------------------
def test_several_symbolic_sizes() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return twice(x) + y.sum(0), x.sin()

    gm = trace(model, torch.randn(6, 4), torch.randn(5, 4))
    fakes = {n.name: n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"}
    x_name, y_name = (n for n, fake in fakes.items() if isinstance(fake, torch.Tensor))
    c = partition(gm, tokens={fakes[x_name].shape[0].node.expr})
    assert not c.program.unsplittable
    assert c.program.values["x"].scope is Scope.BATCH
    assert c.program.values["y"].scope is Scope.SHARED
    x, y = torch.randn(6, 4), torch.randn(5, 4)
    rows = {n: 5 for n, fake in fakes.items() if str(fake) == str(fakes[y_name].shape[0])}
    out = run_split(c, {"x": x, "y": y, **rows}, 6)
    for got, want in zip(out, model(x, y), strict=True):
        assert_same(got, want)


def test_the_token_axis_need_not_be_the_first() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = twice(x.sin())
        return y.transpose(0, 1), y

    gm = trace(model, torch.randn(4, 6), dim=1)
    c = partition(gm, tokens=batch_symbols(gm, 1))
    axes = [c.program.values[v].axis for v in c.program.outputs]
    assert sorted(a for a in axes if a is not None) == [0, 1]
    x = torch.randn(4, 6)
    (name,) = (v for v in c.program.inputs if c.program.values[v].axis == 1)
    out = run_split(c, {name: x}, 6)
    for got, want in zip(out, model(x), strict=True):
        assert_same(got, want)


def test_nested_outputs_and_constants() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> Any:
        y = graph.call_function(torch.sin, (x,))
        z = graph.call_function(torch.mul, (y, graph.get_attr("weight")))
        return {"a": (y, [z, y]), "b": None, "c": 3, "x": x}

    gm, tokens = fake_graph(build)
    c = partition(gm, tokens=tokens)
    x = torch.randn(6, 4)
    out = run_split(c, {"x": x}, 6)
    assert out["b"] is None and out["c"] == 3 and out["a"][1][1] is out["a"][0]
    assert_same(out["a"][0], x.sin())
    assert_same(out["a"][1][0], x.sin())
    assert torch.equal(out["x"], x)
    assert len(c.constants) == 1


def test_graphs_of_one_operator_and_of_none() -> None:
    gm, tokens = fake_graph(lambda graph, x: graph.call_function(torch.sin, (x,)))
    x = torch.randn(6, 4)
    assert_same(run_split(partition(gm, tokens=tokens), {"x": x}, 6), x.sin())
    gm, tokens = fake_graph(lambda graph, x: (x,))
    assert torch.equal(run_split(partition(gm, tokens=tokens), {"x": x}, 6)[0], x)


@pytest.fixture
def world():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_functional_all_reduce_and_its_wait_are_one_network_operator(world: None) -> None:
    import torch.distributed._functional_collectives as collectives

    def model(x: torch.Tensor) -> torch.Tensor:
        return collectives.all_reduce(x.sin(), "sum", torch.distributed.group.WORLD).cos()

    c, _ = aot(model, torch.randn(6, 4))
    network = [o for o in c.program.operators if o.resource is Resource.NETWORK]
    assert [o.name for o in network] == ["all_reduce"]
    assert network[0].group == "default"
    called = {str(n.target) for n in c.pieces["all_reduce"].graph.nodes if n.op == "call_function"}
    assert called == {"_c10d_functional.all_reduce.default", "_c10d_functional.wait_tensor.default"}
    assert not c.program.unsplittable
    (x_name,) = (v for v in c.program.inputs if c.program.values[v].scope is Scope.BATCH)
    x = torch.randn(6, 4)
    with torch.no_grad():
        out = run_split(c, {x_name: x}, 6)
    assert_same(out[0], x.sin().cos())
