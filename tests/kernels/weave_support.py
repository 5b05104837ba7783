"""A tensor-parallel model for two processes, and what the tests of TokenWeave run in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives as funcol
from two_ranks import RANKS

from dynaflow_serving import compile
from dynaflow_serving.core.plan import ActionKind
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels import shard_tokens
from dynaflow_serving.strategies.token_weave import TokenWeave, TokenWeaveOptions

HIDDEN, LAYERS = 8, 3
CASES = {"threads": ("cpu", False), "poisoned": ("sequential", False), "in place": ("cpu", True)}


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Layer(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        rank = dist.get_rank()
        self.norm, self.in_place = RMSNorm(), in_place
        up, down = torch.randn(4 * HIDDEN, HIDDEN), torch.randn(HIDDEN, 4 * HIDDEN)
        self.up = nn.Parameter(up.chunk(RANKS)[rank].clone())
        self.down = nn.Parameter(down.chunk(RANKS, 1)[rank].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm(x) @ self.up.t()) @ self.down.t()
        reduced = funcol.all_reduce(h, "sum", dist.group.WORLD)
        if self.in_place:  # what torch.distributed.all_reduce is traced to, and so Transformers' tensor parallelism
            reduced = h.copy_(reduced)
        return x + reduced


class Model(nn.Module):
    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(in_place) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def options() -> TokenWeaveOptions:
    return TokenWeaveOptions(min_tokens=2, tile=1)


def weave(counts: list[int], executor: str, in_place: bool) -> dict[str, torch.Tensor]:
    """The model with and without TokenWeave, for each number of tokens; and the number of collectives it took."""
    sent = {"reduce_scatter": 0, "all_gather": 0}
    for name in sent:
        original = getattr(shard_tokens, name)

        def counted(*args: object, name: str = name, original: Callable[..., object] = original) -> object:
            sent[name] += 1
            return original(*args)

        setattr(shard_tokens, name, counted)
    model = Model(in_place)
    level: Literal["dynamo", "aot"] = "aot" if in_place else "dynamo"
    compiled = compile(model, TokenWeave(options()), executor=executor, level=level)
    results: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for tokens in counts:
            x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
            before = dict(sent)
            results[f"{tokens}.got"] = compiled(x)
            results[f"{tokens}.sent"] = torch.tensor([sent[k] - before[k] for k in sent])
            results[f"{tokens}.expected"] = model(x)
    (plan_cache,) = compiled.session.plan_caches
    (plan,) = (p for p in plan_cache.plans if p.micro_batches == 2)
    replaced = [s for s in plan.actions if s.kind is ActionKind.REPLACE]
    assert {(s.kernel, s.stream) for s in replaced} == {("shard_tokens", "network")}
    assert not [s for s in plan.actions if s.kind is ActionKind.RUN and s.operators[0].endswith("all_reduce")]
    results["replaced"] = torch.tensor(len(replaced))
    results["split"] = torch.tensor(compiled.session.counts.split)
    return results


def weave_all(counts: list[int]) -> dict[str, torch.Tensor]:
    results: dict[str, torch.Tensor] = {}
    for case, (executor, in_place) in CASES.items():
        results |= {f"{case}.{k}": v for k, v in weave(counts, executor, in_place).items()}
    return results


def said(model: nn.Module, grad: bool = False) -> torch.Tensor:
    """The `ScheduleError` of the first call, as bytes."""
    try:
        with torch.set_grad_enabled(grad):
            compile(model, TokenWeave(options()))(torch.ones(12, HIDDEN))
    except ScheduleError as e:
        return torch.tensor(list(str(e).encode()))
    return torch.tensor([], dtype=torch.int64)


def refused() -> dict[str, torch.Tensor]:
    """What is said of: weights of a norm that differ between ranks; in-place collectives; gradients."""
    unequal = Model()
    with torch.no_grad():
        unequal.layers[1].norm.weight += dist.get_rank()
    return {
        "unequal": said(unequal),
        "in_place": said(Model(in_place=True)),
        "gradients": said(Model(), grad=True),
    }
