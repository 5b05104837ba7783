"""The kernel that runs an operator with its communication in chunks, as `comet` and `flux` use it."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from rounding import integers, with_integer_weights
from support import example
from torch import nn

from dynaflow_serving.capture.eager import EagerCapture
from dynaflow_serving.capture.eager.in_turn import InTurn
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.program import Resource
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.executor import get_executor
from dynaflow_serving.kernels.in_chunks import InChunks
from dynaflow_serving.session.forward import submit_gradient
from dynaflow_serving.session.plan_cache import PlanCache, no_context
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.rules import SplitFunc
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import whole
from dynaflow_serving.strategy.streams import CHUNKS
from dynaflow_serving.strategy.tags import Tag

WIDTH = 8
threads: list[str] = []


def exchange(x: torch.Tensor) -> torch.Tensor:
    """Stands for a collective."""
    threads.append(threading.current_thread().name)
    return x * 2


def gather(x: torch.Tensor) -> torch.Tensor:
    """Stands for a collective of the plan, which keeps its stream until the plan has ended."""
    return x * 3


def experts(module: nn.Module, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """An operator that communicates before and after it computes."""
    return exchange(module(exchange(x * scale[:, None])))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner = with_integer_weights(nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]))

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x + gather(experts(self.inner, gather(self.first(x)), scale + 1))


RULES = (
    SplitFunc(experts, "experts", Resource.COMPUTE, (Tag.EXPERTS,), "ep"),
    SplitFunc(exchange, "exchange", Resource.NETWORK, (), "ep"),
    SplitFunc(gather, "gather", Resource.NETWORK, (), "tp"),
)


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return integers(tokens, WIDTH), torch.randint(1, 3, (tokens,)).float()


class Chunked:
    """The model under a strategy that never splits."""

    def __init__(self, strategy: OpScheduler) -> None:
        self.model = Model()
        self.made = EagerCapture(self.model.forward, self.model, RULES, training=True)
        self.made.attach()
        with torch.no_grad():
            for tokens in (6, 8):
                self.made.record(tokens, inputs(tokens), {})
        assert self.made.captured is not None
        executor = get_executor("cpu")
        self.made.captured.in_turn = InTurn(self.made.borders.by_target, executor.submit_to(CHUNKS))
        self.plan_cache = PlanCache(self.made.captured, FixedStrategy(strategy), executor)

    def __call__(self, *args: torch.Tensor) -> torch.Tensor:
        split = whole(Batch((1,) * len(args[0])), "")
        plan = self.plan_cache.prepare(split.signature)
        apart = self.made.calls_apart(plan.plan, functools.partial(submit_gradient, self.plan_cache))
        result: torch.Tensor = self.made.run(plan.run, split.bounds, args, {}, no_context, apart=apart)
        return result

    def gradients(self, forward: Any, x: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        self.model.zero_grad()
        x = x.clone().requires_grad_()
        result = forward(x, scale)
        (result * torch.arange(len(x))[:, None]).sum().backward()
        return [result.detach(), *(p.grad for p in (x, *self.model.parameters()) if p.grad is not None)]


def comet(chunks: int) -> OpScheduler:
    cls = get_strategy("comet")
    return cls(cls.Options(chunks=chunks))


@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_results_and_gradients_equal(chunks: int) -> None:
    chunked = Chunked(comet(chunks))
    for tokens in (5, 7, 12):
        args = inputs(tokens)
        wanted = chunked.gradients(chunked.model, *args)
        threads.clear()
        found = chunked.gradients(chunked, *args)
        assert len(found) == len(wanted) == 6
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))
        assert threads == ["dynaflow-chunks"] * 2 * chunks


def test_fewer_rows_than_chunks_run_as_they_are() -> None:
    chunked, args = Chunked(comet(5)), inputs(3)
    threads.clear()
    assert torch.equal(chunked(*args), chunked.model(*args))
    assert threads == [threading.main_thread().name] * 4


def test_an_error_in_a_chunk_reaches_the_caller_and_ends_the_others() -> None:
    chunked = Chunked(comet(2))
    handle = chunked.model.inner.register_forward_pre_hook(lambda module, args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        chunked(*inputs(4))
    handle.remove()
    args = inputs(4)
    assert torch.equal(chunked(*args), chunked.model(*args))


class CutsAll(OpScheduler):
    """Cuts every operator."""

    name = "cuts_all"
    schedules_unsplit = True

    def split(self, batch: Batch) -> Split:
        return whole(batch, "")

    def schedule(self, s: Schedule) -> None:
        kernel = InChunks(2)
        while ready := s.get_ready_ops():
            s.execute(ready[0], replace=kernel)


def test_a_graph_has_no_operators_that_can_be_cut() -> None:
    capture = example("llama")
    plan_cache = PlanCache(capture, FixedStrategy(CutsAll()), get_executor("cpu"))
    with pytest.raises(ScheduleError, match=r"in_chunks\[2,dim=0\] cannot cut .* only a model without a graph"):
        plan_cache.prepare(whole(Batch((4, 4)), "").signature)
