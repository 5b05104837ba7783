"""What a strategy needs is asked for before weights load; what only the graph shows retires a session, where it may."""

from __future__ import annotations

import logging

import pytest
import torch

from dynaflow_serving.capture.examples import HIDDEN, example_capture
from dynaflow_serving.config import Config
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.errors import InactiveError, ScheduleError
from dynaflow_serving.executor.cpu import CPUExecutor
from dynaflow_serving.integrations.limits import context_causes, rank_causes
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.session.forward import GraphForward
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.session.session import Session
from dynaflow_serving.strategies.sequential import Sequential
from dynaflow_serving.strategy.base import OpScheduler, SplitOptions
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import cut_at_requests


@pytest.mark.parametrize(
    ("strategy", "ranks", "says"),
    [
        ("token_weave", 1, "strategy 'token_weave' needs 2 tensor-parallel ranks or more, and there is 1"),
        ("token_weave", 2, ""),
        ("nanoflow", 1, ""),
        ("auto", 1, ""),  # it refuses candidates by itself
    ],
)
def test_ranks(strategy: str, ranks: int, says: str) -> None:
    selector = build_selector(Config(strategy=strategy))
    assert " ".join(rank_causes(selector, ranks)).startswith(says) and bool(rank_causes(selector, ranks)) == bool(says)


@pytest.mark.parametrize(
    ("strategy", "executor", "device", "declined"),
    [
        ("prefill_decode", "auto", "cpu", True),
        ("prefill_decode", "cpu", "cpu", True),
        ("prefill_decode", "sequential", "cpu", False),
        ("prefill_decode", "auto", "cuda", False),
        ("nanoflow", "auto", "cpu", False),
    ],
)
def test_streams_for_operators_with_context(strategy: str, executor: str, device: str, declined: bool) -> None:
    config = Config(strategy=strategy, executor=executor)
    causes = context_causes(config, build_selector(config), device)
    assert bool(causes) == declined
    assert all("executor: sequential" in cause for cause in causes)


class Hopeless(OpScheduler[SplitOptions]):
    name = "hopeless"
    schedules_unsplit = True

    def split(self, batch: Batch) -> Split:
        return cut_at_requests(batch, 2, 1)

    def schedule(self, s: Schedule) -> None:
        raise ScheduleError("hopeless: no operator tagged magic")


def hopeless(fallback: bool) -> Session:
    config = Config(strategy="hopeless", fallback=fallback)
    return Session(FixedStrategy(Hopeless()), config, "cpu")


def test_a_strategy_that_schedules_nothing_of_a_model_ends_the_start() -> None:
    session = hopeless(fallback=False)
    session.add(example_capture("llama"))
    with pytest.raises(ScheduleError, match="tagged magic"):
        session.confirm(None)


def test_with_fallback_its_steps_run_whole_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    session = hopeless(fallback=True)
    captured = example_capture("llama")
    forward = GraphForward(session, session.add(captured))
    with caplog.at_level(logging.WARNING, logger="dynaflow_serving"):
        session.confirm(None)
    assert "DynaFlow is NOT active" in caplog.text and "tagged magic" in caplog.text
    x = torch.randn(6, HIDDEN)
    with torch.no_grad(), session.step(Batch((3, 3))) as step:
        assert not step.micro_batches and not step.planned
        found = forward(6, x)
    assert torch.equal(
        found[0], PlanCache(captured, FixedStrategy(Sequential()), CPUExecutor()).run_whole((6, x), 6)[0]
    )
    assert session.report().steps.unsplit == {"fallback: hopeless: no operator tagged magic": 1}


def test_an_engine_without_a_graph_goes_on_as_it_is() -> None:
    session = hopeless(fallback=True)
    session.confirm(None)
    with session.step(Batch((3, 3))) as step:
        assert not step.micro_batches
    (reason,) = session.report().steps.unsplit
    assert reason.startswith("fallback: DynaFlow was requested, but the engine compiled no graph")
    with pytest.raises(InactiveError):
        hopeless(fallback=False).confirm(None)
