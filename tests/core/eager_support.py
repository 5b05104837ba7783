"""A model with borders, and how the tests of the eager front-end record and run it.

All its values are whole numbers, so that split and whole are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rounding import integers, with_integer_weights
from support import AddNorm
from torch import nn

from dynaflow_serving.capture.eager import EagerCapture
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.core.program import Resource
from dynaflow_serving.executor import get_executor
from dynaflow_serving.session.plan_cache import PlanCache, no_context
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.rules import Rule, SplitFunc, SplitModule
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import cut_evenly

WIDTH = 8


def reduce(x: torch.Tensor) -> torch.Tensor:
    """Stands for an all-reduce over two equal ranks."""
    return x * 2


class Cache:
    """A KV cache: what each micro-batch has appended, in the order of execution."""

    def __init__(self) -> None:
        self.sizes: list[int] = []


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-1, 2, (WIDTH, WIDTH)).float())
        self.cache = Cache()

    def forward(self, x: torch.Tensor, step: object = None) -> torch.Tensor:
        self.cache.sizes.append(len(x))
        return (x @ self.weight).clamp(-4, 4)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o_proj, self.up = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.attention, self.norm1, self.norm2 = Attention(), AddNorm(WIDTH), AddNorm(WIDTH)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, step: object) -> tuple[torch.Tensor, torch.Tensor]:
        x = reduce(self.o_proj(self.attention(self.qkv(x), step=step)))
        x, residual = self.norm1(x, residual)
        out: tuple[torch.Tensor, torch.Tensor] = self.norm2(reduce(torch.relu(self.up(x))), residual)
        return out


class Model(nn.Module):
    """The residual passes from layer to layer; `step` is an object that is new in each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = with_integer_weights(nn.ModuleList([Layer(), Layer()]))

    def forward(self, x: torch.Tensor, scale: torch.Tensor, step: object = None) -> torch.Tensor:
        x = residual = x * scale[:, None]
        for layer in self.layers:
            x, residual = layer(x, residual, step)
        return x


RULES: tuple[Rule, ...] = (
    SplitModule("Attention", "attention", Resource.MEMORY, ("attention",), context=True),
    SplitFunc(reduce, "all_reduce", Resource.NETWORK, ("all_reduce",), group="tp"),
)
NORM = SplitModule(AddNorm, "norm")


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return integers(tokens, WIDTH), torch.randint(1, 3, (tokens,)).float()


def recorded(
    model: nn.Module, rules: tuple[Rule, ...], make: Callable[[int], tuple[Any, ...]] = inputs
) -> EagerCapture:
    made = EagerCapture(model.forward, model, rules, {"attention": "kv"})
    made.attach()
    for tokens in (6, 8):
        made.record(tokens, make(tokens), {})
    return made


class Run:
    """A recorded model under a strategy."""

    def __init__(self, made: EagerCapture, strategy: OpScheduler, executor: str = "sequential") -> None:
        assert made.captured is not None
        self.made, self.plan_cache = made, PlanCache(made.captured, FixedStrategy(strategy), get_executor(executor))

    def __call__(self, micro_batches: int, *args: torch.Tensor) -> torch.Tensor:
        split = cut_evenly(Batch((1,) * len(args[0])), micro_batches)
        plan = self.plan_cache.prepare(split.signature).run
        result: torch.Tensor = self.made.run(plan, split.bounds, args, {}, no_context, None)
        return result


def strategy(name: str, **options: Any) -> OpScheduler:
    cls = get_strategy(name)
    return cls(cls.Options(**options))
