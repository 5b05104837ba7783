"""The tuner: what it measures, predicts, adopts and declines, and how far its budget goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from policy_support import BATCH, Engine, fixed, per_token, trial, tune, tune_until_adopted

from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.policy.bucket import DECODE, PREFILL, Bucket, bucket_of
from dynaflow_serving.policy.guard import COMPARED
from dynaflow_serving.policy.neighbours import expected_seconds, infer
from dynaflow_serving.policy.selector import COMPARING
from dynaflow_serving.policy.table import Decision, Table
from dynaflow_serving.policy.tuner import adopt_best_trial, noise
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.registry import register_strategy
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.splitting import whole


@pytest.mark.alone
def test_an_overlap_that_wins_is_predicted_measured_and_adopted() -> None:
    engine = Engine(per_token)
    (decision,) = tune_until_adopted(engine).decisions
    (trial,) = decision.trials
    assert decision.candidate == "nanoflow x2", decision.reason
    assert trial.predicted is not None and trial.measured is not None
    assert 1.1 < trial.predicted < 1.65  # c0 n0 c1 n1 of two halves on two streams: 8 halves in 5
    assert 1.05 < trial.measured < 1.65
    assert len(trial.ratios) == 10 and decision.plain_ms is not None and decision.plain_ms > 4 * 1e3 * per_token(64)


@pytest.mark.alone
def test_a_split_that_is_predicted_to_lose_is_not_timed() -> None:
    (decision,) = tune(Engine(fixed)).decisions
    (trial,) = decision.trials
    assert decision.candidate == "" and trial.ratios == []
    assert "predicted to be slower" in trial.verdict and trial.predicted is not None and trial.predicted < 0.9
    assert decision.reason.startswith("nanoflow x2: predicted to be slower")


def swift(x: torch.Tensor) -> torch.Tensor:
    return x + 1


class Swift(OpScheduler):
    """Never splits: it replaces every operator by a kernel that does not sleep."""

    name = "swift"
    schedules_unsplit = True
    max_micro_batches = 1

    def split(self, batch: Batch) -> Split:
        return whole(batch, "swift never splits")

    def schedule(self, s: Schedule) -> None:
        while ready := s.get_ready_ops():
            s.execute(ready[0], replace=swift)


@pytest.mark.alone
def test_a_candidate_that_only_orders_unsplit_steps_is_timed_and_adopted() -> None:
    register_strategy("swift")(Swift)
    engine = Engine(per_token, candidates=["swift", "nanoflow"])
    (decision,) = tune(engine).decisions
    assert decision.candidate == "swift", decision.reason
    swift_trial, other = decision.trials
    assert swift_trial.predicted is None and swift_trial.measured is not None and swift_trial.measured > 2
    assert other.candidate == "nanoflow x2" and other.verdict
    engine.selector.serve_by(Table(key={}, decisions=[decision]), engine.session)
    for _ in range(COMPARED + 4):
        engine.step(BATCH)
    assert engine.session.counts.unsplit == {COMPARING: COMPARED // 2, "swift never splits": COMPARED // 2 + 4}
    assert engine.selector.switched_off == 0


@pytest.mark.alone
def test_what_a_larger_batch_has_lost_is_not_tried_with_a_smaller_one() -> None:
    engine = Engine(fixed, [Batch((8,) * 8), Batch((4,) * 8), Batch((2,) * 8)])
    first, *others = tune(engine).decisions
    assert first.trials and all("not tried: 0." in d.reason and not d.trials for d in others)
    assert {sum(b.tokens) for b in engine.ran} == {64}


@pytest.mark.alone
def test_what_the_budget_does_not_reach_is_not_begun_and_says_so() -> None:
    sizes = [Batch((8,) * 8), Batch((4,) * 8), Batch((9,) * 8)]
    engine = Engine(per_token, sizes, micro_batches=[2, 4], pairs=3, budget_seconds=0.3)
    first, smaller, larger = tune(engine).decisions  # a step of 64 tokens takes 51 ms, and a decision 12 of them
    assert first.reason.startswith("not tuned: a step takes 0.05") and first.plain_ms is not None and not first.trials
    assert smaller.reason.startswith("not tuned: a step takes 0.02") and larger.reason.startswith("not tuned: a step")
    assert [sum(batch.tokens) for batch in engine.ran] == [64]  # the first bucket's step has told about the others
    assert not any(d.decided or d.candidate for d in (first, smaller, larger))


@pytest.mark.alone
def test_candidates_that_the_budget_does_not_reach_are_not_timed() -> None:
    engine = Engine(per_token, micro_batches=[2, 4], pairs=3, budget_seconds=1.5)
    engine.seconds = lambda tokens: 0.02  # it takes 80 ms to run a step, and candidates with more of them lose
    (decision,) = tune(engine).decisions
    assert all(len(trial.ratios) <= 6 for trial in decision.trials)
    assert 0 < len(engine.ran) * 0.08 < 1.5 * 1.5


@pytest.mark.alone
def test_each_kind_of_batch_has_its_share_of_the_budget() -> None:
    kinds = [Batch((8,) * 8), Batch((1,) * 60), Batch((1,) * 30 + (2,) * 15)]
    engine = Engine(per_token, [*kinds, Batch((4,) * 8)], micro_batches=[2], pairs=5, budget_seconds=3.6)
    prefill, decode, mixed, _ = tune(engine).decisions
    assert all(d.decided and d.trials[0].ratios for d in (prefill, decode, mixed)), (prefill, decode, mixed)


def decided(tokens: int, candidate: str = "nanoflow x2", **fields: Any) -> Decision:
    return Decision(
        kind=PREFILL, tokens=tokens, requests=16, candidate=candidate, noise=0.01, trials=[trial(1.3)], **fields
    )


@pytest.mark.parametrize(
    ("others", "inferred"),
    [
        ([decided(16)], True),  # in a smaller batch it wins already
        ([decided(128)], True),
        ([decided(256)], False),  # a split may cost too much in so much smaller a batch
        ([decided(16), decided(128, "")], False),  # the nearer one decides
        ([decided(16, inferred=True)], False),
        ([Decision(kind=DECODE, tokens=64, requests=16, candidate="nanoflow x2", trials=[trial(1.3)])], False),
    ],
)
def test_what_the_budget_does_not_reach_follows_its_neighbour(others: list[Decision], inferred: bool) -> None:
    unreached = Decision(**bucket_of(BATCH)._asdict(), decided=False, reason="not tuned: no time")
    engine = Engine(per_token)
    infer(unreached, BATCH, [*others, unreached], engine.selector, engine.facts)
    assert (unreached.inferred, unreached.candidate) == (inferred, "nanoflow x2" if inferred else "")
    assert unreached.reason.startswith("inferred from prefill" if inferred else "not tuned")


def test_a_step_is_expected_to_take_what_others_of_its_kind_tell() -> None:
    known = [Decision(kind=PREFILL, tokens=64, requests=4, plain_ms=100.0)]
    assert expected_seconds(Bucket(PREFILL, 128, 4), known) == 0.1
    assert expected_seconds(Bucket(PREFILL, 32, 4), known) == 0.05
    assert expected_seconds(Bucket(DECODE, 64, 64), known) == 0.0


@pytest.mark.parametrize(
    ("ratios", "plain", "adopted", "why"),
    [
        ((1.10, 1.11, 1.12), (1.0, 1.0, 1.0, 1.0), True, "1.11x, noise 0.0%"),
        ((1.10, 1.11, 1.12), (0.6, 0.8, 1.2, 1.4), False, "a: gain 11.0%, but noise is"),
        ((1.01, 1.01, 1.02), (1.0, 1.0, 1.0, 1.0), False, "a: gain 1.0%, but noise is 0.0% and min_gain 2.0%"),
        ((0.7, 0.8, 0.9), (1.0, 1.0, 1.0, 1.0), False, "a: slower (0.80x)"),
        ((0.9, 1.5, 1.6, 0.9, 1.5), (1.0, 1.0, 1.0, 1.0), False, "a: won 3 of 5 pairs only"),
    ],
)
def test_a_gain_must_exceed_noise_and_least_gain(
    ratios: tuple[float, ...], plain: tuple[float, ...], adopted: bool, why: str
) -> None:
    decision = Decision(kind=PREFILL, tokens=64, requests=4, trials=[trial(*ratios)], noise=noise(list(plain)))
    adopt_best_trial(decision, min_gain=0.02)
    assert bool(decision.candidate) is adopted
    assert why in decision.reason


def test_the_best_of_several_winners_is_adopted() -> None:
    trials = [trial(1.2, 1.2, 1.2), trial(1.4, 1.4, 1.4, name="b")]
    decision = Decision(kind=PREFILL, tokens=64, requests=4, trials=trials, noise=0.0)
    adopt_best_trial(decision, min_gain=0.02)
    assert decision.candidate == "b" and trials[0].verdict == "b is faster"


def test_candidates_that_cannot_or_need_not_be_tried_say_why() -> None:
    engine = Engine(per_token, candidates=["nanoflow", "dual_batch", "prefill_decode"])
    (decision,) = tune(engine).decisions
    verdicts = {t.candidate: t.verdict for t in decision.trials}
    assert verdicts["prefill_decode x2"] == "prefill requests only"
    assert verdicts["dual_batch x2"].startswith(("cannot schedule this model", "the same plan as", "predicted", ""))
    assert len(verdicts) == 3
