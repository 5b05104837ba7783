"""Random Programs: the verifier accepts what lowering returns, and text forms round-trip."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_programs import random_program, random_schedule
from support import fixed_examples

from dynaflow_serving.core.parse import parse_plan, parse_program
from dynaflow_serving.core.plan import ActionKind
from dynaflow_serving.core.program import Operator, Program, Resource, Scope, Value
from dynaflow_serving.errors import ScheduleError, TextError
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.strategy.schedule import Schedule

SEEN: Counter[str] = Counter()


@fixed_examples(200, size=(1, 16), micro_batches=(1, 4))
@settings(max_examples=400, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 16), micro_batches=st.integers(1, 4))
def test_what_lowering_returns_is_correct(seed: int, size: int, micro_batches: int) -> None:
    rng = random.Random(seed)
    program = random_program(rng, size)
    pairs = [(i, j) for i in range(micro_batches) for j in range(i + 1, micro_batches)]
    depends = sorted(rng.sample(pairs, rng.randint(0, len(pairs))))
    assert parse_program(program.to_text()) == program
    assert parse_program(program.to_text()).to_text() == program.to_text()
    try:
        plan = lower(random_schedule(rng, program, micro_batches, depends), "random", zero_copy=rng.random() < 0.8)
    except ScheduleError:
        SEEN["refused"] += 1
        return
    SEEN["accepted"] += 1
    SEEN["merges"] += sum(s.kind is ActionKind.MERGE for s in plan.actions)
    SEEN["waits"] += sum(s.kind is ActionKind.WAIT for s in plan.actions)
    SEEN["buffers"] += sum(s.kind is ActionKind.ALLOC for s in plan.actions)
    verify(program, plan)
    assert parse_plan(plan.to_text()) == plan
    assert parse_plan(plan.to_text()).to_text() == plan.to_text()
    both = program.to_text() + "\n# a comment\n" + plan.to_text()
    assert (parse_program(both), parse_plan(both)) == (program, plan)


def test_the_random_programs_are_mostly_accepted(report: Callable[[str], None]) -> None:
    report("random programs: " + ", ".join(f"{k} {v}" for k, v in sorted(SEEN.items())))
    if SEEN:
        assert SEEN["accepted"] > SEEN["refused"]


def test_a_program_of_a_thousand_operators_is_planned_in_seconds() -> None:
    """All of them write one residual in place, and one engine state: nothing here is quadratic."""
    values = {v: Value(v, Scope.BATCH, 0) for v in ("x", *(f"y{i}" for i in range(1000)))}
    operators = tuple(
        Operator(f"op{i}", Resource.NETWORK if i % 3 else Resource.COMPUTE, ("x", f"y{i - 1}") if i else ("x",),
                 (f"y{i}",), writes=("x", "cache"), group="tp" * bool(i % 3))
        for i in range(1000)
    )  # fmt: skip
    program = Program(("x",), ("y999",), values, operators)
    started = time.perf_counter()
    plan = lower(get_strategy("nanoflow")().record(program, 2, [(0, 1)]), "nanoflow")
    verify(program, plan)
    assert time.perf_counter() - started < 10  # about 1 s where nothing else runs
    assert sum(s.kind is ActionKind.RUN for s in plan.actions) == 2000


def test_names_that_look_like_headers_round_trip() -> None:
    values = {v: Value(v, Scope.BATCH, 0) for v in ("program", "plan")}
    program = Program(
        ("program",), ("plan",), values, (Operator("op", Resource.COMPUTE, ("program",), ("plan",)),), "a | b: c"
    )
    assert parse_program(program.to_text()) == program
    s = Schedule(Program(program.inputs, program.outputs, values, program.operators), 2)
    for task in s.get_ready_ops():
        s.execute(task, "program")
    plan = lower(s, "x")
    assert parse_plan(plan.to_text()) == plan
    assert parse_plan(program.to_text() + plan.to_text()) == plan


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_plan, "plan x", "line 1: 'plan x' is not 'plan NAME"),
        (
            parse_plan,
            "plan x program=1 micro_batches=1 depends=-\ncompute | jump a@0",
            "line 2: .*an action is one of: run, ",
        ),
        (parse_plan, "plan x program=1 micro_batches=1 depends=-\n\ncompute | free a", "line 3: .*is not an instance"),
        (parse_plan, "program", "no plan found"),
        (parse_program, "", "no program found"),
        (parse_program, "program\nvalue x batch", "line 2: .*axis=None"),
        (parse_program, "program\nvalue x sideways", "line 2: .*sideways"),
        (parse_program, "program\nvalue x partial:0", "line 2: .*axis=0 does not fit scope partial"),
        (parse_program, "program\nvalue x local:mean", "line 2: .*a mean over the tokens has scope partial, not local"),
        (parse_program, "program\nop a compute\n  colour red", "colour"),
        (parse_program, "program\nnonsense", "line 2: .*unknown field"),
    ],
)
def test_unreadable_text_says_where(parse: Callable[[str], object], text: str, message: str) -> None:
    with pytest.raises(TextError, match=message):
        parse(text)
