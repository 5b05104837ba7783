"""Kinds of models that relate tokens of the batch to each other: none is split, and the operator is named.

Random numbers may be drawn in the order of the un-split model, and a graph break may leave a part that is split: those
kinds are equal or refused.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kinds_support import BATCH, EITHER, LEVELS, REFUSED, SPLIT, WIDTH, Kind, check
from rounding import integers


@torch.library.custom_op("kinds::mix", mutates_args=())
def mix(x: torch.Tensor) -> torch.Tensor:
    return x - x.sum(0, keepdim=True)


@torch.library.custom_op("kinds::swap", mutates_args=())
def swap(x: torch.Tensor) -> torch.Tensor:
    return x.flip(0).clone()


@torch.library.custom_op("kinds::pick", mutates_args=())
def pick(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x[index].clone()


@torch.library.custom_op("kinds::cover", mutates_args=("x",))
def cover(x: torch.Tensor) -> None:
    x[1:] = x[:-1].clone()


@torch.library.custom_op("kinds::scale_rows", mutates_args=())
def scale_rows(x: torch.Tensor) -> torch.Tensor:
    """It keeps rows apart, but nothing says so."""
    return x * 2


for operator in (mix, swap, pick, scale_rows):
    operator.register_fake(lambda x, *rest: torch.empty_like(x))
cover.register_fake(lambda x: None)


def squares() -> tuple[torch.Tensor]:
    return (integers(BATCH, 3, 3),)


def two() -> tuple[torch.Tensor, torch.Tensor]:
    return integers(BATCH, WIDTH), integers(BATCH, WIDTH)


def square_batch() -> tuple[torch.Tensor]:
    return (integers(6, 6),)


def set_rows(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    y[torch.tensor([0, 5])] = 1.0
    return y


def add_at_rows(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    y[torch.arange(x.shape[0]).flip(0)] += x
    return y


def recurrence(x: torch.Tensor) -> torch.Tensor:
    rows = [x[0]]
    for i in range(1, 4):
        rows.append(rows[-1] * 2 + x[i])
    return torch.stack(rows)


ROW_MASK = torch.tensor([False] * 5 + [True])

KINDS = {
    "a custom operator that mixes rows": Kind(lambda x: mix(x.sin()), REFUSED, "mix"),
    "a custom operator that swaps rows": Kind(lambda x: swap(x * 2) + 1, REFUSED, "swap"),
    "a custom operator that picks rows": Kind(
        lambda x: pick(x, torch.arange(x.shape[0]).flip(0)) + x, REFUSED, "pick flip arange"
    ),
    "a custom operator that writes rows": Kind(lambda x: cover(y := x * 1) or y, REFUSED, "cover clone"),
    "a custom operator that nothing is known about": Kind(lambda x: scale_rows(x) + 1, REFUSED, "scale_rows"),
    "noise shared by the batch": Kind(lambda x: x + torch.rand(WIDTH), EITHER, "rand"),
    "noise of each token": Kind(lambda x: x + torch.rand_like(x), EITHER, "rand"),
    "normal noise": Kind(lambda x: x + torch.randn(x.shape[0], 1), EITHER, "randn"),
    "multinomial": Kind(lambda x: x.softmax(-1).multinomial(2), EITHER, "multinomial"),
    "bernoulli": Kind(lambda x: x.sigmoid().bernoulli(), EITHER, "bernoulli"),
    "dropout in training": Kind(lambda x: F.dropout(x, 0.5, training=True), EITHER, "dropout bernoulli rand"),
    "dropout in training, backward": Kind(
        lambda x: F.dropout(x, 0.5, training=True),
        EITHER,
        "dropout bernoulli rand",
        lambda: (integers(BATCH, WIDTH).requires_grad_(),),
        gradients=True,
    ),
    "einsum bi,cj->bj": Kind(lambda x, y: torch.einsum("bi,cj->bj", x, y), REFUSED, "einsum sum mul bmm", two),
    "einsum bi,bj->ij": Kind(lambda x, y: torch.einsum("bi,bj->ij", x, y), SPLIT, "einsum bmm permute", two),
    "einsum bi,ci->bc": Kind(lambda x, y: torch.einsum("bi,ci->bc", x, y), REFUSED, "einsum bmm permute", two),
    "einsum bi,ci->bi": Kind(lambda x, y: torch.einsum("bi,ci->bi", x, y), REFUSED, "einsum sum mul", two),
    "einsum bi,bi->i": Kind(lambda x, y: torch.einsum("bi,bi->i", x, y), SPLIT, "einsum sum bmm permute", two),
    "einsum bi->i": Kind(lambda x: torch.einsum("bi->i", x), SPLIT, "einsum sum"),
    "einsum bi->ib->bi": Kind(lambda x: torch.einsum("bi->ib", x).reshape(x.shape), REFUSED, "reshape view clone"),
    "einsum bij,cjk->bik": Kind(
        lambda x: torch.einsum("bij,cjk->bik", x, x), REFUSED, "einsum sum bmm permute", squares
    ),
    "einsum bij,bjk->ik": Kind(lambda x: torch.einsum("bij,bjk->ik", x, x), SPLIT, "einsum sum bmm permute", squares),
    "einsum ii->i over the batch": Kind(
        lambda x: x + torch.einsum("bb->b", x)[:, None], REFUSED, "einsum diagonal", square_batch
    ),
    "gram matrix": Kind(lambda x: x @ (x.t() @ x), REFUSED, "matmul mm"),
    "attention over the batch": Kind(
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0],
        REFUSED,
        "attention dot_product matmul bmm",
    ),
    "attention over the batch, by hand": Kind(lambda x: (x @ x.t()).softmax(-1) @ x, REFUSED, "matmul mm"),
    "sequence first: MultiheadAttention": Kind(
        lambda x: F.multi_head_attention_forward(
            x,
            x,
            x,
            WIDTH,
            2,
            torch.ones(3 * WIDTH, WIDTH),
            torch.ones(3 * WIDTH),
            None,
            None,
            False,
            0.0,
            torch.eye(WIDTH),
            torch.zeros(WIDTH),
            need_weights=False,
        )[0],
        REFUSED,
        "multi_head view bmm attention dot_product",
        lambda: (integers(BATCH, 5, WIDTH),),
    ),
    "rot90": Kind(lambda x: torch.rot90(x), EITHER, "rot90 flip transpose", square_batch),
    "rot90 backwards": Kind(lambda x: torch.rot90(x, 3), REFUSED, "rot90 flip transpose", square_batch),
    "rot90 twice": Kind(lambda x: torch.rot90(x, 2), REFUSED, "rot90 flip"),
    "renorm": Kind(lambda x: torch.renorm(x, 2, 1, 1.0), REFUSED, "renorm norm"),
    "cross over the batch": Kind(
        lambda x, y: torch.linalg.cross(x, y, dim=0), REFUSED, "cross", lambda: (integers(3, 4), integers(3, 4))
    ),
    "masked_scatter": Kind(lambda x, y: x.masked_scatter(x > 0, y), REFUSED, "masked_scatter", two),
    "slice_scatter": Kind(lambda x, y: x.slice_scatter(y[2:4], 0, 0, 2), REFUSED, "slice getitem", two),
    "select_scatter": Kind(lambda x: x.select_scatter(x[1] * 2, 0, 0), REFUSED, "select getitem"),
    "softmax": Kind(lambda x: x.softmax(0), REFUSED, "softmax"),
    "safe softmax": Kind(lambda x: torch._safe_softmax(x, 0), REFUSED, "softmax"),
    "attention over the batch with a full mask": Kind(
        lambda x, y: F.scaled_dot_product_attention(x[None], x[None], x[None], attn_mask=(y @ y.t() > 99)[None])[0],
        REFUSED,
        "attention dot_product matmul mm",
        two,
    ),
    "cumsum": Kind(lambda x: x.cumsum(0), REFUSED, "cumsum"),
    "cumprod": Kind(lambda x: x.sign().cumprod(0), REFUSED, "cumprod"),
    "logcumsumexp": Kind(lambda x: x.logcumsumexp(0), REFUSED, "logcumsumexp"),
    "sort": Kind(lambda x: x.sort(dim=0, stable=True).values, REFUSED, "sort"),
    "topk": Kind(lambda x: x.topk(3, 0).values, REFUSED, "topk"),
    "argmax": Kind(lambda x: x + x.argmax(0), REFUSED, "argmax"),
    "roll": Kind(lambda x: x.roll(1, 0), REFUSED, "roll"),
    "roll of all elements": Kind(lambda x: x.roll(1), REFUSED, "roll"),
    "batch norm in training": Kind(lambda x: F.batch_norm(x, None, None, training=True), REFUSED, "batch_norm"),
    "instance norm over the batch": Kind(
        lambda x: F.instance_norm(x.t()[None])[0].t(), REFUSED, "norm view reshape clone"
    ),
    "index_put of rows": Kind(set_rows, REFUSED, "index_put setitem"),
    "adding at rows": Kind(add_at_rows, REFUSED, "setitem index flip getitem arange"),
    "index_put with an index of its own": Kind(
        lambda x, y: x.index_put((torch.arange(x.shape[0]).flip(0),), y), REFUSED, "index_put flip arange", two
    ),
    "scatter over rows": Kind(lambda x, y: x.scatter(0, (y > 0).long(), 9.0), REFUSED, "scatter", two),
    "scatter_add over rows": Kind(lambda x, y: x.scatter_add(0, (y > 0).long(), x), REFUSED, "scatter_add", two),
    "index_add": Kind(lambda x: x.index_add(0, torch.arange(x.shape[0]).flip(0), x), REFUSED, "index_add flip arange"),
    "gather over rows": Kind(lambda x, y: x.gather(0, (y > 0).long()), REFUSED, "gather", two),
    "index_select": Kind(
        lambda x: x.index_select(0, torch.arange(x.shape[0]).flip(0)), REFUSED, "index_select flip arange"
    ),
    "rows by values of the batch": Kind(lambda x, y: x[(y[:, 0] > 0).long()], REFUSED, "getitem index", two),
    "cdist of the batch with itself": Kind(lambda x: torch.cdist(x, x), REFUSED, "cdist"),
    "pdist": Kind(lambda x: F.pdist(x), REFUSED, "pdist"),
    "halves": Kind(lambda x: x.view(2, -1, WIDTH).sum(0), REFUSED, "view sum"),
    "halves, swapped": Kind(lambda x: x.view(2, -1, WIDTH).flip(0).reshape(-1, WIDTH), REFUSED, "view flip"),
    "columns of a flat view": Kind(lambda x: x.reshape(-1).view(WIDTH, -1).t() + 0, REFUSED, "view reshape"),
    "every second row": Kind(lambda x: x[::2] * 2, REFUSED, "getitem slice"),
    "all rows but the last": Kind(lambda x: x[:-1] * 2, REFUSED, "getitem slice"),
    "neighbours": Kind(lambda x: x[1:] + x[:-1], REFUSED, "getitem slice"),
    "first row": Kind(lambda x: x - x[0], REFUSED, "getitem select"),
    "diff": Kind(lambda x: x.diff(dim=0), REFUSED, "diff slice narrow"),
    "nonzero": Kind(lambda x: x.nonzero().sum(0), EITHER, "nonzero sum"),
    "masked_select": Kind(lambda x: x + x.masked_select(x > 0).sum(), EITHER, "masked_select sum"),
    "unique": Kind(lambda x: x + x.unique().sum(), EITHER, "unique sum"),
    "rows of a fixed mask": Kind(lambda x: x[ROW_MASK] + 0, EITHER, "getitem index", lambda: (integers(6, WIDTH),)),
    "a recurrence": Kind(recurrence, REFUSED, "getitem select"),
    "tril": Kind(lambda x: x.tril(), REFUSED, "tril"),
    "diagonal": Kind(lambda x: x.diagonal(), REFUSED, "diagonal"),
    "norm of all": Kind(lambda x: x / x.norm(), REFUSED, "norm"),
    "variance": Kind(lambda x: (x - x.mean(0)) / x.std(0), REFUSED, "mean std sub"),
    "quantile": Kind(lambda x: x.quantile(0.5, 0), REFUSED, "quantile sort"),
    "determinant of the batch": Kind(lambda x: x + torch.linalg.det(x), REFUSED, "det", square_batch),
    "convolution along the batch": Kind(
        lambda x: F.conv1d(x.t()[None], torch.ones(4, 4, 3), padding=1)[0].t() + 0, REFUSED, "conv"
    ),
    "pooling along the batch": Kind(lambda x: F.avg_pool1d(x.t()[None], 2)[0].t() + 0, REFUSED, "pool unsqueeze"),
    "channels of the batch": Kind(lambda x: F.group_norm(x[None], 2)[0], REFUSED, "group_norm view"),
    "a loss": Kind(lambda x, y: F.mse_loss(x, y), SPLIT, "mse_loss mean sum", two),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", KINDS)
def test_what_relates_tokens_to_each_other_is_refused_by_name(name: str, level: str) -> None:
    check(KINDS[name], level)
