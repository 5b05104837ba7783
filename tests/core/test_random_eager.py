"""Random models through the eager front-end: split equals whole, on every executor and under every order."""

from __future__ import annotations

import random
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import AddNorm
from torch import nn

from dynaflow_serving.capture.eager import EagerCapture
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.core.program import Resource
from dynaflow_serving.executor import get_executor
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.session.plan_cache import no_context
from dynaflow_serving.strategy.rules import SplitFunc, SplitModule
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.splitting import cut_evenly

WIDTH = 4


class Attend(nn.Module):
    """With context: it also takes an object."""

    def forward(self, x: torch.Tensor, step: object) -> torch.Tensor:
        return x.clamp(-1, 1)


class InPlace(nn.Module):
    """Writes its argument and returns it, as engines' all-reduces do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(0.5)


def reduce(x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
    return x * scale


class RandomModel(nn.Module):
    """A few values, and steps that read and replace them; elementwise, and every function rounds in one
    way only, so that split is bit-equal to whole."""

    KINDS = ("attend", "norm", "reduce", "in_place", "code", "view", "swap", "keep")

    def __init__(self, seed: int, size: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.steps = [(draw.choice(self.KINDS), draw.randrange(3), draw.randrange(3)) for _ in range(size)]
        self.attend, self.in_place = Attend(), InPlace()
        self.norm = AddNorm(WIDTH)
        self.result = draw.randrange(3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = [x, y + 0, x - y]
        for kind, i, j in self.steps:
            if kind == "attend":
                values[i] = self.attend(values[j], step=object())
            elif kind == "norm":
                values[i], values[j] = self.norm(values[i], values[j])
            elif kind == "reduce":
                values[i] = reduce(values[j], scale=0.5)
            elif kind == "in_place":
                values[i] = self.in_place(values[i].clone())
            elif kind == "code":
                values[i] = values[i].abs() + values[j]
            elif kind == "view":
                values[i] = values[j].view(-1, WIDTH)
            elif kind == "swap":
                values[i], values[j] = values[j], values[i]
            else:
                values[j] = values[i]
        return values[self.result], values[0] * 1


RULES = (
    SplitModule(Attend, "attention", Resource.MEMORY, context=True, required=False),
    SplitModule(AddNorm, "norm", required=False),
    SplitModule(InPlace, "in_place", Resource.NETWORK, group="tp", required=False),
    SplitFunc(reduce, "reduce", Resource.NETWORK, group="tp", required=False),
)


def record_random_order(schedule: Schedule, draw: random.Random, streams: bool) -> Schedule:
    while ready := schedule.get_ready_ops():
        task = draw.choice(ready)
        side = streams and task.resource is Resource.NETWORK and not task.operator.context
        schedule.execute(task, stream="network" if side else "compute")
    return schedule


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(0, 12),
    n=st.integers(2, 3),
    executor=st.sampled_from(["cpu", "sequential"]),
)
def test_split_equals_whole(seed: int, size: int, n: int, executor: str) -> None:
    model = RandomModel(seed, size)
    made = EagerCapture(model.forward, model, RULES, {"attention": "kv"})
    made.attach()

    def inputs(tokens: int) -> tuple[Any, ...]:
        return torch.randn(tokens, WIDTH), torch.randn(tokens, WIDTH)

    with torch.no_grad():
        for tokens in (5, 8):
            made.record(tokens, inputs(tokens), {})
        assert made.captured is not None, made.waiting
        program = made.captured.program
        assert not program.unsplittable
        schedule = record_random_order(Schedule(program, n), random.Random(seed), executor == "cpu")
        plan = lower(schedule, "random")
        verify(program, plan)
        run = get_executor(executor).bind(made.captured, plan, {})
        x, y = inputs(7)
        want = model.forward(x.clone(), y.clone())
        got = made.run(run, cut_evenly(Batch((1,) * 7), n).bounds, (x, y), {}, no_context)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)
