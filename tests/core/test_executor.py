"""The executors without a device: real threads, poisoned buffers."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from support import IN_PLACE, TWO_STREAMS, lowered, manual, program_of, replaced, without

from dynaflow_serving.core.plan import ActionKind
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.executor import get_executor
from dynaflow_serving.executor.cpu import CPUExecutor
from dynaflow_serving.executor.sequential import SequentialExecutor
from dynaflow_serving.session.plan_cache import no_context


@pytest.fixture
def cpu():
    executor = CPUExecutor()
    yield executor
    executor.close()


def test_a_missing_wait_corrupts_the_result_and_the_wait_repairs_it(cpu: CPUExecutor) -> None:
    """Deterministic: `bump` holds its write back until `read` has read, or, with the wait, cannot yet."""
    started, has_read = threading.Event(), threading.Event()

    def bump(y: torch.Tensor) -> None:
        started.set()
        has_read.wait(0.1)
        y.add_(1)

    def read(y: torch.Tensor) -> torch.Tensor:
        assert started.wait(5)
        z = y * 2
        has_read.set()
        return z

    program = program_of(IN_PLACE)
    capture = manual(program, make=torch.clone, bump=bump, read=read)
    plan = lowered(program, 1, *TWO_STREAMS)
    x = torch.arange(3.0)
    (right,) = cpu.bind(capture, plan, {})([x], [0, 3], no_context)
    assert torch.equal(right, (x + 1) * 2)
    started.clear()
    has_read.clear()
    racy = without(plan, ActionKind.WAIT, "compute")
    (wrong,) = cpu.bind(capture, racy, {})([x], [0, 3], no_context)
    assert torch.equal(wrong, x * 2)


class Boom(Exception):
    pass


@pytest.mark.parametrize("failing", ["make", "bump", "read"])
def test_the_original_exception_reaches_the_caller_and_the_executor_lives_on(cpu: CPUExecutor, failing: str) -> None:
    program = program_of(IN_PLACE)
    error = Boom(failing)
    fail = {"now": True}

    def operator(name: str, fn: Any) -> Any:
        def call(y: torch.Tensor) -> Any:
            if fail["now"] and name == failing:
                raise error
            return fn(y)

        return call

    functions = {"make": torch.clone, "bump": lambda y: None, "read": lambda y: y * 2}
    capture = manual(program, **{n: operator(n, f) for n, f in functions.items()})
    run = cpu.bind(capture, lowered(program, 1, *TWO_STREAMS), {})
    x = torch.arange(3.0)
    started = time.perf_counter()
    with pytest.raises(Boom) as caught:
        run([x], [0, 3], no_context)
    assert time.perf_counter() - started < 1
    assert caught.value is error
    fail["now"] = False
    for _ in range(50):
        (out,) = run([x], [0, 3], no_context)
        assert torch.equal(out, x * 2)


def test_a_failed_run_frees_its_tensors_at_once(cpu: CPUExecutor) -> None:
    program = program_of(IN_PLACE)
    alive: list[weakref.ref[torch.Tensor]] = []

    def make(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        alive.append(weakref.ref(y))
        return y

    def bump(y: torch.Tensor) -> None:
        raise Boom

    run = cpu.bind(manual(program, make=make, bump=bump, read=torch.clone), lowered(program, 1, *TWO_STREAMS), {})
    gc.disable()
    try:
        with pytest.raises(Boom):
            run([torch.ones(3)], [0, 3], no_context)
        time.sleep(0.05)  # the worker drops its job
        assert alive[0]() is None
    finally:
        gc.enable()


def test_close_stops_the_threads() -> None:
    executor = CPUExecutor()
    program = program_of(IN_PLACE)
    capture = manual(program, make=torch.clone, bump=lambda y: None, read=torch.clone)
    before = set(threading.enumerate())
    plan = lowered(program, 1, *TWO_STREAMS)
    executor.bind(capture, plan, {})
    (thread,) = set(threading.enumerate()) - before
    assert thread.name == "dynaflow-network"
    executor.close()
    assert not thread.is_alive()


def test_threads_end_with_the_last_plan_that_uses_them() -> None:
    program = program_of(IN_PLACE)
    capture = manual(program, make=torch.clone, bump=lambda y: None, read=torch.clone)
    before = set(threading.enumerate())
    run = CPUExecutor().bind(capture, lowered(program, 1, *TWO_STREAMS), {})
    (thread,) = set(threading.enumerate()) - before
    run([torch.ones(3)], [0, 3], no_context)  # the executor is gone, its plan works
    assert thread.is_alive()
    del run
    gc.collect()
    thread.join(1)
    assert not thread.is_alive()


def test_workers_run_in_the_mode_of_the_caller(cpu: CPUExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(IN_PLACE)
    seen: dict[str, Any] = {}

    def bump(y: torch.Tensor) -> None:
        seen.update(
            thread=threading.current_thread().name,
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            threads=torch._C.get_num_threads(),
            autocast=torch.is_autocast_enabled("cpu"),
        )

    run = cpu.bind(
        manual(program, make=torch.clone, bump=bump, read=torch.clone), lowered(program, 1, *TWO_STREAMS), {}
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # what vLLM's CPU worker does
    before = torch._C.get_num_threads()
    try:
        for threads in (1, 2):
            torch._C.set_num_threads(threads)
            for mode, expected in (
                (torch.enable_grad(), (True, False)),
                (torch.no_grad(), (False, False)),
                (torch.inference_mode(), (False, True)),
            ):
                with mode:
                    run([torch.ones(3)], [0, 3], no_context)
                assert (seen["grad"], seen["inference"]) == expected
                assert seen["threads"] == threads
                assert seen["thread"] == "dynaflow-network"
                assert not seen["autocast"]
        with torch.autocast("cpu", torch.bfloat16):
            run([torch.ones(3)], [0, 3], no_context)
        assert seen["autocast"]
    finally:
        torch._C.set_num_threads(before)


CHAIN = """
value x batch:0
value y batch:0
value z batch:0
inputs x
op first compute
  inputs x
  outputs y
op second compute
  inputs y
  outputs z
outputs z
"""


def test_the_sequential_executor_poisons_what_is_freed() -> None:
    """An operator keeps its input behind the plan's back; reading it after the FREE gives NaN, not luck."""
    program = program_of(CHAIN)
    kept: list[torch.Tensor] = []

    def second(y: torch.Tensor) -> torch.Tensor:
        kept.append(y)
        return y * 2

    capture = manual(program, first=torch.clone, second=second)
    plan = lowered(program, 1, ("first", 0, "compute"), ("second", 0, "compute"))
    (z,) = SequentialExecutor().bind(capture, plan, {})([torch.ones(3)], [0, 3], no_context)
    assert torch.equal(z, torch.full((3,), 2.0))
    assert kept[0].isnan().all()


def test_a_plan_that_frees_early_gives_nan_or_fails() -> None:
    program = program_of(CHAIN)
    out: list[torch.Tensor] = []
    capture = manual(program, first=torch.clone, second=lambda y: out[-1] * 2 if y is None else y * 2)
    capture.functions["first"] = lambda x: out.append(x.clone()) or out[-1]
    plan = lowered(program, 1, ("first", 0, "compute"), ("second", 0, "compute"))
    free = next(s for s in plan.actions if s.kind is ActionKind.FREE)
    rest = [s for s in plan.actions if s is not free]
    early = replaced(plan, [rest[0], free, *rest[1:]])
    (z,) = SequentialExecutor().bind(capture, early, {})([torch.ones(3)], [0, 3], no_context)
    assert z.isnan().all()


def test_executors_by_name() -> None:
    assert get_executor("auto", "cpu").name == "cpu"
    with pytest.raises(ConfigError, match=r"unknown executor 'cpux'.*'cpu'.*auto, cpu, cuda, sequential"):
        get_executor("cpux")
