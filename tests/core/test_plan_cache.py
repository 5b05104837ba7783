"""The PlanCache: one plan per signature, refusals with reasons, counters."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support import arguments

from dynaflow_serving.capture.examples import HIDDEN, example_capture
from dynaflow_serving.core.batch import Batch, Signature, Split
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.executor.sequential import SequentialExecutor
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.strategies.nanoflow import NanoFlow, NanoFlowOptions
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.schedule import Schedule, Task
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import cut_evenly


def make(strategy: OpScheduler) -> PlanCache:
    return PlanCache(example_capture("llama"), FixedStrategy(strategy), SequentialExecutor())


def test_plans_are_made_once_and_steps_are_counted() -> None:
    plan_cache = make(NanoFlow(NanoFlowOptions(min_tokens=4)))
    taken = plan_cache.captured.program.inputs[:2]
    counted = Counter[str]()
    with torch.no_grad():
        for size in (8, 9, 4, 8):
            x = torch.randn(size, HIDDEN)
            split = plan_cache.decide(Batch((1,) * size))
            counted[split.reason] += 1
            (out,) = plan_cache.run(arguments(taken, {"x": x}, size), split)
            assert out.shape == x.shape
    assert counted == {"": 3, "a micro-batch would have under 4 tokens": 1}
    assert (plan_cache.made, plan_cache.hits) == (2, 2)
    assert [p.micro_batches for p in plan_cache.plans] == [1, 2]
    assert [p.strategy for p in plan_cache.plans] == ["sequential", "nanoflow"]


class Stubborn(OpScheduler):
    """Wants micro-batch 1 first, whatever depends on what."""

    name = "stubborn"

    def split(self, batch: Batch) -> Split:
        return cut_evenly(batch, 2)

    def schedule(self, s: Schedule) -> None:
        for micro_batch in reversed(range(s.micro_batches)):
            while ready := s.get_ready_ops(micro_batch):
                s.execute(ready[0])


class Lazy(Stubborn):
    name = "lazy"

    def schedule(self, s: Schedule) -> None:
        s.execute(s.get_ready_ops()[0])


def with_state(plan_cache: PlanCache) -> PlanCache:
    """Let the attention write a cache: micro-batches that share a request depend on each other."""
    import dataclasses

    program = plan_cache.captured.program
    operators = tuple(
        dataclasses.replace(o, writes=("cache",)) if "attention" in o.tags else o for o in program.operators
    )
    plan_cache.captured.program = dataclasses.replace(program, operators=operators)
    return plan_cache


def test_a_split_that_leaves_no_order_runs_whole_with_the_reason() -> None:
    plan_cache = with_state(make(Stubborn()))
    independent = plan_cache.decide(Batch((4, 4)))
    assert len(independent.micro_batches) == 2
    for _ in range(2):
        whole = plan_cache.decide(Batch((3, 5)))  # the second request straddles the cut
        assert len(whole.micro_batches) == 1
        assert whole.reason.startswith("micro-batches depend on each other: strategy 'stubborn' left")


def test_a_strategy_that_is_wrong_by_itself_is_an_error() -> None:
    plan_cache = with_state(make(Lazy()))
    with pytest.raises(ScheduleError, match=r"strategy 'lazy' left \d+ operators unexecuted \(ready but not executed"):
        plan_cache.decide(Batch((3, 5)))
    with pytest.raises(ScheduleError, match="'lazy' left"):
        plan_cache.prepare(Signature(2))


def by_name_and_callable(s: Schedule) -> None:
    s.execute(s.get_ready_ops()[0], replace="relu")
    s.execute(s.get_ready_ops()[0], replace=torch.relu)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda s: s.execute([]), "no operators"),
        (lambda s: s.execute(s.get_ready_ops() + s.get_ready_ops()), "each once"),
        (lambda s: (s.execute(t := s.get_ready_ops()[0]), s.execute(t)), "has been executed already"),
        (lambda s: s.execute(s.successors(s.get_ready_ops()[0])[0]), r"is not ready: it needs layers.0.compute.0@0"),
        (lambda s: s.execute(Task(s.get_ready_ops()[0].operator, 2)), r"layers.0.compute.0@2 is no task"),
        (by_name_and_callable, "'relu' is given as a name and as a callable"),
        (lambda s: [s.get_ready_ops() for _ in range(10_000)], r"ran none; ready: layers.0.compute.0@0, layers.0.comp"),
    ],
)
def test_misuse_of_a_schedule_names_the_operators(misuse: object, message: str) -> None:
    schedule = Schedule(example_capture("llama").program, 2)
    with pytest.raises(ScheduleError, match=message):
        misuse(schedule)  # type: ignore[operator]


class Misspelt(OpScheduler):
    name = "misspelt"

    def split(self, batch: Batch) -> Split:
        return cut_evenly(batch, 2)

    def schedule(self, s: Schedule) -> None:
        while ready := s.get_ready_ops():
            s.execute(ready[0], replace="fsed")


def test_a_kernel_that_there_is_not_is_an_error_when_the_plan_is_made() -> None:
    with pytest.raises(ScheduleError, match=r"unknown kernel 'fsed'.* Valid: add_rms"):
        make(Misspelt()).prepare(Signature(2))
