"""`benchmarks/independence` finds what is wrong: a judge that never condemns would let every other test pass."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rounding import integers
from torch import nn

import dynaflow_serving
from benchmarks.independence.judge import Case, Mode, Outcome, judge
from benchmarks.independence.programs import random_case, random_source
from benchmarks.independence.results import Results
from benchmarks.independence.workers import run_tasks
from dynaflow_serving.errors import PartitionError, PlanError

COUNTS = SimpleNamespace(split=1, unsplit={})


def compile_as(monkeypatch: pytest.MonkeyPatch, call: Any, counts: Any = COUNTS) -> None:
    """Have `compile` return what runs `call(model, *args)`, and counts steps as `counts` says."""

    def compile(model: Any, *_: Any, **__: Any) -> Any:
        def run(*args: Any) -> Any:
            return call(model, *args)

        run.session = SimpleNamespace(counts=counts)  # type: ignore[attr-defined]
        return run

    monkeypatch.setattr(dynaflow_serving, "compile", compile)


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def judged(model: Any = double, gradients: bool = False) -> Outcome:
    x = integers(6, 4).requires_grad_(gradients)
    outcome = judge(Case(model, [(x,)]), Mode("dynamo", gradients))
    assert outcome is not None
    return outcome


def raising(error: Exception) -> Any:
    def call(*_: Any) -> Any:
        raise error

    return call


WRONG = {
    "values": lambda model, x: model(x) + torch.tensor([1e-3, 0, 0, 0]),
    "rows swapped": lambda model, x: model(x).flip(0),
    "shape": lambda model, x: model(x)[:5],
    "type": lambda model, x: model(x).double(),
    "structure": lambda model, x: (model(x),),
    "an input written": lambda model, x: model(x.add_(1)) - 2,
    "not a number": lambda model, x: model(x) + torch.nan,
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_not_equal_is_wrong(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    compile_as(monkeypatch, WRONG[fault])
    assert judged().verdict == "wrong"


def test_a_wrong_gradient_and_a_wrong_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_as(monkeypatch, lambda model, x: model(x.detach()) + (x - x.detach()) * 2)
    assert judged(gradients=True).verdict == "split"
    compile_as(monkeypatch, lambda model, x: model(x.detach()) + (x - x.detach()) * 3)
    outcome = judged(gradients=True)
    assert outcome.verdict == "wrong" and "gradient" in outcome.reason

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * 2

    compile_as(monkeypatch, lambda model, x: torch.cat([model(x[:3]), model(x[3:])]))
    outcome = judged(Counter())
    assert outcome.verdict == "wrong" and "buffer" in outcome.reason


def test_split_means_that_a_split_step_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_as(monkeypatch, lambda model, x: model(x))
    assert judged() == Outcome("split")
    compile_as(monkeypatch, lambda model, x: model(x), SimpleNamespace(split=0, unsplit={"sum mixes": 1}))
    assert judged() == Outcome("refused", "sum mixes")


def test_errors_are_refusals_crashes_or_those_of_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_as(monkeypatch, raising(PartitionError("flip mixes tokens")))
    assert judged() == Outcome("refused", "flip mixes tokens")
    for error in (IndexError("out of range"), PlanError("not a schedule")):
        compile_as(monkeypatch, raising(error))
        assert judged().verdict == "crash"
    assert judged(lambda x: x.view(5, 5)).verdict == "stock fails"
    numbers = itertools.count()
    assert judged(lambda x: x * next(numbers)).reason.startswith("two stock runs differ")
    compile_as(monkeypatch, raising(RuntimeError("in Dynamo")))
    monkeypatch.setattr(torch, "compile", lambda *_, **__: raising(RuntimeError("in Dynamo")))
    assert judged().reason.startswith("torch.compile alone fails")


def test_results_survive_a_file_and_say_what_is_no_longer_split() -> None:
    before, now = Results(), Results()
    for verdict in ("split", "split", "wrong"):
        before.add("add", "dynamo forward", Outcome(verdict))  # type: ignore[arg-type]
    for outcome in (Outcome("split"), Outcome("refused", "no rule"), Outcome("refused", "mixes")):
        now.add("add", "dynamo forward", outcome)
    now.add("add", "aot gradients", None)
    again = Results.from_json(json.loads(json.dumps(now.to_json())))
    assert again == now
    assert list(again.no_longer_split(before)) == [("add", "dynamo forward", 1, "no rule")]
    assert [fault[:4] for fault in before.faults()] == [("add", "dynamo forward", "wrong", 1)]
    assert now.counts()["dynamo forward"] == {"split": 1, "refused": 2} and not now.counts()["aot gradients"]


def test_workers_that_die_or_hang_do_not_end_the_run() -> None:
    def work(task: int, skip: int) -> Iterator[tuple[Any, Any]]:
        for part in range(skip, 3):
            yield part, None
            if (task, part) == (1, 1):
                os._exit(7)
            if (task, part) == (3, 0):
                time.sleep(600)
            yield part, f"result {task}.{part}"[:6]

    found: dict[tuple[int, int], str] = {}
    ended = []
    for task, part, result in run_tasks(range(5), work, processes=2, chunk=2, limit=10.0):
        if part is None:
            ended.append(task)
        else:
            found[task, part] = result
    assert sorted(ended) == [0, 1, 2, 3, 4] and len(found) == 15
    assert found.pop((1, 1)) == "the process died: exit code 7"
    assert found.pop((3, 0)).startswith("timeout: silent")
    assert set(found.values()) == {"result"}


def test_random_programs_are_the_same_for_the_same_seed_and_run() -> None:
    import random

    assert random_source(random.Random(5)) == random_source(random.Random(5))
    for seed in range(60):
        program = random_case(seed)
        for call in program.case.calls:
            program.case.model(*(a.clone() for a in call))
        assert (
            program.source.count("\n") >= 5 and program.case.calls[0][0].shape[0] != program.case.calls[1][0].shape[0]
        )
