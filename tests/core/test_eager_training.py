"""Gradients through split steps of the eager front-end: equal, in the order of the mirrored plan, and overlapped."""

from __future__ import annotations

import functools
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
from dynaflow_serving.core.batch import Batch, Signature
from dynaflow_serving.core.parse import parse_program
from dynaflow_serving.core.plan import COMPUTE_STREAM
from dynaflow_serving.core.program import Gradient, Resource
from dynaflow_serving.errors import DynaflowError, ScheduleError
from dynaflow_serving.executor import get_executor
from dynaflow_serving.planning.mirror import backward_program
from dynaflow_serving.session.forward import submit_gradient
from dynaflow_serving.session.plan_cache import PlanCache, no_context
from dynaflow_serving.simulate.cost import MeasuredCosts, backward_seconds
from dynaflow_serving.simulate.engine import simulate
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


def copy_in(x: torch.Tensor, name: str) -> torch.Tensor:
    """Stands for what is an identity forward, and a collective backward."""
    return Watched.apply(x, name)


RULES = (
    SplitFunc(exchange, "exchange", Resource.NETWORK, ("all_reduce",), group="tp"),
    SplitFunc(copy_in, "copy", gradient=Gradient(Resource.NETWORK, "tp")),
)


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.up, self.down, self.number = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(copy_in(x, f"copy.{self.number}")))
        hidden = exchange(Watched.apply(hidden, f"up.{self.number}"), f"exchange.{self.number}")
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

    def __init__(self, strategy: OpScheduler, executor: str = "cpu", model: nn.Module | None = None) -> None:
        self.model = model or Model()
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
        apart = self.made.calls_apart(plan.plan, functools.partial(submit_gradient, self.plan_cache))
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
@pytest.mark.parametrize("name", ["sequential", "nanoflow", "comm_overlap", "dual_batch", "round_robin"])
def test_gradients_equal(name: str, executor: str) -> None:
    training = Training(strategy(name), executor)
    for tokens, micro_batches in ((2, 2), (7, 2), (9, 3)):
        x = integers(tokens, WIDTH)
        wanted = training.gradients(training.model, x)
        found = training.gradients(lambda x, n=micro_batches: training.split(x, n), x)
        assert len(found) == len(wanted) == 10
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize("name", ["nanoflow", "comm_overlap", "dual_batch", "round_robin"])
def test_autograd_follows_the_mirrored_plan(name: str) -> None:
    training = Training(strategy(name))
    training.gradients(lambda x: training.split(x, 2), integers(7, WIDTH))
    ((program, plan),) = training.plan_cache.backward.values()
    sizes, threads = {0: 3, 1: 4}, {COMPUTE_STREAM: threading.current_thread().name}
    planned: dict[str, list[Seen]] = {stream: [] for stream in plan.streams}
    watched = [None, "copy.0", "up.0", "exchange.0", None, "copy.1", "up.1", "exchange.1", None]  # in forward order
    names = dict(zip([op.name for op in reversed(program.operators)], watched, strict=True))
    for action in plan.actions:
        if action.operators and (name := names[action.operators[0]]):
            thread = threads.get(action.stream, f"dynaflow-{action.stream}")
            planned[action.stream].append((name, thread, sizes[action.start]))
    assert set(planned) == {COMPUTE_STREAM, "network"}
    for stream, wanted in planned.items():
        ran = [seen for seen in Watched.seen if seen[1] == wanted[0][1]]
        assert ran == wanted, stream


@pytest.mark.parametrize(("name", "hidden"), [("sequential", 0.0), ("nanoflow", 2.0)])
def test_a_backward_pass_is_predicted_from_the_times_of_the_forward_pass(name: str, hidden: float) -> None:
    training = Training(strategy(name))
    training.split(integers(8, WIDTH), 2)
    ((program, plan),) = training.plan_cache.backward.values()
    forward = training.plan_cache.captured.program
    seconds = {
        (op.name, micro_batch): 1.0 if op.resource is Resource.NETWORK else 0.5
        for op in forward.operators
        for micro_batch in (0, 1)
    }
    total = 8 * 1.0 + 5.0  # two layers, of which `copy` sends backward only, and `exchange` both ways; and the compute
    found = backward_seconds(forward, seconds, total)
    assert {key[0]: s for key, s in found.items() if s == 1.0}.keys() == {
        op.name for op in program.operators if op.resource is Resource.NETWORK
    }
    assert sum(found.values()) == pytest.approx(total)
    makespan = simulate(plan, MeasuredCosts(program, found).demands(plan)).makespan
    assert makespan == pytest.approx(total) if name == "sequential" else makespan <= total - hidden


def test_the_gradient_of_a_call_runs_beside_the_other_micro_batch() -> None:
    training = Training(strategy("nanoflow"))
    computed = threading.Event()

    def told(name: str, tokens: int) -> None:
        if name == "up.1" and tokens == 3:
            computed.set()
        if name == "copy.1" and tokens == 4:  # it starts before the other micro-batch's gradients are there
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


class BackToBack(nn.Module):
    """Collectives one after the other, with no code of the model between, and at both ends."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = with_integer_weights(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = exchange(copy_in(exchange(x, "first"), "second"), "third")
        return exchange(copy_in(self.inner(hidden), "fourth"), "fifth")


@pytest.mark.parametrize("name", ["sequential", "nanoflow", "comm_overlap", "round_robin"])
def test_gradients_equal_where_nothing_lies_between_collectives(name: str) -> None:
    training = Training(strategy(name), model=BackToBack())
    x = integers(7, WIDTH)
    wanted = training.gradients(training.model, x)
    found = training.gradients(lambda x: training.split(x, 2), x)
    assert len(found) == len(wanted) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


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


def test_collectives_of_several_micro_batches_cannot_be_merged() -> None:
    training = Training(Merged())
    with pytest.raises(ScheduleError, match=r"layers\.0\.exchange cannot run merged"):
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


def test_the_text_of_a_program_says_where_its_gradients_run() -> None:
    program = Training(strategy("nanoflow")).plan_cache.captured.program
    assert "op layers.0.copy compute gradient=network:tp\n" in program.to_text()
    assert parse_program(program.to_text()) == program
    backward = backward_program(program)
    kinds = {op.name: (op.resource, op.group) for op in backward.operators}
    assert kinds["layers.0.copy.backward"] == kinds["layers.0.exchange.backward"] == (Resource.NETWORK, "tp")
    assert kinds["layers.0.compute.0.backward"] == (Resource.COMPUTE, "")
    assert parse_program(backward.to_text()) == backward


def test_round_robin_has_a_block_between_the_turns_of_a_micro_batch() -> None:
    """In both passes, in the steady state: whoever waits for a collective has let another one's block run before."""
    training = Training(strategy("round_robin"))
    training.gradients(lambda x: training.split(x, 3), integers(9, WIDTH))
    ((_, backward),) = training.plan_cache.backward.values()
    forward = training.plan_cache.prepare(Signature(3)).plan
    begins, ends = ("layers.0.exchange", "layers.1.copy"), ("layers.0.compute.1", "layers.0.compute.1")
    for plan, first, last in zip((forward, backward), begins, ends):
        actions = [(a.operators[0].removesuffix(".backward"), a.start) for a in plan.actions if a.operators]
        for micro_batch in range(3):
            begun, ended = actions.index((first, micro_batch)), actions.index((last, micro_batch))
            between = {name for name, other in actions[begun:ended] if other != micro_batch}
            assert any(name.endswith(".compute.0") for name in between), (plan.strategy, micro_batch)
