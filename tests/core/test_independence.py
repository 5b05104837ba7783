"""The proof that a graph treats tokens independently: each of our own rules accepts what is right, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import capture, trace
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from dynaflow_serving.capture.fx.axes import Axes
from dynaflow_serving.capture.fx.symbols import batch_symbols
from dynaflow_serving.capture.independence import Cut, Total, Whole, row_wise, torch_rules
from dynaflow_serving.core.program import Scope
from dynaflow_serving.errors import ConfigError, InactiveError

aten = torch.ops.aten
X, IDS, WEIGHT = torch.randn(6, 4), torch.arange(6) % 3, torch.randn(4, 4)
SEQUENCES = torch.randn(6, 2, 5, 8)  # [sequences, heads, positions, size]


def axes_of(fn: Callable[..., Any], *inputs: torch.Tensor) -> tuple[Axes, fx.GraphModule]:
    """The proof of `fn`; dimension 0 of each input is the batch."""

    def model(*tensors: torch.Tensor) -> Any:
        for t in tensors:
            torch._check(t.shape[0] == tensors[0].shape[0])
        return fn(*tensors), tensors[0].sign()  # all inputs are used

    gm = trace(model, *(t.clone() for t in inputs))
    return Axes(gm, {}, batch_symbols(gm, 0)), gm


def placement_of(fn: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    """The placement of what `fn` returns, or the reason why it cannot be split."""
    axes, gm = axes_of(fn, *inputs)
    (results,) = list(gm.graph.nodes)[-1].args
    return axes.reason or axes._proof.placement(results[0])


# fmt: off
RIGHT: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], Any]] = {
    # views
    "rows per token": (lambda x: x.view(-1, 2), (X,), Cut(0)),
    "heads": (lambda x: x.view(-1, 2, 2).transpose(0, 1), (X,), Cut(1)),
    "copies": (lambda x: torch.cat([x, x]), (X,), Cut(0, copies=2)),
    "copies regrouped": (lambda x: torch.cat([x, x]).view(2, -1, 4), (X,), Cut(1)),
    "one copy": (lambda x: torch.cat([x, x]).chunk(2)[1], (X,), Cut(0)),
    "written copy": (
        lambda x: aten.slice_scatter(torch.cat([x, x, x]), torch.cat([x, x]), 0, 0, 2 * x.shape[0]), (X,),
        Cut(0, copies=3)),
    "repeat": (lambda x: x.repeat(3, 1), (X,), Cut(0, copies=3)),
    "repeat of rows": (lambda x: x.repeat(1, 3), (X,), Cut(0)),
    "a weight per token": (lambda x: torch.ones(4).expand(x.shape[0], 4), (X,), Cut(0)),
    "half of the columns": (lambda x: x[:, 2:], (X,), Cut(0)),
    "no rows": (lambda x: x[:0], (X,), Whole()),
    "all rows": (lambda x: x[:], (X,), Cut(0)),
    "bytes": (lambda x: x.view(torch.int32), (X,), Cut(0)),
    "bytes of as many numbers": (lambda x: x.t().flatten().view(torch.int32), (X,), Cut(0, copies=4)),
    "gradient of columns": (lambda x: aten.slice_backward(x, [x.shape[0], 9], 1, 2, 6, 1), (X,), Cut(0)),
    "gradient of all rows": (lambda x: aten.slice_backward(x, [x.shape[0], 4], 0, 0, 1 << 62, 1), (X,), Cut(0)),
    "gradient of one column": (lambda x: aten.select_backward(x, [x.shape[0], 3, 4], 1, 2), (X,), Cut(0)),
    "gradient of one plane": (lambda x: aten.select_backward(x, [3, x.shape[0], 4], 0, 2), (X,), Cut(1)),
    # factories
    "zeros per token": (lambda x: torch.zeros(x.shape[0], 3), (X,), Cut(0)),
    "zeros": (lambda x: torch.zeros(3) + 0 * x.shape[1], (X,), Whole()),
    # indexing
    "rows of a table": (lambda i: WEIGHT[i], (IDS,), Cut(0)),
    "columns": (lambda x: x[:, torch.tensor([2, 0])], (X,), Cut(0)),
    "own row": (lambda x: x[torch.arange(x.shape[0])[:, None], torch.tensor([[2, 0]])], (X,), Cut(0)),
    "own element": (lambda x, i: x[torch.arange(x.shape[0]), i], (X, IDS), Cut(0)),
    "write to own element": (
        lambda x, i: aten.index_put(x, [torch.arange(x.shape[0]), i], torch.zeros(())), (X, IDS), Cut(0)),
    "gradient of a table": (lambda x, i: aten.index_put(torch.zeros(4, 4), [i], x, True), (X, IDS), Total()),
    "argmax of a row": (lambda x: x.argmax(1), (X,), Cut(0)),
    "add to columns": (lambda x: x.index_add(1, torch.tensor([0]), x[:, :1]), (X,), Cut(0)),
    "scatter in a row": (lambda x, i: x.scatter_reduce(1, i[:, None], x[:, :1], "sum"), (X, IDS), Cut(0)),
    "norms of rows": (lambda x: x.renorm(2, 0, 1.0), (X,), Cut(0)),
    "a turn": (lambda x: aten.rot90(x, 1, [0, 1]), (X,), Cut(1)),
    "search in a table": (lambda x: torch.searchsorted(torch.arange(4.0), x), (X,), Cut(0)),
    "search in own row": (lambda x: torch.searchsorted(x, x), (X,), Cut(0)),
    "border of a row": (lambda x: F.pad(x[:, None], (1, 1), "replicate"), (X,), Cut(0)),
    "windows": (lambda x: x.unfold(1, 2, 1), (X,), Cut(0)),
    # models
    "attention": (lambda q: F.scaled_dot_product_attention(q, q, q), (SEQUENCES,), Cut(0)),
    "attention with a mask": (
        lambda q: F.scaled_dot_product_attention(q, q, q, torch.ones(5, 5, dtype=torch.bool)), (SEQUENCES,), Cut(0)),
    "convolution": (lambda x: F.conv1d(x[:, None], torch.ones(3, 1, 2)), (X,), Cut(0)),
    "batch norm in evaluation": (lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)), (X,), Cut(0)),
    "group norm": (lambda x: F.group_norm(x, 2), (X,), Cut(0)),
    "a loss per token": (lambda x, i: F.cross_entropy(x, i, reduction="none"), (X, IDS), Cut(0)),
    "a loss": (lambda x, i: F.cross_entropy(x, i, reduction="sum"), (X, IDS), Total()),
    "dropout in evaluation": (lambda x: F.dropout(x, 0.5, training=False) + 1, (X,), Cut(0)),
    "copy": (lambda x: aten.copy(torch.zeros(x.shape[0], 4), x), (X,), Cut(0)),
    "copy of a row": (lambda x: aten.copy(x, torch.zeros(4)), (X,), Cut(0)),
    # sums
    "sum": (lambda x: x.sum(0), (X,), Total()),
    "mean": (lambda x: x.mean(), (X,), Total(mean=True)),
    "weight gradient": (lambda x: x.t() @ x, (X,), Total()),
    "sum per column": (lambda x: x.sum(0, keepdim=True).expand(3, 4), (X,), Total()),
    "scaled sum": (lambda x: x.sum(0) * 2 @ WEIGHT, (X,), Total()),
    "mean of sums": (lambda x: x.sum(1).mean(), (X,), Total(mean=True)),
}
WRONG: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], str]] = {
    "bytes of tokens": (lambda x: x[:, 0].clone().view(torch.int16), (X,), "regroups the bytes of tokens"),
    # views
    "pairs of tokens": (lambda x: x.view(-1, 8), (X,), "reshapes across the token axis"),
    "halves": (lambda x: x.view(2, -1, 4), (X,), "reshapes across the token axis"),
    "copies as rows": (lambda x: torch.cat([x, x]).view(-1, 2, 4), (X,), "reshapes across the token axis"),
    "every second": (lambda x: x[::2], (X,), "picks tokens by position"),
    "all but one": (lambda x: x[1:], (X,), "picks tokens by position"),
    "written across copies": (
        lambda x: aten.slice_scatter(torch.cat([x, x]), x, 0, 1, x.shape[0] + 1), (X,), "picks tokens by position"),
    "beside a constant": (lambda x: torch.cat([x, torch.zeros(1, 4)]), (X,), "puts what all tokens share beside"),
    "different rows": (lambda x: torch.cat([x.view(-1, 2), x[:, :2]]), (X,), "different numbers of rows"),
    "strides": (lambda x: torch.as_strided(x, (2, 2), (1, 1)), (X,), "by strides"),
    "as many columns": (lambda x: torch.ones(100)[: x.shape[0]] + 1, (X,), "takes as many elements as there are"),
    "gradient of the first rows": (
        lambda x: aten.slice_backward(x, [2 * x.shape[0], 4], 0, 0, x.shape[0], 1), (X,), "picks tokens by position"),
    "gradient of as many columns": (
        lambda x: aten.slice_backward(x @ x.t(), [x.shape[0], 99], 1, 0, x.shape[0], 1), (X,), "mixes tokens"),
    "gradient of one token": (
        lambda x: aten.select_backward(WEIGHT[0], [x.shape[0], 4], 0, 1), (X,), "but has no token axis"),
    "a sum per token": (lambda x: x.sum(0).expand(x.shape[0], 4), (X,), "repeats a sum over tokens"),
    # factories
    "filled with the count": (
        lambda x: torch.full((x.shape[0],), x.shape[0]), (X,), "computes with the number of tokens"),
    "numbers": (lambda x: torch.arange(x.shape[0]) + 1, (X,), "computes with the numbers of the tokens"),
    "numbers from 1": (lambda x: torch.arange(1, x.shape[0]), (X,), "numbers the tokens of the batch"),
    "noise": (lambda x: x + torch.rand(4), (X,), "draws random numbers"),
    "dropout": (lambda x: F.dropout(x, 0.5), (X,), "draws random numbers"),
    # indexing
    "other rows": (lambda x, i: x[i], (X, IDS), "picks tokens by a tensor index"),
    "rows backwards": (lambda x: x[torch.arange(x.shape[0]).flip(0)], (X,), "computes with the numbers"),
    "a row each of a table": (
        lambda x: torch.ones(100, 4)[torch.arange(x.shape[0])], (X,), "computes with the numbers"),
    "norms over tokens": (lambda x: x.renorm(2, 1, 1.0), (X,), "limits norms over tokens"),
    "a turn the other way": (lambda x: aten.rot90(x, 3, [0, 1]), (X,), "mixes tokens"),
    "search in tokens": (lambda x: aten.searchsorted(x[:, 0].contiguous(), x), (X,), "has tokens in its argument"),
    "repeated border": (lambda x: F.pad(x.t()[None], (1, 1), "replicate"), (X,), "repeats tokens at the border"),
    "a bare squeeze": (lambda x: x.squeeze(), (X,), "another shape than expected for 1 tokens"),
    "a bare cross": (lambda x: torch.ops.aten.cross(x[:, :3], x[:, 1:]), (X,), "for 3 tokens"),
    "pieces of two tokens": (lambda x: x.split(2)[0], (X,), "another number of results"),
    "columns per token": (lambda x, i: x[:, i], (X, IDS), "relates tokens to tokens"),
    "write to other rows": (lambda x, i: aten.index_put(x, [i], x), (X, IDS), "picks tokens by a tensor index"),
    "write to a table": (lambda x, i: aten.index_put(WEIGHT, [i], x), (X, IDS), "into memory that all tokens share"),
    "argmax over tokens": (lambda x: x.argmax(0), (X,), "mixes tokens"),
    "argmax of all": (lambda x: x.argmax(), (X,), "mixes tokens"),
    "add to rows": (lambda x, i: x.index_add(0, i, x), (X, IDS), "has tokens in its argument index"),
    # models
    "attention over tokens": (
        lambda q: F.scaled_dot_product_attention(*[q.transpose(0, 2)] * 3), (SEQUENCES,), "attends over tokens"),
    "convolution over tokens": (lambda x: F.conv1d(x.t()[:, None], torch.ones(3, 1, 2)), (X,), "mixes tokens"),
    "batch norm": (lambda x: F.batch_norm(x, None, None, training=True), (X,), "computes statistics over the batch"),
    "mean loss": (lambda x, i: F.cross_entropy(x, i), (X, IDS), "averages over the tokens that are not ignored"),
    # sums
    "square of a sum": (lambda x: x.sum(0) * x.sum(0), (X,), "reads a sum over tokens"),
    "sum plus a constant": (lambda x: x.sum(0) + 1, (X,), "reads a sum over tokens"),
    "sum as a whole number": (lambda x: x.sum(0).long(), (X,), "reads a sum over tokens"),
    "maximum": (lambda x: x.amax(0), (X,), "P(max)"),
    "by the count": (lambda x: x / x.shape[0], (X,), "computes with the number of tokens"),
    "product of tokens": (lambda x: x @ x.t(), (X,), "mixes tokens along the token axis"),
}
# fmt: on


@pytest.mark.parametrize("name", RIGHT)
def test_what_keeps_tokens_apart_is_placed(name: str) -> None:
    fn, inputs, expected = RIGHT[name]
    assert placement_of(fn, *inputs) == expected


@pytest.mark.parametrize("name", WRONG)
def test_what_mixes_tokens_is_refused_by_the_name_of_its_node(name: str) -> None:
    fn, inputs, expected = WRONG[name]
    axes, gm = axes_of(fn, *inputs)
    assert expected in axes.reason
    assert axes.reason.split()[0] in {n.name for n in gm.graph.nodes}


def test_gradients_at_aten_level() -> None:
    """The joint graph of a loss: weight gradients are sums over tokens, token gradients are cut."""

    def gradients(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        w, x = w.detach().requires_grad_(), x.detach().requires_grad_()
        h = F.scaled_dot_product_attention(*[F.layer_norm(x @ w, (8,))] * 3)
        return torch.autograd.grad((h @ w).pow(2).sum(), (w, x))

    example = torch.randn(6, 2, 5, 8)
    gm = make_fx(gradients, tracing_mode="symbolic")(example, torch.randn(8, 8))
    tokens = {next(n for n in gm.graph.nodes).meta["val"].shape[0].node.expr}
    axes = Axes(gm, {}, tokens)
    assert not axes.reason
    (results,) = next(n for n in gm.graph.nodes if n.op == "output").args
    assert [axes.value("v", n).scope for n in results] == [Scope.PARTIAL, Scope.BATCH]


@torch.library.custom_op("independence::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("independence::first", mutates_args=())
def first(x: torch.Tensor) -> torch.Tensor:
    return x[:1].clone()


@first.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(1, x.shape[1])


def test_a_custom_operator_has_to_be_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaflow_serving.capture.independence.declared._declared", set())
    assert "row_wise('independence::double')" in placement_of(lambda x: double(x).sin(), X)
    row_wise("independence::double", "independence::first")
    assert placement_of(lambda x: double(x).sin(), X) == Cut(0)
    assert "another number of rows" in placement_of(lambda x: first(x).sin(), X)
    with pytest.raises(ConfigError, match="'double' is no operator's name"):
        row_wise("double")


def test_another_release_of_torch_is_refused_by_the_name_of_what_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_rules._NEEDED, "OpSchema", ("op", "arguments"))
    monkeypatch.setattr(torch_rules, "_answers", {})
    torch_rules._parts.cache_clear()
    try:
        with pytest.raises(InactiveError, match="OpSchema has no parameter 'arguments'"):
            placement_of(lambda x: x.sin(), X)
    finally:
        torch_rules._parts.cache_clear()


def test_values_are_described_by_the_proof() -> None:
    program = capture(lambda x: (x.sum(0), x.mean(0), x.sin(), torch.cat([x, x]).chunk(2)[0]), X).program
    scopes = [(program.values[v].scope, program.values[v].mean) for v in program.outputs]
    assert scopes == [(Scope.PARTIAL, False), (Scope.PARTIAL, True), (Scope.BATCH, False), (Scope.BATCH, False)]
