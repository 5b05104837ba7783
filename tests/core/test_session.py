"""What an engine's worker does with a Session: decide, count, refuse, and agree with the other ranks."""

from __future__ import annotations

import json
from typing import Any

import pytest
import ranks
from two_ranks import on_two_ranks

from dynaflow_serving.capture.examples import example_capture
from dynaflow_serving.core.batch import Batch, MicroBatch, Split
from dynaflow_serving.errors import InactiveError, ScheduleError
from dynaflow_serving.session.report import StepReport, WorkerReport


def test_steps_are_decided_counted_and_reported() -> None:
    s = ranks.session()
    s.add(example_capture("llama"))
    with s.step(Batch((8, 8))) as step:
        assert len(s.micro_batches) == 2 and s.in_flight is step
    assert s.in_flight is None and s.micro_batches == ()
    for batch in (Batch((4, 2)), Batch((9,))):
        with s.step(batch):
            assert s.micro_batches == ()
    report = s.report()
    assert report.steps.split == 1
    assert report.steps.unsplit == {"a micro-batch would have under 4 tokens": 1, "one request": 1}
    assert WorkerReport.model_validate(json.loads(report.model_dump_json())) == report
    s.reset()
    assert s.report().steps == StepReport(split=0, unsplit={})
    s.close()


def test_a_step_without_a_captured_graph_is_an_error() -> None:
    with pytest.raises(InactiveError, match="without compiling a graph"):
        ranks.session().step(Batch((8, 8))).__enter__()
    with pytest.raises(InactiveError, match="compiled no graph of this model"):
        ranks.session().confirm(None)


def test_more_micro_batches_than_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    s = ranks.session()
    s.add(example_capture("llama"))
    three = Split(tuple(MicroBatch((i, i + 1), (4 * i, 4 * i + 4)) for i in range(3)))
    monkeypatch.setattr(type(s.selector), "split", lambda self, batch: three)
    with pytest.raises(ScheduleError, match=r"made 3 micro-batches, more than its max_micro_batches \(2\)"):
        s.step(Batch((4, 4, 4))).__enter__()


@pytest.fixture(scope="module")
def found_on_two_ranks() -> list[dict[str, Any]]:
    return on_two_ranks(ranks.all_scenarios)


@pytest.mark.parametrize(("micro_batches", "agree"), [([2, 2], True), ([2, 3], False)])
def test_ranks_with_different_plans_are_found_before_the_first_step(
    found_on_two_ranks: list[dict[str, Any]], micro_batches: list[int], agree: bool
) -> None:
    for found in found_on_two_ranks:
        outcome = found["agree"][tuple(micro_batches)]
        if agree:
            assert outcome == "agreed"
        else:
            assert "the ranks would run different plans" in outcome
            assert "micro_batches=3" in outcome


def test_a_collective_that_is_not_waited_for_corrupts_the_result_and_the_verifier_says_so(
    found_on_two_ranks: list[dict[str, Any]],
) -> None:
    for rank, scenarios in enumerate(found_on_two_ranks):
        found = scenarios["race"]
        assert found["with"] == [3.0] * 3
        assert found["without"] == [rank + 1.0] * 3  # the rank's own share, not the sum
        assert "does not wait" in found["verdict"]
