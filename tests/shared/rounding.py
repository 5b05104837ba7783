"""Comparisons that hold on every processor.

Contract
- Which kernel a matmul takes depends on the processor, the number of rows and the number of threads. Each kernel adds
  in an order of its own, and a micro-batch has fewer rows than its batch. So a rounded sum may differ in its last bits.
- Functions such as `sin` and `exp` may round otherwise in the vectorised body of an array than at its end.
- Where a model only adds and multiplies, give it `with_integer_weights` and `integers`: no sum is rounded, whatever
  its order, and `torch.equal` may be asked for.
- Elsewhere (softmax, norms, tanh) use `assert_same`, or `same` where a bool is needed.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

# Of the greatest value, in float32. The logits of the tiny Llama come to 8e-6 when every sum takes another order; a
# wrong row, weight or cache entry comes to 1e-2 and more.
TOLERANCE = 5e-5

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def integers(*shape: int) -> torch.Tensor:
    """Small whole numbers in float32, from torch's global generator."""
    return torch.randint(-3, 4, shape).float()


def with_integer_weights(model: AnyModule) -> AnyModule:
    """`model` with small whole numbers for parameters: all sums below 2**24 are exact in float32.

    Matrices hold -1, 0 and 1. Vectors, the scales of norms among them, hold 1 and 2, so that nothing is lost.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            low, high = (-1, 2) if p.dim() > 1 else (1, 3)
            p.copy_(torch.randint(low, high, p.shape, generator=generator))
    return model


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The greatest difference in units of the greatest value: small values are rests of sums of large ones."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if not expected.numel():
        return 0.0
    a, b = actual.detach().double(), expected.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for rounding. NaN is equal to nothing."""
    return distance(actual, expected) <= TOLERANCE


def assert_same(actual: torch.Tensor, expected: torch.Tensor, what: str = "results") -> None:
    """Equal but for rounding: see the module's docstring for what may differ, and `TOLERANCE` for how much."""
    apart = distance(actual, expected)
    assert apart <= TOLERANCE, f"{what} are {apart:.1e} of the greatest value apart, allowed is {TOLERANCE:.0e}"
