"""What a step of a plan calls, counted: the operators' own code, and nothing of torch.fx or `nn.Module` around it.

The modules that Dynamo makes are lazy only while it compiles, so models are captured by `dynaflow_serving.compile`.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import nn

import dynaflow_serving
from dynaflow_serving.core.batch import Signature
from dynaflow_serving.session.plan_cache import PlanCache, no_context
from dynaflow_serving.strategies.sequential import Sequential, SequentialOptions
from dynaflow_serving.strategy.rules import Rule, SplitFunc

LAYERS = 3
TOKENS = 6


class Chain(nn.Module):
    """Each layer is an operator before the cut and the cut itself; the last layer's sine is the output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(LAYERS):
            x = torch.sin(x * 2)
        return x


class CutAtSine(Sequential):
    name = "cut_at_sine"
    annotations: tuple[Rule, ...] = (SplitFunc("sin", "sine", tags=("sine",)),)


def captured(level: Any) -> PlanCache:
    torch._dynamo.reset()  # after other tests Dynamo would make the width dynamic, too, and buffers need it
    compiled = dynaflow_serving.compile(Chain(), CutAtSine(SequentialOptions(micro_batches=2)), level=level)
    with torch.no_grad():
        compiled(torch.rand(TOKENS, 4))
    (plan_cache,) = compiled.session.plan_caches
    return plan_cache


def python_calls(function: Any, *args: Any) -> Counter[CodeType]:
    """Return how often `function(*args)` calls each Python function; the first call is not counted."""
    function(*args)
    calls: Counter[CodeType] = Counter()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            calls[frame.f_code] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function(*args)
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("level", ["dynamo", "aot"])
def test_a_split_step_makes_one_python_call_per_operator_and_micro_batch(level: Any) -> None:
    plan_cache = captured(level)
    program = plan_cache.captured.program
    assert len(program.operators) == 2 * LAYERS
    bound = plan_cache.prepare(Signature(2))
    x = torch.rand(TOKENS, 4)
    inputs = [TOKENS if program.values[name].axis is None else x for name in program.inputs]
    with torch.no_grad():
        calls = python_calls(bound.run, inputs, (0, 3, TOKENS), no_context)
    by_file: Counter[str] = Counter()
    for code, number in calls.items():
        by_file[Path(code.co_filename).name.partition(">")[0]] += number
    by_file.pop("_ops.py", None)  # torch's own call of an ATen operator, which an un-split step makes, too
    assert by_file == {f"<plan cut_at_sine {bound.plan.digest}": 1, "buffers.py": 1, "<eval_with_key": 2 * 2 * LAYERS}


@pytest.mark.parametrize("level", ["dynamo", "aot"])
def test_no_operator_is_the_forward_of_a_lazy_module(level: Any) -> None:
    capture = captured(level).captured
    functions: dict[str, Any] = {**capture.functions, **{f"{n} into": f for n, f in capture.into.items()}}
    assert {n for n, f in functions.items() if "lazy" in f.__code__.co_name} == set()
    assert capture.into  # that are looked at, too


@pytest.mark.parametrize("level", ["dynamo", "aot"])
def test_an_unsplit_step_calls_the_graph_and_no_operator(level: Any) -> None:
    compiled = dynaflow_serving.compile(Chain(), CutAtSine(SequentialOptions(micro_batches=1)), level=level)
    x = torch.rand(TOKENS, 4)
    with torch.no_grad():
        calls = python_calls(compiled, x)
        expected = Chain()(x)
        assert torch.equal(compiled(x), expected)
    generated = [code for code in calls if code.co_filename.startswith("<eval_with_key>")]
    assert [calls[code] for code in generated] == [1]
    assert compiled.session.plan_caches[0].made == 0


def test_the_benchmark_measures_all_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from dispatch import measure, table
    from dispatch_systems import OURS, compiled

    with compiled("dynamo", 1, 1, False) as subject:
        expected = subject.use_side("stock")()
        subject.session.counts.reset()
        for side in OURS:
            result = subject.use_side(side)()
            torch.testing.assert_close(result, expected)  # a micro-batch may take another matmul kernel
        assert (subject.session.counts.split, sum(subject.session.counts.unsplit.values())) == (2, 1)
    row = measure("compile-dynamo", 1, 4, time.perf_counter)
    assert row.operators == 3
    assert all(spread.min > 0 for spread in (row.stock_ms, row.unsplit_over_stock, row.split_over_by_hand))
    assert table([asdict(row)]).row_count == 1
