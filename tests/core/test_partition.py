"""Graph -> Program: annotations, regions, axes, effects."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import arguments, capture, names, trace
from torch import fx, nn

from dynaflow_serving.capture.fx import partition
from dynaflow_serving.capture.fx.symbols import batch_symbols
from dynaflow_serving.capture.mark import mark
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.program import Resource, Scope
from dynaflow_serving.errors import AnnotationError, PartitionError
from dynaflow_serving.executor.sequential import SequentialExecutor
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.strategy.rules import SplitFunc, SplitModule


def run_split(c: CapturedProgram, inputs: dict[str, torch.Tensor], total: int, cuts: tuple[int, ...] = (3,)) -> Any:
    """The outputs under NanoFlow's order, on the sequential executor."""
    plan = lower(get_strategy("nanoflow")().record(c.program, len(cuts) + 1), "nanoflow")
    verify(c.program, plan)
    taken = c.program.inputs[: len(c.program.inputs) - len(c.constants)]
    values = arguments(taken, inputs, total)
    return c.rebuild(SequentialExecutor().bind(c, plan, {})(values, [0, *cuts, total], lambda mb: None))


@mark("twice", Resource.NETWORK, ["t"])
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


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
        assert torch.equal(got, want)


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
        assert torch.equal(got, want)


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
    assert torch.equal(out["a"][0], x.sin()) and torch.equal(out["a"][1][0], x.sin()) and torch.equal(out["x"], x)
    assert len(c.constants) == 1


def test_graphs_of_one_operator_and_of_none() -> None:
    gm, tokens = fake_graph(lambda graph, x: graph.call_function(torch.sin, (x,)))
    x = torch.randn(6, 4)
    assert torch.equal(run_split(partition(gm, tokens=tokens), {"x": x}, 6), x.sin())
    gm, tokens = fake_graph(lambda graph, x: (x,))
    assert torch.equal(run_split(partition(gm, tokens=tokens), {"x": x}, 6)[0], x)


# -- in-place writes ---------------------------------------------------------------------------------------
def test_an_in_place_residual_is_an_ordered_write_and_the_caller_sees_it() -> None:
    def model(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        residual += twice(x)
        return residual.sin()

    c = capture(model, torch.randn(6, 4), torch.randn(6, 4))
    (x_name, r_name) = (v for v in c.program.inputs if c.program.values[v].scope is Scope.BATCH)
    assert any(r_name in o.writes for o in c.program.operators)
    x, r = torch.randn(6, 4), torch.randn(6, 4)
    r0 = r.clone()
    out = run_split(c, {x_name: x, r_name: r}, 6)
    assert torch.equal(r, r0 + x * 2)
    assert torch.equal(out[0], r.sin())


def test_a_cache_with_a_batch_axis_is_written_through_views() -> None:
    position = torch.tensor([2])

    def model(cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(1, position, twice(new))
        return cache.sum(1)

    c = capture(model, torch.zeros(6, 5, 4), torch.randn(6, 1, 4))
    assert not c.program.unsplittable, c.program.unsplittable
    cache_name, new_name = (v for v in c.program.inputs if c.program.values[v].scope is Scope.BATCH)
    tensors = {cache_name: torch.zeros(6, 5, 4), new_name: torch.randn(6, 1, 4)}
    shared = {v: position for v in c.program.inputs if "position" in v}
    out = run_split(c, tensors | shared, 6)
    assert torch.equal(tensors[cache_name][:, 2], tensors[new_name][:, 0] * 2)
    assert torch.equal(out[0], tensors[cache_name].sum(1))


def test_a_write_to_what_all_share_is_refused() -> None:
    counter = torch.zeros(4)

    def model(x: torch.Tensor) -> torch.Tensor:
        counter.add_(1)
        return x + counter

    c = capture(model, torch.randn(6, 4))
    assert "which all micro-batches share" in c.program.unsplittable


# -- mixing ------------------------------------------------------------------------------------------------
WEIGHT = torch.randn(4, 4)
MIXING: dict[str, Callable[[torch.Tensor], Any]] = {
    "softmax": lambda x: x.softmax(0),
    "log_softmax": lambda x: F.log_softmax(x, dim=0),
    "cumsum": lambda x: x.cumsum(0),
    "sum": lambda x: x / x.sum(0),
    "mean": lambda x: x - x.mean(0, keepdim=True),
    "max": lambda x: x - x.max(),
    "matmul": lambda x: x @ x.T,
    "gram": lambda x: x.T @ x,
    "flip": lambda x: x.flip(1, 0),
    "roll": lambda x: x.roll(1),
    "sort": lambda x: x.sort(0).values,
    "arange": lambda x: x + torch.arange(x.shape[0])[:, None],
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True),
    "index": lambda x: x[torch.tensor([0, 1])],
    "slice": lambda x: x[1:],
    "last": lambda x: x + x[-1],
    "count": lambda x: x / x.shape[0],
    "reshape": lambda x: x.reshape(4, -1),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "conv": lambda x: F.conv1d(x.T[None], torch.ones(4, 4, 3), padding=1),
    "tril": lambda x: x.tril(),
    "scatter": lambda x: x.index_add(0, torch.zeros(2, dtype=torch.long), torch.ones(2, 4)),
    "layer_norm": lambda x: F.layer_norm(x.T, (x.shape[0],)),
    "cat": lambda x: torch.cat([x, torch.zeros(1, 4)])[1:],
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_refused_by_name(name: str) -> None:
    gm = trace(lambda x: MIXING[name](x.sin()), torch.randn(6, 4))
    reason = partition(gm, tokens=batch_symbols(gm, 0)).program.unsplittable
    assert reason.split(" ")[0] in {n.name for n in gm.graph.nodes}, reason or f"{name} mixes tokens"


NOT_MIXING: dict[str, Callable[[torch.Tensor], Any]] = {
    "softmax": lambda x: x.softmax(-1),
    "flip": lambda x: x.flip(1),
    "sum": lambda x: x.sum(1),
    "sort": lambda x: x.sort(-1).values,
    "matmul": lambda x: x @ WEIGHT,
    "heads": lambda x: x.view(-1, 2, 2).transpose(1, 2).reshape(-1, 4),
    "batched attention": lambda x: F.scaled_dot_product_attention(*[x.view(-1, 1, 2, 2)] * 3),
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "flatten and back": lambda x: x.reshape(-1).sin().view(-1, 4),
    "sizes": lambda x: x.view(x.shape[0], 2, 2).new_zeros(x.shape[0], 4) + x,
    "embedding": lambda x: F.embedding((x > 0).long()[:, 0], WEIGHT),
    "topk": lambda x: x.topk(2)[0],
    "where": lambda x: torch.where(x > 0, x, -x),
    "split": lambda x: torch.cat(x.chunk(2, dim=1)[::-1], dim=1),
}


@pytest.mark.parametrize("name", NOT_MIXING)
def test_what_keeps_tokens_apart_is_accepted_and_equal(name: str) -> None:
    c = capture(lambda x: twice(NOT_MIXING[name](x.sin())), torch.randn(6, 4))
    assert not c.program.unsplittable, c.program.unsplittable
    x_name = next(v for v in c.program.inputs if c.program.values[v].scope is Scope.BATCH)
    shared = {v: WEIGHT for v in c.program.inputs if c.program.values[v].scope is Scope.SHARED}
    x = torch.randn(6, 4)
    out = run_split(c, {x_name: x, **shared}, 6)
    torch.testing.assert_close(out[0], NOT_MIXING[name](x.sin()) * 2)


# -- collectives -------------------------------------------------------------------------------------------
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
    torch.testing.assert_close(out[0], x.sin().cos())


# -- zero copy ---------------------------------------------------------------------------------------------
def test_micro_batches_are_views_and_merged_outputs_are_written_in_place() -> None:
    """Inputs alias the argument; operators with an `out=` form write at their place of the one result."""
    gm, tokens = fake_graph(lambda graph, x: (graph.call_function(torch.mul, (x, x)),))
    c = partition(gm, tokens=tokens)
    assert [o.into for o in c.program.operators] == [("compute",)]
    read: list[int] = []
    written: list[int] = []
    original = c.into["compute"]

    def noting(x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        read.append(x.data_ptr())
        out = original(x, buffer)
        assert out.data_ptr() == buffer.data_ptr()
        written.append(out.data_ptr())
        return out

    c.into["compute"] = noting
    x = torch.randn(6, 4)
    (out,) = run_split(c, {"x": x}, 6, (1, 3))
    row = 4 * x.element_size()
    assert read == [x.data_ptr() + row * i for i in (0, 1, 3)]
    assert written == [out.data_ptr() + row * i for i in (0, 1, 3)]
    assert torch.equal(out, x * x)


def test_a_merge_without_an_out_form_copies() -> None:
    gm, tokens = fake_graph(lambda graph, x: (graph.call_function(torch.relu, (x,)),))
    c = partition(gm, tokens=tokens)
    assert c.into == {}
    x = torch.randn(6, 4)
    assert torch.equal(run_split(c, {"x": x}, 6)[0], x.relu())


@pytest.mark.parametrize("build", [lambda g, x: g.call_function(operator.mul, (2, x))])
def test_a_scalar_first_argument_has_no_out_form(build: Any) -> None:
    gm, tokens = fake_graph(lambda graph, x: (build(graph, x),))
    x = torch.randn(6, 4)
    assert torch.equal(run_split(partition(gm, tokens=tokens), {"x": x}, 6)[0], x * 2)


def test_hidden_mutation_is_refused() -> None:
    from dynaflow_serving.capture.fx.effects import written_arguments

    class Mutating(torch._ops.HigherOrderOperator):
        def __init__(self) -> None:
            super().__init__("triton_kernel_wrapper_mutation_test")

        def __call__(self, *args: Any) -> Any:
            return super().__call__(*args)

    graph = fx.Graph()
    node = graph.call_function(Mutating(), ())
    with pytest.raises(PartitionError, match="mutates its arguments in ways that cannot be seen"):
        written_arguments(node)
