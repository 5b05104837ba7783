"""Gradients through split steps of the eager front-end: equal, in the order of the mirrored plan, and overlapped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from eager_support import WIDTH
from rounding import integers, with_integer_weights
from torch import nn

from dynaflow_serving.capture.eager import EagerCapture
from dynaflow_serving.capture.eager.gradients import Crossing, join_gradients
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.core.plan import COMPUTE_STREAM
from dynaflow_serving.core.program import Resource
from dynaflow_serving.errors import DynaflowError, ScheduleError
from dynaflow_serving.executor import get_executor
from dynaflow_serving.session.plan_cache import PlanCache, no_context
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.rules import SplitFunc
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import cut_evenly

Seen = tuple[str, str, int]  # the operator whose backward ran, its thread, and the size of its micro-batch


class Watched(torch.autograd.Function):
    """An identity that tells when its gradient is taken."""

    seen: list[Seen] = []
    told: Callable[[str, int], None] = staticmethod(lambda name, tokens: None)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        Watched.seen.append((ctx.name, threading.current_thread().name, len(gradient)))
        Watched.told(ctx.name, len(gradient))
        return gradient, None


def exchange(x: torch.Tensor, name: str) -> torch.Tensor:
    """Stands for a collective; the gradient is one, too."""
    return Watched.apply(x, name) * 2


RULES = (SplitFunc(exchange, "exchange", Resource.NETWORK, ("all_reduce",), group="tp"),)


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.up, self.down, self.number = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = exchange(Watched.apply(torch.relu(self.up(x)), f"up.{self.number}"), f"exchange.{self.number}")
        return x + self.down(hidden)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = with_integer_weights(nn.ModuleList([Layer(0), Layer(1)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Training:
    """A recorded model under a strategy, as a training loop runs it."""

    def __init__(self, strategy: OpScheduler, executor: str = "cpu") -> None:
        self.model = Model()
        self.made = EagerCapture(self.model.forward, self.model, RULES, training=True)
        self.made.attach()
        with torch.no_grad():
            for tokens in (6, 8):
                self.made.record(tokens, (integers(tokens, WIDTH),), {})
        assert self.made.captured is not None
        self.executor = get_executor(executor)
        self.plan_cache = PlanCache(self.made.captured, FixedStrategy(strategy), self.executor)

    def split(self, x: torch.Tensor, micro_batches: int) -> torch.Tensor:
        split = cut_evenly(Batch((1,) * len(x)), micro_batches)
        plan = self.plan_cache.prepare(split.signature)
        apart = self.made.calls_apart(plan.plan, self.executor.submit_to)
        result: torch.Tensor = self.made.run(plan.run, split.bounds, (x,), {}, no_context, apart=apart)
        return result

    def gradients(self, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
        self.model.zero_grad()
        x = x.clone().requires_grad_()
        result = forward(x)
        (result * torch.arange(len(x))[:, None]).sum().backward()
        found = [p.grad for p in (x, *self.model.parameters())]
        return [result.detach(), *(g for g in found if g is not None)]


@pytest.fixture(autouse=True)
def unwatched() -> Iterator[None]:
    Watched.seen = []
    yield
    Watched.told = staticmethod(lambda name, tokens: None)


def strategy(name: str) -> OpScheduler:
    cls = get_strategy(name)
    return cls(cls.Options(min_tokens=1) if "min_tokens" in cls.Options.model_fields else None)


@pytest.mark.parametrize("executor", ["cpu", "sequential"])
@pytest.mark.parametrize("name", ["sequential", "nanoflow", "comm_overlap", "dual_batch"])
def test_gradients_equal(name: str, executor: str) -> None:
    training = Training(strategy(name), executor)
    for tokens, micro_batches in ((2, 2), (7, 2), (9, 3)):
        x = integers(tokens, WIDTH)
        wanted = training.gradients(training.model, x)
        found = training.gradients(lambda x, n=micro_batches: training.split(x, n), x)
        assert len(found) == len(wanted) == 10
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize("name", ["nanoflow", "comm_overlap", "dual_batch"])
def test_autograd_follows_the_mirrored_plan(name: str) -> None:
    training = Training(strategy(name))
    training.gradients(lambda x: training.split(x, 2), integers(7, WIDTH))
    ((program, plan),) = training.plan_cache.backward.values()
    sizes, threads = {0: 3, 1: 4}, {COMPUTE_STREAM: threading.current_thread().name}
    planned: dict[str, list[Seen]] = {stream: [] for stream in plan.streams}
    numbers = {"layers.0.exchange": 0, "layers.1.exchange": 1}
    sections = [o.name for o in program.operators if "exchange" not in o.name]
    for action in plan.actions:
        if not action.operators:
            continue
        operator, thread = action.operators[0], threads.get(action.stream, f"dynaflow-{action.stream}")
        forward = operator.removesuffix(".backward")
        if forward in numbers:
            planned[action.stream].append((f"exchange.{numbers[forward]}", thread, sizes[action.start]))
        elif (position := len(sections) - 1 - sections.index(operator)) < 2:  # the last section has no `up`
            planned[action.stream].append((f"up.{position}", thread, sizes[action.start]))
    assert set(planned) == {COMPUTE_STREAM, "network"}
    for stream, wanted in planned.items():
        ran = [seen for seen in Watched.seen if seen[1] == wanted[0][1]]
        assert ran == wanted, stream


def test_the_gradient_of_a_call_runs_beside_the_other_micro_batch() -> None:
    training = Training(strategy("nanoflow"))
    computed = threading.Event()

    def told(name: str, tokens: int) -> None:
        if name == "up.1" and tokens == 3:
            computed.set()
        if name == "exchange.0" and tokens == 4:  # it starts before the other micro-batch's gradients are there
            assert computed.wait(20), "the backward pass waits for the collective at once"

    Watched.told = staticmethod(told)
    training.gradients(lambda x: training.split(x, 2), integers(7, WIDTH))


def test_an_error_in_the_gradient_of_a_call_reaches_the_caller() -> None:
    training = Training(strategy("nanoflow"))

    def told(name: str, tokens: int) -> None:
        if name == "exchange.1" and tokens == 4:
            raise RuntimeError("connection closed by peer")

    Watched.told = staticmethod(told)
    with pytest.raises(RuntimeError, match="connection closed by peer"):
        training.gradients(lambda x: training.split(x, 2), integers(7, WIDTH))
    Watched.told = staticmethod(lambda name, tokens: None)
    x = integers(7, WIDTH)
    wanted = training.gradients(training.model, x)
    assert all(torch.equal(a, b) for a, b in zip(training.gradients(lambda x: training.split(x, 2), x), wanted))


def test_a_second_backward_is_refused() -> None:
    training = Training(strategy("nanoflow"))
    result = training.split(integers(7, WIDTH).requires_grad_(), 2).sum()
    result.backward(retain_graph=True)
    with pytest.raises(DynaflowError, match="call backward once per forward"):
        result.backward()


def test_without_gradients_nothing_crosses() -> None:
    training = Training(strategy("nanoflow"))
    x = integers(7, WIDTH)
    with torch.no_grad():
        assert torch.equal(training.split(x, 2), training.model(x))
    assert not training.split(x, 2).is_leaf  # the weights have gradients, the first call's argument too


class Merged(OpScheduler):
    """Runs the collectives of both micro-batches at once, on the network's stream."""

    name = "merged"

    def split(self, batch: Batch) -> Any:
        return cut_evenly(batch, 2)

    def schedule(self, s: Schedule) -> None:
        for op in s.program.operators:
            tasks = [t for t in s.get_ready_ops() if t.name == op.name]
            for group in [tasks] if op.resource is Resource.NETWORK else [[t] for t in tasks]:
                s.execute(group)


def test_a_merged_call_on_another_stream_is_refused() -> None:
    training = Training(Merged())
    with pytest.raises(ScheduleError, match=r"layers\.0\.exchange runs for several micro-batches at once"):
        training.split(integers(7, WIDTH), 2)


def test_a_border_outside_of_frames_waits_for_gradients_in_flight() -> None:
    """As where a layer is recomputed in the backward pass: its collective must not overtake those in flight."""
    executor, order = get_executor("cpu"), []
    release = threading.Event()

    def told(name: str, tokens: int) -> None:
        order.append(name)
        assert release.wait(20)

    Watched.told = staticmethod(told)
    crossing = Crossing(executor.submit_to("network"))
    (x,), _ = crossing.leave((integers(3, WIDTH).requires_grad_(),), {})
    result = crossing.arrive(Watched.apply(x, "in flight"))
    crossing.start((torch.ones_like(result),))
    threading.Timer(0.2, release.set).start()
    join_gradients()
    order.append("recomputed")
    assert order == ["in flight", "recomputed"] and release.is_set()
    crossing.wait()
