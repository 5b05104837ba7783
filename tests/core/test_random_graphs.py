"""Random graphs under random schedules and splits equal plain execution, bit by bit.

`DYNAFLOW_EXAMPLES=5000` looks further.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import WIDTH, RandomGraph, random_schedule
from support import fixed_examples

from dynaflow_serving.capture.fx import partition
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.parse import parse_plan, parse_program
from dynaflow_serving.core.plan import ActionKind, Plan
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.executor.cpu import CPUExecutor
from dynaflow_serving.executor.sequential import SequentialExecutor
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.session.plan_cache import no_context
from dynaflow_serving.strategy.schedule import Schedule

EXAMPLES = int(os.environ.get("DYNAFLOW_EXAMPLES", 50))
SEEN: Counter[str] = Counter()


def run(executor: Any, capture: CapturedProgram, schedule: Schedule, plan: Plan, inputs: Any, bounds: list[int]) -> Any:
    program = capture.program
    given = {k: v.clone() for k, v in inputs.items()}
    taken = program.inputs[: len(program.inputs) - len(capture.constants)]
    out = executor.bind(capture, plan, schedule.kernels)([given[n] for n in taken], bounds, no_context)
    return capture.rebuild(out), given


@pytest.fixture(scope="module")
def cpu():
    executor = CPUExecutor()
    yield executor
    executor.close()


@fixed_examples(100, size=(1, 14), micro_batches=(2, 4))
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 14), micro_batches=st.integers(2, 4))
def test_any_schedule_of_any_graph_equals_plain_execution(
    cpu: CPUExecutor, seed: int, size: int, micro_batches: int
) -> None:
    rng = random.Random(seed)
    gm, tokens = RandomGraph(rng).build(size)
    capture = partition(gm, tokens=tokens)
    assert not capture.program.unsplittable
    total = rng.randint(micro_batches, 11)
    bounds = [0, *sorted(rng.sample(range(1, total), micro_batches - 1)), total]
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    inputs = {n: torch.tensor([[rng.randint(-3, 3)] * WIDTH for _ in range(total)]).double() for n in names}
    for x in inputs.values():
        x += torch.arange(WIDTH).double()
    expected_inputs = {k: v.clone() for k, v in inputs.items()}
    expected = gm(*(expected_inputs[n] for n in names))

    schedule = random_schedule(rng, capture, micro_batches, wild=True)
    try:
        plan = lower(schedule, "random")
    except ScheduleError as e:  # in-place writes and merges that do not go together
        assert "out of date" in str(e) or "merged" in str(e)
        SEEN["refused"] += 1
        schedule = random_schedule(rng, capture, micro_batches, wild=False)
        plan = lower(schedule, "random")
    verify(capture.program, plan)
    assert parse_plan(plan.to_text()) == plan
    assert parse_program(capture.program.to_text()) == capture.program
    SEEN["plans"] += 1
    SEEN["merged"] += sum(launch.stop - launch.start > 1 for launch in schedule.launches)
    SEEN["replaced"] += sum(launch.kernel != "" for launch in schedule.launches)
    SEEN["zero-copy"] += any(s.into for s in plan.actions)
    SEEN["in place"] += any(o.writes for o in capture.program.operators)
    SEEN["waits"] += sum(s.kind is ActionKind.WAIT for s in plan.actions)
    for executor in (SequentialExecutor(), cpu):
        out, given_inputs = run(executor, capture, schedule, plan, inputs, bounds)
        for got, want in zip(out, expected, strict=True):
            assert torch.equal(got, want), executor.name
        for n in names:
            assert torch.equal(given_inputs[n], expected_inputs[n]), f"argument {n} on {executor.name}"


def test_the_random_cases_reach_every_feature(report: Callable[[str], None]) -> None:
    report("random graphs: " + ", ".join(f"{k} {v}" for k, v in sorted(SEEN.items())))
    if SEEN["plans"] > 50:
        assert all(SEEN[k] > 5 for k in ("merged", "replaced", "zero-copy", "in place", "waits", "refused"))
