"""Graph -> Program: in-place writes, outputs written at their place, and mutations that cannot be seen."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from partition_support import fake_graph, run_split, twice
from rounding import assert_same, integers
from support import capture
from torch import fx

from dynaflow_serving.capture.fx import partition
from dynaflow_serving.core.program import Scope
from dynaflow_serving.errors import PartitionError


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
    assert_same(out[0], r.sin())


def test_a_cache_with_a_batch_axis_is_written_through_views() -> None:
    position = torch.tensor([2])

    def model(cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(1, position, twice(new))
        return cache.sum(1)

    c = capture(model, torch.zeros(6, 5, 4), torch.randn(6, 1, 4))
    assert not c.program.unsplittable, c.program.unsplittable
    cache_name, new_name = (v for v in c.program.inputs if c.program.values[v].scope is Scope.BATCH)
    tensors = {cache_name: torch.zeros(6, 5, 4), new_name: integers(6, 1, 4)}
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
