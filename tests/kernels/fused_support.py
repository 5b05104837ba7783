"""Models for the tests of `fused_norms`: a small Llama in plain torch, and what is nearly its norm or activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, LAYERS, EPS = 24, 2, 1e-5


class DecomposedNorm(nn.Module):
    """RMSNorm as Transformers writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        dtype = hidden.dtype
        hidden = hidden.to(torch.float32)
        variance = hidden.pow(2).mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(variance + EPS)
        return self.weight * hidden.to(dtype)


class CalledNorm(DecomposedNorm):
    """RMSNorm as one call."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, (WIDTH,), self.weight, EPS)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Layer(nn.Module):
    def __init__(self, norm: type[DecomposedNorm]) -> None:
        super().__init__()
        self.input_norm, self.post_norm = norm(), norm()
        self.attention, self.mlp = nn.Linear(WIDTH, WIDTH, bias=False), MLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.input_norm(x))
        out: torch.Tensor = x + self.mlp(self.post_norm(x))
        return out


class Llama(nn.Module):
    """Its first norm follows no addition, the others do: 2 * LAYERS of those, and LAYERS activations."""

    def __init__(self, norm: type[DecomposedNorm] = DecomposedNorm, layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.norm = nn.ModuleList(Layer(norm) for _ in range(layers)), norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.norm(x)
        return out


class Bodies(nn.Module):
    """x, a residual and a weight through each of `bodies`, beside a SiLU-mul that a kernel can compute."""

    def __init__(self, *bodies: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bodies, self.mlp = bodies, MLP()
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        residual, results = self.proj(x), [self.mlp(x)]
        for body in self.bodies:
            found = body(x, residual, self.weight)
            results += found if isinstance(found, tuple) else (found,)
        return tuple(results)


def _norm(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS) * weight


def eps_outside(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    total = x + r
    return total * (torch.rsqrt(total.pow(2).mean(-1, keepdim=True)) + EPS) * w


def mean_subtracted(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    total = x + r
    total = total - total.mean(-1, keepdim=True)
    return _norm(total, w)


def layer_norm(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x + r, (WIDTH,), w, None, EPS)


def sum_of_squares(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    total = x + r
    return total * torch.rsqrt(total.pow(2).sum(-1, keepdim=True) + EPS) * w


def other_axis(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    total = x + r
    return total * torch.rsqrt(total.pow(2).mean(1, keepdim=True) + EPS) * w


def cubed(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    total = x + r
    return total * torch.rsqrt(total.abs().pow(3).mean(-1, keepdim=True) + EPS) * w


def scale_of_another(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    total = x + r
    return total * torch.rsqrt(r.pow(2).mean(-1, keepdim=True) + EPS) * w


def scaled_residual(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return _norm(torch.add(x, r, alpha=2), w)


def broadcast_residual(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return _norm(x + r[:, :1], w)


def weight_of_two_axes(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return _norm(x + r, torch.stack([w] * x.shape[1]))


def variance_used_elsewhere(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    total = x + r
    variance = total.pow(2).mean(-1, keepdim=True)
    return total * torch.rsqrt(variance + EPS) * w, variance


def default_epsilon(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x + r, (WIDTH,), w)


def no_weight(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x + r, (WIDTH,), None, EPS)


def double_precision(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return _norm((x + r).double(), w.double()).float()


def written_in_between(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    total = x + r
    wide = total.float()
    total.mul_(2)
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * w + total


def needed_in_between(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    total = x + r
    square = total.square()
    other = total @ torch.stack([w] * WIDTH)
    return total * torch.rsqrt(square.mean(-1, keepdim=True) + EPS) * w, other


def not_contiguous(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    total = x.transpose(1, 2).contiguous().transpose(1, 2) + r.transpose(1, 2).contiguous().transpose(1, 2)
    return _norm(total, w)


def silu_of_the_product(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.silu(x * r)


def silu_used_elsewhere(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    active = F.silu(x)
    return active * r, active


def silu_in_place(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    gate = x + 1
    return F.silu(gate, inplace=True) * r + gate


def gelu(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.gelu(x) * r


def silu_times_a_vector(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.silu(x) * w


NEAR_MISSES = (
    eps_outside, mean_subtracted, layer_norm, sum_of_squares, other_axis, cubed, scale_of_another, scaled_residual,
    broadcast_residual, weight_of_two_axes, variance_used_elsewhere, default_epsilon, no_weight, double_precision,
    written_in_between, needed_in_between, not_contiguous, silu_of_the_product, silu_used_elsewhere, silu_in_place,
    gelu, silu_times_a_vector,
)  # fmt: skip


def norm_in_half(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return _norm(x + r, w)


def sum_in_float32(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    total = x.float() + r.float()
    return (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * w


def weight_in_float32(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return _norm((x + r).float(), w.float()).to(x.dtype)


def not_rounded(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return _norm((x + r).float(), w)


def silu_in_float32(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (F.silu(x.float()) * r).to(x.dtype)


NEAR_MISSES_IN_HALF = (norm_in_half, sum_in_float32, weight_in_float32, not_rounded, silu_in_float32)


def norm_of_a_sum(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return _norm(x + r, w)


def sum_used_elsewhere(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    total = x + r
    return _norm(total, w), total * 2, r - 1


def two_norms_of_a_sum(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    total = x + r
    return _norm(total, w), _norm(total, w + 1)


def sum_of_one(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return _norm(r + r, w)


def other_spellings(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    wide = torch.add(r, x).float()
    mean = torch.mean(wide * wide, dim=-1, keepdim=True)
    return wide.mul(mean.add(EPS).rsqrt()).type_as(r) * w


def apart(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    total = x + r
    square = total.square()
    other = x @ torch.stack([w] * WIDTH)  # an operator in the middle of the match
    return total * torch.rsqrt(square.mean(-1, keepdim=True) + EPS) * w, other


def written_later(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    total = x + r
    normed = _norm(total, w)
    return normed, total.mul_(2)


FUSED = (norm_of_a_sum, sum_used_elsewhere, two_norms_of_a_sum, sum_of_one, other_spellings, apart, written_later)
