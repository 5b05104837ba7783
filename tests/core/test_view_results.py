"""Results that are views of inputs or of other results are views under a plan, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dynaflow_serving
from dynaflow_serving.errors import PartitionError

WIDTH = 4


def of_an_input(x: torch.Tensor) -> Any:
    return x[:, ::2], x * 2


def with_the_batch_size(x: torch.Tensor) -> Any:  # AOT autograd makes it anew from strides and offset
    return x.view(x.shape[0], 2, 2)[:, :, 1], x * 2


def repeated(x: torch.Tensor) -> Any:
    return x[:, None].expand(x.shape[0], 3, WIDTH), x * 2


def one_of_several(x: torch.Tensor) -> Any:
    return x.split(2, dim=1)[1], x * 2


def of_a_result(x: torch.Tensor) -> Any:
    y = x * 2
    return y, y.view(y.shape[0], 2, 2)[:, :, 1]


def of_what_is_no_result(x: torch.Tensor) -> Any:
    y = x * 2
    return y.view(y.shape[0], 2, 2)[:, :, 1], y.view(y.shape[0], 2, 2)[:, :, 0]


def of_what_was_written(x: torch.Tensor) -> Any:
    y = x * 2
    y.add_(1)
    return y, y[:, 1]


MODELS = (
    of_an_input, with_the_batch_size, repeated, one_of_several, of_a_result, of_what_is_no_result, of_what_was_written
)  # fmt: skip


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("level", ["dynamo", "aot"])
@pytest.mark.parametrize("model", MODELS)
def test_results_are_the_views_that_stock_returns(model: Callable[..., Any], level: Any, gradients: bool) -> None:
    torch._dynamo.reset()
    compiled = dynaflow_serving.compile(model, "nanoflow", config={"min_tokens": 1}, level=level)
    for size in (6, 8):
        x = torch.arange(size * WIDTH, dtype=torch.float32).reshape(size, WIDTH).requires_grad_(gradients)
        again = x.detach().clone().requires_grad_(gradients)
        results, expected = compiled(x), model(again)
        for result, want in zip(results, expected, strict=True):
            assert torch.equal(result, want)
        if model is not of_what_is_no_result:
            assert [r.stride() for r in results] == [r.stride() for r in expected]
            assert _aliases(x, results) == _aliases(again, expected)
        if gradients:
            sum(r.sum() for r in results).backward()
            sum(r.sum() for r in expected).backward()
            assert x.grad is not None and again.grad is not None and torch.equal(x.grad, again.grad)
    assert compiled.session.counts.split == (4 if gradients and level == "aot" else 2)  # backward graphs, too


def test_a_view_of_an_input_that_is_written_is_refused_at_aten_level() -> None:
    def model(x: torch.Tensor) -> Any:
        view = x.view(x.shape[0], 2, 2)[:, :, 1:]
        x.add_(1)
        return view.view(x.shape[0], 2), view.abs()

    compiled = dynaflow_serving.compile(model, "nanoflow", config={"min_tokens": 1}, level="aot")
    with pytest.raises(PartitionError, match=r"may be a view of input .*, which is written in place"):
        compiled(torch.ones(6, WIDTH))


def _aliases(x: torch.Tensor, results: Any) -> list[int]:
    """Return, for each of the tensors, the first one that shares its memory."""
    memory = [t.untyped_storage().data_ptr() for t in (x, *results)]
    return [memory.index(m) for m in memory]
