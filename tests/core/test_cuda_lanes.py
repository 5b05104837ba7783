"""The issue order for graph capture: the same happens-before, and lanes that do not grow with the layers."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_order import closure
from random_programs import random_plan
from support import TWO_NETWORK, fixed_examples, program_of, replaced

from dynaflow_serving.capture import examples
from dynaflow_serving.core.parse import parse_plan
from dynaflow_serving.core.plan import COMPUTE_STREAM, Action, ActionKind, Plan
from dynaflow_serving.core.program import Program
from dynaflow_serving.errors import PlanError
from dynaflow_serving.executor.lanes import lanes, reorder
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.strategies import get_strategy

SEEN: Counter[str] = Counter()


@fixed_examples(60, size=(1, 16), micro_batches=(1, 4))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 16), micro_batches=st.integers(1, 4))
def test_reordering_keeps_happens_before_and_issues_side_streams_last(seed: int, size: int, micro_batches: int) -> None:
    rng = random.Random(seed)
    if (planned := random_plan(rng, size, micro_batches)) is None:
        return
    program, plan = planned
    ordered = reorder(plan)
    for stream in plan.streams:
        assert [s for s in ordered.actions if s.stream == stream] == [s for s in plan.actions if s.stream == stream]
    assert len(ordered.actions) == len(plan.actions)
    assert closure(ordered) == closure(plan)
    verify(program, ordered)
    assert reorder(ordered) == ordered
    check_no_side_action_is_early(ordered)
    SEEN["plans"] += 1
    SEEN["changed"] += ordered != plan


def check_no_side_action_is_early(plan: Plan) -> None:
    """When a side action is issued, the compute stream can go no further, or has ended."""
    recorded: set[int] = set()
    compute = [s for s in plan.actions if s.stream == COMPUTE_STREAM]
    at = 0
    for action in plan.actions:
        if action.stream == COMPUTE_STREAM:
            at += 1
        elif at < len(compute):
            assert compute[at].kind is ActionKind.WAIT and compute[at].event not in recorded
        if action.kind is ActionKind.RECORD:
            recorded.add(action.event)


def test_the_random_plans_are_mostly_reordered(report: pytest.FixtureRequest) -> None:
    report("plans reordered for capture: " + ", ".join(f"{k} {v}" for k, v in sorted(SEEN.items())))
    if SEEN["plans"] > 20:
        assert SEEN["changed"] * 2 > SEEN["plans"]


@cache
def of_layers(model: str, layers: int) -> Program:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "LAYERS", layers)
        return examples.example_capture(model).program


@pytest.mark.parametrize("strategy", ["nanoflow", "dual_batch", "prefill_decode", "branches"])
@pytest.mark.parametrize("model", ["llama", "moe", "dit"])
def test_lanes_do_not_grow_with_layers(model: str, strategy: str) -> None:
    counts = []
    for layers in (2, 5):
        program = of_layers(model, layers)
        plan = lower(get_strategy(strategy)().record(program, 2), strategy)
        ordered = reorder(plan)
        verify(program, ordered)
        counts.append((lanes(ordered), lanes(plan), len(plan.streams)))
    (few, _, streams), (many, before, _) = counts
    assert few == many <= streams + 1
    assert many <= before


def side_block(layers: int, order: str) -> Plan:
    """Per layer a fork f, a side block s, the main chain m n, a join j; `order` says how they are recorded."""
    run: list[Action] = []
    for i in range(layers):
        fork, join = 2 * i, 2 * i + 1
        actions = {op: Action(ActionKind.RUN, COMPUTE_STREAM, (f"{op}{i}",), 0, 1) for op in "fmnj"}
        block = [Action(ActionKind.WAIT, "side", event=fork), Action(ActionKind.RUN, "side", (f"s{i}",), 0, 1)]
        for op in order:
            if op == "j":
                run.append(Action(ActionKind.WAIT, COMPUTE_STREAM, event=join))
            run += [*block, Action(ActionKind.RECORD, "side", event=join)] if op == "s" else [actions[op]]
            if op == "f":
                run.append(Action(ActionKind.RECORD, COMPUTE_STREAM, event=fork))
    return Plan("hand", "-", 1, (), tuple(run))


@pytest.mark.parametrize(("order", "expected"), [("fsmnj", 1 + 20), ("fmsnj", 1 + 20), ("fmnsj", 2)])
def test_the_model_of_lanes_explains_what_was_observed(order: str, expected: int) -> None:
    """sglang#39420: a side block recorded first costs lanes per layer; moving it at the fork does not help
    (144 -> 144); recorded right before its join it does."""
    plan = side_block(20, order)
    assert lanes(plan) == expected
    assert lanes(reorder(plan)) == 2
    assert reorder(plan) == side_block(20, "fmnsj")


def test_verify_guards_against_a_free_that_relied_on_the_issue_order() -> None:
    """Not what lowering writes: y, of the network stream, is freed before the join, so later work must not be late."""
    program = program_of(TWO_NETWORK)
    text = """
        compute | record e0
        network | wait e0
        network | run make @0
        network | record e1
        network | run other @0
        network | record e2
        compute | wait e1
        compute | run read @0
        compute | free y@0
        compute | wait e2
    """
    plan = parse_plan(f"plan hand program={program.digest} micro_batches=1 depends=-\n{text}")
    verify(program, plan)
    ordered = reorder(plan)
    assert [s.operators for s in ordered.actions if s.operators] == [("make",), ("read",), ("other",)]
    with pytest.raises(PlanError, match="may reuse its memory too early"):
        verify(program, ordered)
    assert closure(replaced(ordered, list(ordered.actions))) == closure(plan)
