"""Graph -> Program: operators that mix tokens are refused by name, all others are split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from partition_support import run_split, twice
from rounding import assert_same
from support import capture, trace

from dynaflow_serving.capture.fx import partition
from dynaflow_serving.capture.fx.symbols import batch_symbols
from dynaflow_serving.core.program import Scope

WEIGHT = torch.randn(4, 4)
MIXING: dict[str, Callable[[torch.Tensor], Any]] = {
    "softmax": lambda x: x.softmax(0),
    "log_softmax": lambda x: F.log_softmax(x, dim=0),
    "cumsum": lambda x: x.cumsum(0),
    "sum": lambda x: x / x.sum(0),
    "mean": lambda x: x - x.mean(0, keepdim=True),
    "max": lambda x: x - x.max(),
    "matmul": lambda x: x @ x.T,
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
    assert_same(out[0], NOT_MIXING[name](x.sin()) * 2)
