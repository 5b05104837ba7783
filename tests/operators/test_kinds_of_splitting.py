"""Kinds of models that keep tokens apart: they are really split, and equal.

Where PyTorch itself looks at all values at level "aot" (errors of `linalg`, the largest index), a refusal is right.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kinds_support import BATCH, EITHER, LEVELS, SPLIT, WIDTH, Kind, check
from rounding import integers, with_integer_weights
from torch import nn

TABLE = torch.arange(40.0).view(10, WIDTH)
WEIGHT = torch.tensor([[1.0, -1, 0, 2], [0, 1, 1, -1], [2, 0, 1, 0], [-1, 1, 0, 1]])


def squares() -> tuple[torch.Tensor]:
    return (integers(BATCH, 3, 3) + 9 * torch.eye(3),)


def sequences() -> tuple[torch.Tensor]:
    return (integers(BATCH, 6, WIDTH),)


def training() -> tuple[torch.Tensor]:
    return (integers(BATCH, WIDTH).requires_grad_(),)


def images() -> tuple[torch.Tensor]:
    return (integers(BATCH, 4, 6, 6),)


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    return integers(BATCH, WIDTH), torch.randint(0, 10, (BATCH, 3))


class Attention(nn.Module):
    """Multi-head attention whose batch is dimension 0."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class Experts(nn.Module):
    """Two rows per token, one for each of its choices, and back: the routing of a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.weights = nn.Linear(WIDTH, 5), nn.Parameter(torch.ones(5, WIDTH, WIDTH))
        with_integer_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, chosen = self.gate(x).topk(2, -1)
        rows = x[:, None].expand(-1, 2, -1).reshape(-1, WIDTH)
        out = torch.bmm(rows[:, None], self.weights[chosen.reshape(-1)])[:, 0]
        return (out.view(-1, 2, WIDTH) * scores[..., None]).sum(1)


class Norms(nn.Module):
    """Norms in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.batch, self.group, self.layer = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(6)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(self.group(self.batch(x)))
        return y


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(3, 2, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(self.b(self.a(x).relu()), 2).flatten(1)


class Block(nn.Module):
    """An MLP with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.b(torch.relu(self.a(self.norm(x))))
        return y


def numbered_mask(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Look a padding mask up by batch index and position, as Transformers' masks do."""
    batch, position = torch.arange(x.shape[0])[:, None, None], torch.arange(x.shape[1])
    allowed = mask[batch, position] & (position[:, None] >= position)
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=allowed[:, None])[:, 0]


def scan(x: torch.Tensor) -> torch.Tensor:
    """A recurrence along the sequence of each token."""
    state = x[:, 0]
    out = [state]
    for i in range(1, x.shape[1]):
        state = state * 0.5 + x[:, i]
        out.append(state)
    return torch.stack(out, 1)


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 1] = 3.0
    y[:, 2:] += x[:, :2]
    return y.relu_()


def own_columns(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Each token reads and writes a column of its own row."""
    rows = torch.arange(x.shape[0])
    chosen = x[rows, ids[:, 0] % WIDTH]
    return x.index_put((rows, ids[:, 1] % WIDTH), chosen)


KINDS = {
    "block": Kind(Block, SPLIT),
    "block, backward": Kind(Block, SPLIT, inputs=training, gradients=True),
    "multi-head attention": Kind(Attention, SPLIT, aot=EITHER, inputs=sequences),
    "attention": Kind(
        lambda x: F.scaled_dot_product_attention(*[x.view(-1, 6, 2, 2).transpose(1, 2)] * 3), SPLIT, inputs=sequences
    ),
    "k rows per token: experts": Kind(Experts, SPLIT),
    "k rows per token": Kind(
        lambda x: (x.view(x.shape[0] * 6, -1) @ WEIGHT).relu().view(x.shape[0], 6, -1), SPLIT, inputs=sequences
    ),
    "k rows per token, the batch inferred": Kind(
        lambda x: F.layer_norm(x.reshape(-1, WIDTH), (WIDTH,)).view(x.shape), SPLIT, inputs=sequences
    ),
    "masks that number tokens": Kind(
        numbered_mask,
        SPLIT,
        inputs=lambda: (integers(BATCH, 6, WIDTH), torch.arange(6) < torch.arange(1, 9)[:, None] % 6 + 1),
    ),
    "norms in evaluation": Kind(Norms, SPLIT, inputs=images),
    "convolution": Kind(Convolution, SPLIT, inputs=images),
    "embedding": Kind(lambda x, ids: F.embedding(ids, TABLE).sum(1) + x, SPLIT, inputs=tokens),
    "embedding bag of rows": Kind(
        lambda x, ids: F.embedding_bag(ids, TABLE, mode="sum") + x, SPLIT, aot=EITHER, inputs=tokens
    ),
    "embedding by index": Kind(lambda x, ids: TABLE[ids[:, 0]] * x, SPLIT, inputs=tokens),
    "own columns": Kind(own_columns, EITHER, inputs=tokens),
    "gather": Kind(lambda x, ids: x.gather(1, ids % WIDTH), SPLIT, inputs=tokens),
    "scatter": Kind(lambda x, ids: x.scatter(1, ids % WIDTH, 7.0), SPLIT, inputs=tokens),
    "one-hot": Kind(lambda x, ids: F.one_hot(ids, 10).sum(1) + 1, SPLIT, aot=EITHER, inputs=tokens),
    "einsum bij,bjk->bik": Kind(lambda x: torch.einsum("bij,bjk->bik", x, x), SPLIT, inputs=squares),
    "einsum bi,ij->bj": Kind(lambda x: torch.einsum("bi,ij->bj", x, WEIGHT), SPLIT),
    "einsum bi,bi->b": Kind(lambda x: torch.einsum("bi,bi->b", x, x + 1), SPLIT),
    "einsum bi,bj->bij": Kind(lambda x: torch.einsum("bi,bj->bij", x, x), SPLIT),
    "linalg.inv": Kind(torch.linalg.inv, SPLIT, aot=EITHER, inputs=squares),
    "linalg.solve": Kind(lambda x: torch.linalg.solve(x, x.transpose(1, 2)), SPLIT, aot=EITHER, inputs=squares),
    "linalg.det": Kind(torch.linalg.det, SPLIT, inputs=squares),
    "linalg.cholesky": Kind(lambda x: torch.linalg.cholesky(x @ x.mT), SPLIT, aot=EITHER, inputs=squares),
    "softmax and topk of each token": Kind(lambda x: x.softmax(-1).topk(2, -1), SPLIT),
    "safe softmax of each token": Kind(lambda x: torch._safe_softmax(x.masked_fill(x > 0, -torch.inf), -1), SPLIT),
    "sort, cumsum and roll of each token": Kind(lambda x: x.sort(dim=-1).values.cumsum(1).roll(1, 1).flip(1), SPLIT),
    "where with a mask of the batch": Kind(lambda x: torch.where(x[:, :1] > 0, x, -x), SPLIT),
    "masked fill": Kind(lambda x: x.masked_fill(x > 1, 0.0), SPLIT),
    "repeat_interleave of columns": Kind(lambda x: x.repeat_interleave(2, 1), SPLIT),
    "a flat view and back": Kind(lambda x: x.reshape(-1).sin().view(-1, WIDTH), SPLIT),
    "factories of the batch size": Kind(lambda x: x + torch.zeros(x.shape[0], 1) + x.new_ones(x.shape), SPLIT),
    "scan along the sequence": Kind(scan, SPLIT, inputs=sequences),
    "writes into columns": Kind(in_place, SPLIT),
    "cdist with a table": Kind(lambda x: torch.cdist(x, TABLE), SPLIT),
    "cdist of each token": Kind(lambda x: torch.cdist(x, x), SPLIT, inputs=sequences),
    "pairwise distance": Kind(lambda x: F.pairwise_distance(x, x + 1), SPLIT),
    "cosine similarity": Kind(lambda x: F.cosine_similarity(x, x + 1), SPLIT),
    "dropout in evaluation": Kind(lambda x: F.dropout(x, 0.5, training=False) * 2, SPLIT),
    "the batch in dimension 1": Kind(
        lambda x: x.softmax(0) @ WEIGHT, SPLIT, aot=EITHER, inputs=lambda: (integers(3, BATCH, WIDTH),), batch_dim=1
    ),
    "interpolate": Kind(lambda x: F.interpolate(x, scale_factor=2.0), SPLIT, inputs=images),
    "pixel shuffle": Kind(lambda x: F.pixel_shuffle(x, 2), SPLIT, inputs=images),
    "glu and chunks": Kind(lambda x: F.glu(x) + torch.cat(x.chunk(2, 1)[::-1], 1)[:, :2], SPLIT),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", KINDS)
def test_what_keeps_tokens_apart_is_split(name: str, level: str) -> None:
    check(KINDS[name], level)
