"""Before an engine serves, its trials compare each cut that is in use, and tuning adopts none that differs."""

from __future__ import annotations

import logging
from dataclasses import asdict

import pytest
import torch
from policy_support import Engine, adopted, table_for

from dynaflow_serving.bench.rank import Rank
from dynaflow_serving.config import Config
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.integrations.base import WorkloadSettings
from dynaflow_serving.integrations.torch.workload import TorchWorkload
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.policy.start import start_policy
from dynaflow_serving.policy.tuner import Tuner
from dynaflow_serving.session.session import Session

PROMPTS = [Batch((size,) * 4) for size in (16, 8, 4, 2)]
DECODES = [Batch((1,) * size, (8,) * size) for size in (32, 8)]


class WithStrategy(Engine):
    """An engine with one strategy for every step. If it `mixes`, its operators count the rows that they see."""

    def __init__(self, batches: list[Batch], mixes: bool = False, check: str = "first", **options: int) -> None:
        super().__init__(lambda _: 0.0, batches)
        self.mixes = mixes
        config = Config(strategy="nanoflow", options=options, check=check)
        captured = self.plan_cache.captured
        self.session = Session(build_selector(config), config)
        self.plan_cache = self.session.add(captured)

    def _operator(self, x: torch.Tensor) -> torch.Tensor:
        return x + len(x) if self.mixes else x + 1

    def step(self, batch: Batch) -> torch.Tensor:
        x = torch.zeros(sum(batch.tokens), 1)
        with self.session.step(batch) as step:
            result = self.plan_cache.run([x], step.split)
            (result,) = step.checked(result, lambda: self.plan_cache.run_plain([x], len(x)))
        return result

    def start(self) -> None:
        start_policy(self.session, self, lambda: self.facts)


def test_a_trial_of_the_smallest_prompts_that_are_cut_is_compared(caplog: pytest.LogCaptureFixture) -> None:
    engine = WithStrategy([*DECODES, *PROMPTS], min_tokens=8)
    with caplog.at_level(logging.INFO):
        engine.start()
    assert engine.ran == [Batch((4,) * 4)]
    assert "split steps compared with un-split ones: 1, 0." in caplog.text
    assert engine.session.counts.split == 0 and not engine.session.counts.unsplit
    engine.step(PROMPTS[0])
    report = engine.session.report()
    assert report.check is not None and report.check.steps == 1 and report.steps.split == 1


def test_decodes_are_compared_where_no_prompts_are_cut() -> None:
    engine = WithStrategy(DECODES, min_tokens=8)
    engine.start()
    assert engine.ran == [DECODES[0]]


def test_nothing_is_tried_where_nothing_is_compared() -> None:
    engine = WithStrategy([*DECODES, *PROMPTS], check="never", min_tokens=8)
    engine.start()
    assert engine.ran == []


def test_a_strategy_that_differs_serves_no_split_step(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(str(tmp_path))
    engine = WithStrategy(PROMPTS, mixes=True, min_tokens=1)
    with caplog.at_level(logging.INFO):
        engine.start()
    whole = engine.step(PROMPTS[0])
    assert torch.equal(whole, torch.full_like(whole, 4.0 * len(whole)))
    assert engine.session.counts.unsplit == {"check: the output differs from the un-split run": 1}
    assert "REFUSED: nanoflow, program " in caplog.text


class Mixing(Engine):
    """An engine under `strategy: auto` whose operators count the rows that they see."""

    def _operator(self, x: torch.Tensor) -> torch.Tensor:
        super()._operator(x)
        return x + len(x)

    def step(self, batch: Batch) -> torch.Tensor:
        x = torch.zeros(sum(batch.tokens), 1)
        with self.session.step(batch) as step:
            result = self.plan_cache.run([x], step.split, traced=step.to_trace)
            (result,) = step.checked(result, lambda: self.plan_cache.run_plain([x], len(x)))
        return result


def test_tuning_adopts_no_candidate_that_differs(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    engine = Mixing(lambda tokens: 0.0005 * tokens, check="first")
    (decision,) = Tuner(engine.session, engine.selector, engine, engine.facts, engine.ranks).tune().decisions
    (trial,) = decision.trials
    assert not decision.candidate and not trial.ratios
    assert trial.verdict == "check: the output differs from the un-split run" and trial.verdict in decision.reason
    assert engine.session.plan_caches[0].refused.keys() == {"sequential x2"}  # no order of these is right


def test_an_adopted_candidate_that_differs_is_refused_and_others_go_on(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    batch = Batch((8,) * 8)
    engine = Mixing(lambda tokens: 0.0, check="first", micro_batches=[2, 3])
    engine.selector.serve_by(table_for(adopted(batch)), engine.session)
    for _ in range(4):  # every second one is un-split, for the guard
        engine.step(batch)
    assert engine.session.plan_caches[0].refused.keys() == {"nanoflow x2"}
    assert engine.session.counts.unsplit["check: the output differs from the un-split run"] == 1
    assert len(engine.selector.cut(batch, "nanoflow x3").micro_batches) == 3
    assert not engine.plan_cache.allowed_split(batch, engine.selector.cut(batch, "nanoflow x3")).reason


@pytest.mark.parametrize("training", [False, True])
def test_a_benchmark_measures_no_step_that_is_compared(training: bool) -> None:
    torch._dynamo.reset()
    settings = WorkloadSettings(model="", dtype="auto", requests=4, length=2, training=training, seed=0)
    config = Config(strategy="comm_overlap", options={"min_tokens": 1})
    rank = Rank(TorchWorkload)
    rank.start(asdict(settings), {"stock": None, "ours": config.model_dump()}, ranks=1, threads=torch.get_num_threads())
    before = rank.steps("ours")
    assert before["check"]["steps"] == 1 + training  # the forward and the backward graph
    assert rank.run("ours")["equal"] and rank.run("ours")["equal"]
    after = rank.steps("ours")
    assert after["check"] == before["check"]
    assert after["steps"]["split"] == before["steps"]["split"] + 2 * (1 + training)
