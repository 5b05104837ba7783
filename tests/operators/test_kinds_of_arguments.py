"""Kinds of models whose arguments, buffers or constants depend on the batch: equal or refused, never wrong."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kinds_support import BATCH, EITHER, LEVELS, REFUSED, SPLIT, WIDTH, Kind, check
from rounding import integers
from torch import nn


def two() -> tuple[torch.Tensor, torch.Tensor]:
    return integers(BATCH, WIDTH), integers(BATCH, WIDTH)


def with_training_weight() -> tuple[torch.Tensor, torch.Tensor]:
    return integers(BATCH, WIDTH), integers(BATCH, WIDTH).requires_grad_()


def ids_and_table() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, BATCH, (BATCH, 3)), integers(BATCH, WIDTH)


def square_weight() -> tuple[torch.Tensor, torch.Tensor]:
    return integers(BATCH, BATCH), integers(BATCH, BATCH)


class TrainingNorm(nn.Module):
    """Running statistics are updated from the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class Counter(nn.Module):
    """It counts the rows that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows += x.shape[0]
        return x * 2


class Calls(Counter):
    """It counts its calls, which are not the batch's: one micro-batch must not count for two."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows += 1
        return x * 2


class Average(Counter):
    """A moving average of the batch's mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.mul_(0.5).add_(x.sum())
        return x * 2


class Cache(nn.Module):
    """A buffer that holds the latest batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("latest", torch.zeros(BATCH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.latest.copy_(x)
        return x + 1


class SequenceFirst(nn.Module):
    """The batch of attention is dimension 1, and dimension 0 the sequence, which `batch_dim` 0 would cut."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def write_input(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    x.mul_(2)
    return x * w


def write_rows_of_input(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    x[1:] = 3.0
    return x * w


def write_one_row_of_input(x: torch.Tensor) -> torch.Tensor:
    x[0] = 7.0
    return x + 1


COUNTS = "scalar_tensor add getitem size mul div truediv full sqrt arange pow float linspace eye cumsum sym"
KINDS = {
    "divided by the root of the batch size": Kind(lambda x: x / math.sqrt(x.shape[0]), REFUSED, COUNTS),
    "filled with the batch size": Kind(lambda x: x + torch.full((x.shape[0], 1), x.shape[0]), REFUSED, COUNTS),
    "times the batch size": Kind(lambda x: x * x.shape[0], REFUSED, COUNTS),
    "divided by the batch size": Kind(lambda x: x / len(x), REFUSED, COUNTS),
    "a power of the batch size": Kind(lambda x: x * float(x.size(0)) ** -0.5, REFUSED, COUNTS),
    "numbered tokens": Kind(lambda x: x + torch.arange(x.shape[0])[:, None], REFUSED, COUNTS),
    "numbered elements": Kind(lambda x: x + torch.arange(x.numel()).view(x.shape), REFUSED, COUNTS),
    "linspace over the batch": Kind(lambda x: x + torch.linspace(0, 1, x.shape[0])[:, None], REFUSED, COUNTS),
    "numbered by a running sum": Kind(lambda x: x + torch.ones(x.shape[0], 1).cumsum(0), REFUSED, COUNTS),
    "an identity matrix": Kind(lambda x: torch.eye(x.shape[0]) @ x, REFUSED, COUNTS + " mm matmul"),
    "the batch size returned": Kind(lambda x: (x * 2, x.shape[0]), EITHER),
    "the batch size as a tensor": Kind(lambda x: (x * 2, torch.tensor(x.shape[0])), REFUSED, COUNTS + " tensor scalar"),
    "the first eight tokens": Kind(
        lambda x: torch.where(torch.arange(x.shape[0])[:, None] < 3, x, 0.0), REFUSED, COUNTS + " where lt"
    ),
    "the batch twice": Kind(lambda x: torch.cat([x, x]), EITHER, "cat"),
    "the batch twice, and its first half": Kind(
        lambda x: torch.cat([x, -x])[: x.shape[0]], EITHER, "cat getitem slice"
    ),
    "repeated rows": Kind(lambda x: x.repeat(2, 1), EITHER, "repeat"),
    "interleaved rows": Kind(lambda x: x.repeat_interleave(2, 0), EITHER, "repeat_interleave view reshape clone"),
    "rows counted by a tensor": Kind(
        lambda x, y: x.repeat_interleave((y[:, 0].abs() + 1).long(), 0).sum(0),
        EITHER,
        "repeat_interleave sum index item",
        two,
    ),
    "a table used for embedding": Kind(
        lambda ids, table: F.embedding(ids, table).sum(1), EITHER, "embedding", ids_and_table
    ),
    "a table that is indexed": Kind(lambda ids, table: table[ids[:, 0]] * 2, EITHER, "getitem index", ids_and_table),
    "a weight matrix": Kind(lambda x, w: x @ w, EITHER, "matmul mm", square_weight),
    "a weight matrix of linear": Kind(lambda x, w: F.linear(x, w), EITHER, "linear mm permute", square_weight),
    "a weight matrix, transposed": Kind(lambda x, w: x @ w.t(), EITHER, "matmul mm permute t", two),
    "a table added row by row": Kind(lambda x, table: x + table, SPLIT, "", two),
    "a bias as long as the batch": Kind(
        lambda x, b: x + b, EITHER, "add", lambda: (integers(BATCH, BATCH), integers(BATCH))
    ),
    "a vector of weights": Kind(
        lambda x, w: x @ w, EITHER, "matmul mv", lambda: (integers(BATCH, BATCH), integers(BATCH))
    ),
    "offsets of an embedding bag": Kind(
        lambda ids, offsets, table: F.embedding_bag(ids, table, offsets, mode="sum"),
        REFUSED,
        "embedding_bag",
        lambda: (torch.randint(0, 9, (BATCH,)), torch.arange(BATCH), integers(9, WIDTH)),
    ),
    "offsets of an embedding bag, half as many": Kind(
        lambda ids, offsets, table: F.embedding_bag(ids, table, offsets, mode="sum"),
        REFUSED,
        "embedding_bag",
        lambda: (torch.randint(0, 9, (2 * BATCH,)), torch.arange(0, 2 * BATCH, 2), integers(9, WIDTH)),
    ),
    "sorted boundaries": Kind(
        lambda x, edges: torch.bucketize(x, edges),
        EITHER,
        "bucketize",
        lambda: (integers(BATCH, WIDTH), torch.arange(-4.0, 4.0)),
    ),
    "an input is written": Kind(write_input, EITHER, "mul", two),
    "an input is written, backward": Kind(write_input, EITHER, "mul written", with_training_weight, gradients=True),
    "rows of an input are written": Kind(write_rows_of_input, REFUSED, "setitem slice getitem copy fill", two),
    "rows of an input are written, backward": Kind(
        write_rows_of_input, EITHER, "setitem slice getitem copy fill", with_training_weight, gradients=True
    ),
    "one row of an input is written": Kind(write_one_row_of_input, REFUSED, "setitem select copy fill"),
    "batch norm in training": Kind(TrainingNorm, REFUSED, "batch_norm"),
    "batch norm in training, backward": Kind(
        TrainingNorm, REFUSED, "batch_norm", lambda: (integers(BATCH, WIDTH).requires_grad_(),), gradients=True
    ),
    "rows are counted": Kind(Counter, REFUSED, "rows add iadd size"),
    "calls are counted": Kind(Calls, EITHER, "rows add iadd"),
    "a moving average": Kind(Average, REFUSED, "sum rows add"),
    "a buffer of the batch": Kind(Cache, EITHER, "copy latest"),
    "sequence first": Kind(
        SequenceFirst, REFUSED, "multi_head view bmm attention dot_product", lambda: (integers(BATCH, 3, WIDTH),)
    ),
    "sequence first, the batch in dimension 1": Kind(
        SequenceFirst, EITHER, "", lambda: (integers(3, BATCH, WIDTH),), batch_dim=1
    ),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", KINDS)
def test_what_depends_on_the_batch_is_equal_or_refused(name: str, level: str) -> None:
    check(KINDS[name], level)
