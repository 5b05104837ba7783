"""Wrong plans, written by hand, that the verifier must reject: one per promise of its contract."""

from __future__ import annotations

import textwrap

import pytest
from support import program_of

from dynaflow_serving.core.parse import parse_plan
from dynaflow_serving.core.plan import Plan
from dynaflow_serving.core.program import Program
from dynaflow_serving.errors import PlanError
from dynaflow_serving.planning.verify import verify

IN_PLACE = """
value x batch:0
value y batch:0
value a batch:0
value b batch:0
inputs x
op make compute
  inputs x
  outputs y
op early compute
  inputs y
  outputs a
op bump compute
  inputs y
  writes y
op late compute
  inputs y
  outputs b
outputs a b
"""
CHAIN = """
value x batch:0
value y batch:0
value z batch:0
inputs x
op first network group=tp
  inputs x
  outputs y
  writes cache
  into y
op second network group=tp context
  inputs y
  outputs z
  reads cache
outputs z
"""


def plan_of(program: Program, actions: str, micro_batches: int = 2, depends: str = "-") -> Plan:
    head = f"plan hand program={program.digest} micro_batches={micro_batches} depends={depends}\n"
    lines = [line for line in textwrap.dedent(actions).splitlines() if line.strip()]
    return parse_plan(head + "\n".join(line if "|" in line else f"compute | {line}" for line in lines))


START = """
    split x@0:2 -> x@0
    split x@0:2 -> x@1
    run make @0
    run make @1
"""
END = """
    merge b@0 b@1 -> b@0:2
    free x@0 x@1 y@0 y@1 b@0 b@1
"""


def test_a_merged_copy_does_not_see_later_writes_to_its_parts() -> None:
    program = program_of(IN_PLACE)
    middle = "merge y@0 y@1 -> y@0:2\nrun early @0:2\nrun bump @0\nrun bump @1\n"
    verify(program, plan_of(program, f"{START}{middle}run late @0\nrun late @1\n{END}free y@0:2"))
    stale = plan_of(program, f"{START}{middle}run late @0:2\nfree x@0 x@1 y@0 y@1 y@0:2")
    with pytest.raises(PlanError, match=r"late@0 does not see what action \d+ wrote to y"):
        verify(program, stale)


def test_parts_do_not_see_a_write_to_their_merged_copy() -> None:
    program = program_of(IN_PLACE)
    early = "run early @0\nrun early @1\nmerge a@0 a@1 -> a@0:2\n"
    middle = early + "merge y@0 y@1 -> y@0:2\nrun bump @0:2\n"
    verify(program, plan_of(program, f"{START}{middle}run late @0:2\nfree x@0 x@1 y@0 y@1 y@0:2 a@0 a@1"))
    with pytest.raises(PlanError, match=r"late@0 does not see what action \d+ wrote to y"):
        verify(program, plan_of(program, f"{START}{middle}run late @0\nrun late @1\n{END}free y@0:2 a@0 a@1"))


def test_an_argument_holds_what_is_written_to_it() -> None:
    program = program_of(
        IN_PLACE.replace("value y batch:0", "value y batch:0 storage=x").replace("writes y", "writes x")
    )
    early = "run early @0\nrun early @1\nmerge a@0 a@1 -> a@0:2\nmerge y@0 y@1 -> y@0:2\nrun bump @0:2\n"
    with pytest.raises(PlanError, match="this write to x is not in x@0:2"):
        verify(program, plan_of(program, f"{START}{early}run late @0:2\nfree x@0 x@1 y@0 y@1 y@0:2 a@0 a@1"))


GOOD = """
    compute | split x@0:2 -> x@0
    compute | split x@0:2 -> x@1
    compute | record e0
    network | wait e0
    network | run first @0
    network | run first @1
    network | record e1
    compute | wait e1
    compute | run second @0
    compute | run second @1
    compute | merge z@0 z@1 -> z@0:2
    compute | free x@0 x@1 y@0 y@1 z@0 z@1
"""


def test_the_hand_written_plan_is_right() -> None:
    program = program_of(CHAIN)
    verify(program, plan_of(program, GOOD))
    verify(program, plan_of(program, GOOD, depends="0>1"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("compute | wait e1\n", "", "read without waiting"),
        ("run second @0\n    compute | run second @1", "run second @0:2", "one micro-batch at a time"),
        ("compute | run second @1\n", "", "read before it is produced"),
        ("run second @1", "run second @0", "runs twice"),
        ("run second @1", "run third @1", "no operator 'third'"),
        ("run second @1", "run second @2", "2 micro-batches only"),
        ("wait e0", "wait e7", "waited for before it is recorded"),
        ("record e1", "record e0", "recorded twice"),
        ("merge z@0 z@1 -> z@0:2", "merge z@1 z@0 -> z@0:2", "do not tile"),
        ("merge z@0 z@1 -> z@0:2", "merge z@0 -> z@0:2", "do not tile"),
        ("free x@0", "free z@0:2 x@0", "output z is not there"),
        ("free x@0 ", "free ", "never freed"),
        ("free x@0 ", "free x@0 x@0:2 ", "the plan did not make it"),
        ("run first @0", "run first @0 into y", "not allocated before it is written"),
        ("compute | run second @0", "compute | alloc y@0:2\n    compute | run second @0", "never merged"),
        ("split x@0:2 -> x@1", "split x@0:2 -> y@1", "is not a part of"),
        ("network | wait e0\n", "", "read without waiting"),
        ("    network | run first @0\n", "    memory | run first @0\n", "read without waiting"),
        ("run first @0\n", "replace first @0 with fast\n", None),
    ],
)
def test_one_wrong_step(old: str, new: str, message: str | None) -> None:
    program = program_of(CHAIN)
    assert old in GOOD
    broken = plan_of(program, GOOD.replace(old, new, 1))
    if message is None:
        verify(program, broken)
        return
    with pytest.raises(PlanError, match=message):
        verify(program, broken)


def test_operators_with_context_may_run_on_any_stream() -> None:
    program = program_of(CHAIN)
    moved = GOOD.replace("    network | record e1\n", "").replace("    compute | wait e1\n", "")
    moved = moved.replace("compute | run second @0", "network | run second @0").replace(
        "compute | run second @1", "network | run second @1\n    network | record e1\n    compute | wait e1"
    )
    verify(program, plan_of(program, moved))


def test_a_stream_starts_after_the_caller() -> None:
    """Without a fork it could reuse memory that the caller's stream still reads, whatever its operators read."""
    program = program_of(
        """
        value w shared
        value y shared
        value x batch:0
        value z batch:0
        inputs x w
        op prepare network
          inputs w
          outputs y
        op use compute
          inputs x y
          outputs z
        outputs z
        """
    )
    plan = """
        compute | record e0
        network | wait e0
        network | run prepare @0
        network | record e1
        compute | wait e1
        compute | run use @0
        compute | free y@0
    """
    verify(program, plan_of(program, plan, micro_batches=1))
    with pytest.raises(PlanError, match="stream 'network' is not forked"):
        verify(program, plan_of(program, plan.replace("network | wait e0\n", "\n"), micro_batches=1))


def test_states_of_dependent_micro_batches() -> None:
    program = program_of(CHAIN.replace("group=tp", "").replace(" context", ""))
    late = """
        split x@0:2 -> x@0
        split x@0:2 -> x@1
        run first @1
        run second @1
        run first @0
        run second @0
        merge z@0 z@1 -> z@0:2
        free x@0 x@1 y@0 y@1 z@0 z@1
    """
    verify(program, plan_of(program, late))
    with pytest.raises(PlanError, match=r"does not wait for action \d+, which writes cache"):
        verify(program, plan_of(program, late, depends="0>1"))


def test_collectives_of_a_group_have_one_order() -> None:
    program = program_of(CHAIN.replace(" context", ""))
    two = GOOD.replace("    network | run first @1\n", "").replace(
        "    compute | run second @0\n",
        "    memory | wait e0\n    memory | run first @1\n    memory | record e2\n    compute | wait e2\n"
        "    compute | run second @0\n",
    )
    with pytest.raises(PlanError, match="collectives of group 'tp' are not ordered"):
        verify(program, plan_of(program, two))


def test_memory_goes_back_to_the_stream_that_allocated_it() -> None:
    """y is made on the network stream: freed elsewhere, that stream could reuse it before its reader is done."""
    early = GOOD.replace("    network | run first @1\n    network | record e1\n", "    network | record e1\n").replace(
        "    compute | run second @0\n    compute | run second @1\n",
        "    compute | run second @0\n    compute | free y@0\n    compute | record e3\n"
        "    network | {wait}run first @1\n    network | record e2\n"
        "    compute | wait e2\n    compute | run second @1\n",
    )
    early = early.replace("y@0 y@1 z@0", "y@1 z@0").replace("group=tp", "")
    program = program_of(CHAIN.replace(" context", "").replace(" group=tp", ""))
    with pytest.raises(PlanError, match="may reuse its memory too early"):
        verify(program, plan_of(program, early.format(wait="")))
    verify(program, plan_of(program, early.format(wait="wait e3\n    network | ")))


def test_overlapping_buffers() -> None:
    program = program_of(CHAIN)
    with pytest.raises(PlanError, match="are two buffers for y@1"):
        verify(program, plan_of(program, "alloc y@0:2\nalloc y@1:3", micro_batches=3))


def test_another_program_and_an_unsplittable_one() -> None:
    program = program_of(CHAIN)
    other = program_of(CHAIN.replace("cache", "kv"))
    with pytest.raises(PlanError, match="the plan is for program"):
        verify(other, plan_of(program, GOOD))
    fixed = Program(program.inputs, program.outputs, program.values, program.operators, "it mixes")
    with pytest.raises(PlanError, match="cannot be split: it mixes"):
        verify(fixed, plan_of(fixed, GOOD))
