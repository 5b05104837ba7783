"""The CUDA executor with a stand-in for torch.cuda: issue order, streams by name, events, errors, options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_standin import FakeCuda, FakeEvent, FakeStream
from support import IN_PLACE, TWO_STREAMS, arguments, example, lowered, manual, program_of, without

from dynaflow_serving.capture.examples import HIDDEN, example_capture
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.config import ExecutorOptions, load
from dynaflow_serving.core.plan import ActionKind, Plan
from dynaflow_serving.errors import ConfigError, InactiveError, ScheduleError
from dynaflow_serving.executor import get_executor
from dynaflow_serving.executor.cpu import CPUExecutor
from dynaflow_serving.executor.cuda import CUDAExecutor
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.session.plan_cache import no_context
from dynaflow_serving.session.session import Session
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.torch_backend import compile


def bound(cuda: FakeCuda, streams: dict[str, Any] | None = None, bump: Any = lambda y: None) -> Any:
    program = program_of(IN_PLACE)
    executor = CUDAExecutor(ExecutorOptions(streams=streams or {}), cuda)
    capture = manual(program, make=torch.clone, bump=bump, read=torch.clone)
    return executor.bind(capture, lowered(program, 1, *TWO_STREAMS), {})


def issued(plan: Plan, streams: dict[str, str]) -> list[tuple[Any, ...]]:
    """What the CUDA executor must issue for `plan`."""
    log: list[tuple[Any, ...]] = []
    for s in plan.actions:
        if s.kind in (ActionKind.RECORD, ActionKind.WAIT):
            log.append((s.kind.value, streams[s.stream], s.event))
        elif s.kind is ActionKind.RUN:
            log.append(("run", streams[s.stream], s.operators[0]))
    return log


@pytest.mark.parametrize("strategy", ["sequential", "nanoflow", "dual_batch"])
def test_the_plan_is_issued_in_order(strategy: str) -> None:
    cuda = FakeCuda()
    capture = example_capture("moe")
    plan = lower(get_strategy(strategy)().record(capture.program, 2), strategy)

    def noting(name: str, fn: Any) -> Any:
        def call(*args: Any) -> Any:
            cuda.log.append(("run", cuda.active.name, name))
            return fn(*args)

        return call

    capture.functions = {n: noting(n, f) for n, f in capture.functions.items()}
    capture.into = {n: noting(n, f) for n, f in capture.into.items()}
    taken = capture.program.inputs[: len(capture.program.inputs) - len(capture.constants)]
    with torch.no_grad():
        run = CUDAExecutor(cuda=cuda).bind(capture, plan, {})
        for _ in range(2):
            cuda.log.clear()
            run(arguments(taken, {"x": torch.randn(8, HIDDEN)}, 8), [0, 4, 8], no_context)
            assert cuda.log == issued(plan, {"compute": "default", "network": "stream0"})
    assert cuda.active is cuda.default


def test_after_an_exception_the_callers_stream_is_current_and_waits_for_the_others() -> None:
    cuda = FakeCuda()
    error = RuntimeError("boom")

    def bump(y: torch.Tensor) -> None:
        assert cuda.active is not cuda.default
        raise error

    with pytest.raises(RuntimeError) as caught:
        bound(cuda, bump=bump)([torch.ones(3)], [0, 3], no_context)
    assert caught.value is error
    assert cuda.active is cuda.default
    assert cuda.log[-1] == ("join", "default", "stream0")


def test_the_plans_of_an_executor_share_streams_and_events() -> None:
    cuda = FakeCuda()
    capture = example("llama")
    executor = CUDAExecutor(cuda=cuda)
    plans = [lower(get_strategy("nanoflow")().record(capture.program, n), "nanoflow") for n in (2, 3)]
    for plan in plans:
        executor.bind(capture, plan, {})
    assert [s.name for s in cuda.streams] == ["stream0"]
    assert len(cuda.events) == max(len({s.event for s in p.actions if s.event >= 0}) for p in plans)


def test_every_record_of_a_pooled_event_follows_all_that_waited_for_it_before() -> None:
    """The argument in `cuda_streams`, checked on what is issued: two plans of one executor in turn."""
    capture = example("llama")
    plans = [lower(get_strategy("nanoflow")().record(capture.program, n), "nanoflow") for n in (2, 3)]
    taken = capture.program.inputs[: len(capture.program.inputs) - len(capture.constants)]
    run_in_turn(capture, plans, arguments(taken, {"x": torch.randn(9, HIDDEN)}, 9))

    program = program_of(IN_PLACE)
    small = manual(program, make=torch.clone, bump=lambda y: None, read=torch.clone)
    plan = lowered(program, 1, *TWO_STREAMS)
    run_in_turn(small, [plan], [torch.ones(9)])
    with pytest.raises(AssertionError, match="e1 is still waited for"):  # what `verify` excludes
        run_in_turn(small, [without(plan, ActionKind.WAIT, "network")], [torch.ones(9)])


def run_in_turn(capture: CapturedProgram, plans: list[Plan], args: list[Any]) -> None:
    cuda = FakeCuda()
    waited: dict[FakeEvent, dict[FakeStream, int]] = {}  # event -> stream -> position of the last wait for it

    class Event(FakeEvent):
        def record(self, stream: FakeStream) -> None:
            for other, position in waited.get(self, {}).items():
                assert stream.seen.get(other, 0) >= position, f"e{self.number} is still waited for"
            super().record(stream)

    class Stream(FakeStream):
        def wait_event(self, event: FakeEvent) -> None:
            super().wait_event(event)
            self.launch()  # a wait has a place in its stream like a kernel
            waited.setdefault(event, {})[self] = self.issued

    cuda.event_type, cuda.stream_type = Event, Stream
    cuda.default = cuda.active = Stream(cuda, "default")
    executor = CUDAExecutor(cuda=cuda)
    runs = [executor.bind(capture, plan, {}) for plan in plans]
    bounds = {1: [0, 9], 2: [0, 4, 9], 3: [0, 4, 6, 9]}
    with torch.no_grad():
        for _ in range(2):
            for run, plan in zip(runs, plans, strict=True):
                run(args, bounds[plan.micro_batches], no_context)
    assert len(waited) > 1


def test_priorities() -> None:
    cuda = FakeCuda()
    bound(cuda)
    assert cuda.streams[0].priority == -1  # the network stream goes first
    bound(cuda, {"network": {"priority": -3}})
    assert cuda.streams[1].priority == -3


def test_an_sm_share_is_a_green_context_per_share_with_a_stream_of_its_own() -> None:
    cuda = FakeCuda()
    program = program_of(IN_PLACE)
    capture = manual(program, make=torch.clone, bump=lambda y: None, read=torch.clone)
    shares = {"a": {"sm_share": 0.25}, "b": {"sm_share": 0.25}, "c": {"sm_share": 0.5}}
    plan = lowered(program, 3, *((op, mb, s) for mb, s in enumerate("abc") for op in ("make", "bump", "read")))
    CUDAExecutor(ExecutorOptions(streams=shares), cuda).bind(capture, plan, {})
    assert [c.sms for c in cuda.contexts] == [33, 66]
    assert [s.name for s in cuda.streams] == ["green33", "green33", "green66"]


def test_an_sm_share_that_cannot_be_given() -> None:
    asks = ExecutorOptions(streams={"network": {"sm_share": 0.25}})
    with pytest.raises(InactiveError, match=r"network asks for an SM share.*no green contexts.*remove sm_share"):
        CUDAExecutor(asks, FakeCuda(green=False))
    with pytest.raises(InactiveError, match=r"asks for 1 of 132 multiprocessors.*driver refuses: too few"):
        bound(FakeCuda(), {"network": {"sm_share": 0.001}})
    with pytest.raises(InactiveError, match=r"executor 'cpu' has no sm_share \(asked for: network\)"):
        get_executor("auto", "cpu", asks)
    with pytest.raises(InactiveError, match=r"executor 'sequential' has no graph \(asked for: whole\)"):
        get_executor("sequential", options=ExecutorOptions(graph="whole"))


def test_a_stream_that_the_plan_does_not_have() -> None:
    with pytest.raises(ConfigError, match=r"unknown stream 'netwrk'. Did you mean 'network'\? Valid: network"):
        bound(FakeCuda(), {"netwrk": {"priority": -1}})
    options = ExecutorOptions(streams={"side": {"priority": 1}})
    program = program_of(IN_PLACE)
    capture = manual(program, make=torch.clone, bump=lambda y: None, read=torch.clone)
    unsplit = lowered(program, 1, *((name, 0, "compute") for name, _, _ in TWO_STREAMS))
    for executor in (CUDAExecutor(options, FakeCuda()), get_executor("cpu", options=options)):
        executor.bind(capture, unsplit, {})  # a plan on the caller's stream says nothing about the strategy's
        with pytest.raises(ConfigError, match=r"unknown stream 'side'\. Valid: network"):
            executor.bind(capture, lowered(program, 1, *TWO_STREAMS), {})
        executor.close()


CONTEXT = """
value x batch:0
value y batch:0
value z batch:0
inputs x
op attention memory context
  inputs x
  outputs y
op mlp compute
  inputs y
  outputs z
outputs z
"""


def test_a_context_is_entered_on_any_stream_whenever_the_micro_batch_changes() -> None:
    cuda = FakeCuda()
    program = program_of(CONTEXT)
    entered: list[int] = []

    def attention(x: torch.Tensor) -> torch.Tensor:
        cuda.log.append(("attention", cuda.active.name, entered[-1]))
        return x + entered[-1]

    capture = manual(program, attention=attention, mlp=torch.clone)
    actions = [("attention", 1, "side"), ("attention", 0, "compute"), ("mlp", 0, "compute"), ("mlp", 1, "side")]
    plan = lowered(program, 2, *actions)
    run = CUDAExecutor(cuda=cuda).bind(capture, plan, {})
    for _ in range(2):
        entered.clear()
        (z,) = run([torch.zeros(5)], [0, 2, 5], entered.append)
        assert entered == [1, 0]
        assert z.tolist() == [0, 0, 1, 1, 1]
    ran = [entry[1:] for entry in cuda.log if entry[0] == "attention"]
    assert ran == 2 * [("stream0", 1), ("default", 0)]
    remedy = "attention reads.*context.*executor 'cpu'.*on stream 'compute'.*not 'side'.*executor: cuda or sequential"
    with pytest.raises(ScheduleError, match=remedy):
        CPUExecutor().bind(capture, plan, {})
    (z,) = get_executor("sequential").bind(capture, plan, {})([torch.zeros(5)], [0, 2, 5], entered.append)
    assert z.tolist() == [0, 0, 1, 1, 1]


def test_without_a_device() -> None:
    with pytest.raises(InactiveError, match="executor: cpu"):
        CUDAExecutor(cuda=FakeCuda(available=False))


def test_options_of_the_executor_reach_it_from_the_config() -> None:
    x = torch.randn(8, HIDDEN)
    asks = {"strategy": "nanoflow", "options": {"min_tokens": 1}, "graph": "whole"}
    with pytest.raises(InactiveError, match=r"executor 'cpu' has no graph \(asked for: whole\)"):
        compile(torch.nn.Linear(HIDDEN, HIDDEN), asks)(x)
    with pytest.raises(InactiveError, match=r"executor 'cpu' has no sm_share \(asked for: network\)"):
        config = load({"strategy": "nanoflow", "streams": {"network": {"sm_share": 0.5}}})
        Session(build_selector(config), config)
    compiled = compile(torch.nn.Linear(HIDDEN, HIDDEN), asks)  # on which device is not known yet
    with pytest.raises(InactiveError, match="executor 'cpu' has no graph"):
        compiled(x)


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        return x + 1


def test_the_graphs_of_a_model_share_one_executor() -> None:
    model = compile(Twice(), "nanoflow", config={"min_tokens": 1})
    model(torch.randn(8, HIDDEN))
    assert len(model.session.plan_caches) == 2
    assert model.session.plan_caches[0].executor is model.session.plan_caches[1].executor


def test_a_gradient_is_ordered_by_events_on_both_sides() -> None:
    cuda = FakeCuda()
    submit = CUDAExecutor(ExecutorOptions(), cuda).submit_to("network")
    active: list[str] = []

    def differentiate() -> tuple[torch.Tensor]:
        active.append(cuda.current_stream().name)
        return (torch.ones(2),)

    running = submit(differentiate)
    (network,) = cuda.streams
    assert active == [network.name] and cuda.current_stream() is cuda.default
    assert cuda.log[-2:] == [("join", network.name, "default"), ("record", network.name, 0)]
    assert torch.equal(running.result()[0], torch.ones(2))
    assert cuda.log[-1] == ("wait", "default", 0)


def test_a_gradient_that_fails_leaves_the_callers_stream_current() -> None:
    cuda = FakeCuda()
    with pytest.raises(ZeroDivisionError):
        CUDAExecutor(ExecutorOptions(), cuda).submit_to("network")(lambda: 1 // 0)
    assert cuda.current_stream() is cuda.default
