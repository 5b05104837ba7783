"""Values that are sums over the tokens: merged by addition, each share once, and never cut."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from cuda_standin import FakeCuda
from hypothesis import given, settings
from hypothesis import strategies as st
from random_programs import random_schedule
from random_sums import WIDTH, RandomSums, by_hand
from support import fixed_examples, manual, program_of, replaced
from test_mutations import delayed
from test_verify import plan_of

from dynaflow_serving.capture.examples import HIDDEN, loss_capture
from dynaflow_serving.config import ExecutorOptions
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.core.plan import ActionKind, Plan
from dynaflow_serving.core.program import Program, Scope, Value
from dynaflow_serving.errors import PlanError, ScheduleError
from dynaflow_serving.executor.cpu import CPUExecutor
from dynaflow_serving.executor.cuda import CUDAExecutor
from dynaflow_serving.executor.cuda_graph import WholePlanGraphs, why_not
from dynaflow_serving.executor.sequential import SequentialExecutor
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.session.plan_cache import PlanCache, no_context
from dynaflow_serving.strategies import build_strategy
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import cut_evenly

SEEN: Counter[str] = Counter()
SUM = """
value x batch:0
value s partial
value t partial
inputs x
op add_up network
  inputs x
  outputs s
op double compute
  inputs s
  outputs t
outputs t
"""


@pytest.fixture(scope="module")
def cpu() -> Iterator[CPUExecutor]:
    executor = CPUExecutor()
    yield executor
    executor.close()


def summed(plan: Plan, program: Program) -> int:
    """How many merges add."""
    merges = [a.instances[0].value for a in plan.actions if a.kind is ActionKind.MERGE]
    return sum(program.values[v].scope is Scope.PARTIAL for v in merges)


# -- results -----------------------------------------------------------------------------------------------------------


@fixed_examples(150, size=(2, 12), micro_batches=(2, 4))
@settings(max_examples=200, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), size=st.integers(2, 12), micro_batches=st.integers(2, 4))
def test_random_sums_equal_those_of_the_whole_batch(cpu: CPUExecutor, seed: int, size: int, micro_batches: int) -> None:
    rng = random.Random(seed)
    capture = RandomSums(rng, size).capture
    try:
        schedule = random_schedule(rng, capture.program, micro_batches, [])
        plan = lower(schedule, "random")
    except ScheduleError:
        SEEN["refused"] += 1
        return
    verify(capture.program, plan)
    SEEN["accepted"] += 1
    SEEN["additions"] += summed(plan, capture.program)
    bounds = [0, *accumulate(rng.randint(1, 5) for _ in range(micro_batches))]
    x = torch.randint(-4, 5, (bounds[-1], WIDTH), generator=torch.Generator().manual_seed(seed)).double()
    expected = by_hand(capture, x)
    for executor in (SequentialExecutor(), cpu):
        found = executor.bind(capture, plan, {})([x.clone()], bounds, no_context)
        for value, a, b in zip(capture.program.outputs, found, expected, strict=True):
            if capture.program.values[value].mean:  # a weight such as 1/3 is rounded
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-8)
            else:
                assert torch.equal(a, b), f"{value} on {executor.name}"


def test_most_random_sums_can_be_scheduled(report: Callable[[str], None]) -> None:
    report("random sums: " + ", ".join(f"{k} {v}" for k, v in sorted(SEEN.items())))
    if SEEN:
        assert SEEN["accepted"] > SEEN["refused"] and SEEN["additions"] > SEEN["accepted"] / 2


@pytest.mark.parametrize("name", ["sequential", "nanoflow", "dual_batch", "comm_overlap", "prefill_decode"])
@pytest.mark.parametrize("micro_batches", [2, 3])
def test_a_split_loss_and_gradient_equal_the_whole_ones(cpu: CPUExecutor, name: str, micro_batches: int) -> None:
    x = torch.randint(-2, 3, (7, HIDDEN), generator=torch.Generator().manual_seed(0)).float()
    y, loss, gradient = by_hand(loss_capture(), x)
    capture = delayed(loss_capture(), random.Random(0))
    for executor in (SequentialExecutor(), cpu):
        plan_cache = PlanCache(capture, FixedStrategy(build_strategy(name, {})), executor)
        for _ in range(3):
            found = plan_cache.run([x.clone()], cut_evenly(Batch((7,)), micro_batches))
            assert torch.equal(found[0], y) and torch.equal(found[2], gradient)
            torch.testing.assert_close(found[1], loss, rtol=1e-6, atol=0)  # the weights 2/7 and 3/7 are rounded


def test_shares_are_added_in_the_order_of_micro_batches_whatever_ran_first() -> None:
    """1e8 + 1 is 1e8 in float32: the sum tells in which order it was added."""
    program = program_of(SUM)
    capture = manual(program, add_up=lambda x: x.sum(), double=torch.clone)
    schedule = Schedule(program, 3)
    for micro_batch in (2, 0, 1):
        for name in ("add_up", "double"):
            (task,) = (t for t in schedule.get_ready_ops(micro_batch) if t.name == name)
            schedule.execute(task, "compute")
    plan = lower(schedule, "reversed")
    verify(program, plan)
    run = SequentialExecutor().bind(capture, plan, {}).run
    assert run([torch.tensor([1e8, 1.0, -1e8])], [0, 1, 2, 3], no_context)[0] == 0
    assert run([torch.tensor([1e8, -1e8, 1.0])], [0, 1, 2, 3], no_context)[0] == 1


def test_a_mean_of_a_batch_that_16_bits_can_hold_does_not_overflow() -> None:
    program = program_of(SUM.replace("partial", "partial:mean"))
    capture = manual(program, add_up=lambda x: x.mean(), double=lambda s: s * 2)
    plan = lower(build_strategy("sequential", {}).record(program, 2), "sequential")
    x = torch.full((40000,), 8.0, dtype=torch.float16)
    bound = SequentialExecutor().bind(capture, plan, {})
    assert " * ((c1) / (c2)) + v" in bound.source and " * ((c2 - c1) / (c2))  # merge t@0 t@1 -> t@0:2" in bound.source
    (found,) = bound([x], [0, 10000, 40000], no_context)
    assert found.dtype is torch.float16 and found == 16


def test_gradients_flow_through_an_addition(cpu: CPUExecutor) -> None:
    program = program_of(SUM)
    capture = manual(program, add_up=lambda x: x.square().sum(), double=lambda s: s * 2)
    plan = lower(build_strategy("nanoflow", {}).record(program, 2), "nanoflow", zero_copy=False)
    x = torch.arange(5.0, requires_grad=True)
    (found,) = cpu.bind(capture, plan, {})([x], [0, 2, 5], no_context)
    found.backward()
    assert found == 60 and torch.equal(x.grad, 4 * x.detach())


# -- schedules ---------------------------------------------------------------------------------------------------------


def scheduled(micro_batches: int, *launches: tuple[str, tuple[int, ...]], text: str = SUM) -> Schedule:
    schedule = Schedule(program_of(text), micro_batches)
    for name, mbs in launches:
        schedule.execute([t for t in schedule.get_ready_ops() if t.name == name and t.micro_batch in mbs], "compute")
    return schedule


def test_what_reads_a_merged_sum_apart_is_refused_with_the_remedy() -> None:
    with pytest.raises(ScheduleError, match=r"double cannot run for @0: s@0:2 is one sum .* Execute double for all of"):
        scheduled(3, ("add_up", (0, 1)), ("add_up", (2,)), ("double", (0,)))
    with pytest.raises(ScheduleError, match=r"double cannot run for @1:3: s@0:2 .* or add_up for one micro-batch at a"):
        scheduled(3, ("add_up", (0, 1)), ("add_up", (2,)), ("double", (1, 2)))


@pytest.mark.parametrize(
    ("launches", "merges"),
    [
        ((("add_up", (0, 1)), ("add_up", (2,)), ("double", (0, 1)), ("double", (2,))), ["t@0:2 t@2 -> t@0:3"]),
        ((("add_up", (0, 1)), ("add_up", (2,)), ("double", (0, 1, 2))), ["s@0:2 s@2 -> s@0:3"]),
        ((("add_up", (0,)), ("add_up", (1, 2)), ("double", (0,)), ("double", (1, 2))), ["t@0 t@1:3 -> t@0:3"]),
        ((("add_up", (0, 1, 2)), ("double", (0, 1, 2))), []),
    ],
)
def test_a_merged_sum_is_read_for_the_same_micro_batches_or_more(
    launches: tuple[tuple[str, tuple[int, ...]], ...], merges: list[str]
) -> None:
    plan = lower(scheduled(3, *launches), "manual")
    verify(program_of(SUM), plan)
    assert [str(a) for a in plan.actions if a.kind is ActionKind.MERGE] == [f"merge {m}" for m in merges]
    capture = manual(program_of(SUM), add_up=lambda x: x.sum(), double=lambda s: s * 2)
    assert SequentialExecutor().bind(capture, plan, {})([torch.arange(6.0)], [0, 1, 3, 6], no_context)[0] == 30


def test_lowering_too_refuses_to_cut_a_sum() -> None:
    """`Schedule` refuses such launches, so they are put in behind its back."""
    schedule = scheduled(2, ("add_up", (0, 1)), ("double", (0, 1)))
    merged = schedule.launches.pop()
    schedule.launches += [dataclasses.replace(merged, start=mb, stop=mb + 1) for mb in (0, 1)]
    with pytest.raises(ScheduleError, match=r"s@0:2 is one sum over these micro-batches and cannot be cut for s@0"):
        lower(schedule, "manual")


def test_a_sum_written_in_place_while_merged_is_not_read_apart() -> None:
    text = SUM.replace("op double", "op negate compute\n  inputs s\n  writes s\nop double")
    launches = (("add_up", (0,)), ("add_up", (1,)), ("negate", (0, 1)))
    with pytest.raises(ScheduleError, match="s@0:2 is one sum"):
        lower(scheduled(2, *launches, ("double", (0,)), ("double", (1,)), text=text), "manual")
    verify(program_of(text), lower(scheduled(2, *launches, ("double", (0, 1)), text=text), "manual"))


def test_prefill_decode_makes_a_sum_apart_for_a_reader_that_is_apart() -> None:
    """`use` has context and cannot be merged, and nothing can cut what `twice` and `add_up` would make for both."""
    program = program_of("""
        value x batch:0
        value s partial
        value t partial
        value u partial
        value z batch:0
        inputs x
        op add_up compute
          inputs x
          outputs s
        op scale compute
          inputs x
          outputs z
        op twice compute
          inputs s
          outputs t
        op use compute context
          inputs t
          outputs u
        outputs u z
    """)
    plan = lower(build_strategy("prefill_decode", {}).record(program, 2), "prefill_decode")
    verify(program, plan)
    assert [a.operators[0] for a in plan.actions if (a.start, a.stop) == (0, 2)] == ["scale"]
    assert "merge u@0 u@1 -> u@0:2" in map(str, plan.actions)


def test_token_weave_shards_no_sum() -> None:
    """A sum over the tokens of one rank's shard would be another sum."""
    program = program_of("""
        value x batch:0
        value y batch:0
        value s partial
        inputs x
        op all_reduce network
          tags all_reduce
          inputs x
          outputs y
        op add_up compute
          tags replicated
          inputs y
          outputs s
        outputs s
    """)
    with pytest.raises(ScheduleError, match=r"none of the 1 operators that follow an all-reduce .* can run on a shard"):
        build_strategy("token_weave", {}).record(program, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SUM.replace("inputs x\nop", "value g partial\ninputs x g\nop"), "input g is a sum over all tokens"),
        (
            SUM.replace("value t partial", "value total shared\nvalue t partial storage=total")
            .replace("inputs x\nop", "inputs x total\nop")
            .replace("  inputs s\n", "  inputs s total\n  writes total\n"),
            "t is a sum in total, which all micro-batches share and write in place",
        ),
    ],
)
def test_programs_whose_sums_have_no_shares_are_not_split(text: str, message: str) -> None:
    program = program_of(text)
    one = lower(build_strategy("sequential", {}).record(program, 1), "sequential")
    verify(program, one)
    with pytest.raises(ScheduleError, match=f"cannot be split: {message}"):
        Schedule(program, 2)
    with pytest.raises(PlanError, match=f"cannot be split: {message}"):
        verify(program, dataclasses.replace(one, micro_batches=2))


def test_only_a_sum_can_be_a_mean() -> None:
    with pytest.raises(ValueError, match="value x: a mean over the tokens has scope partial, not batch"):
        Value("x", Scope.BATCH, 0, mean=True)


# -- the verifier ------------------------------------------------------------------------------------------------------
GOOD = """
    compute | split x@0:3 -> x@0
    compute | split x@0:3 -> x@1
    compute | split x@0:3 -> x@2
    compute | record e0
    network | wait e0
    network | run add_up @0
    network | run add_up @1
    network | run add_up @2
    network | record e1
    compute | wait e1
    compute | merge s@0 s@1 s@2 -> s@0:3
    compute | run double @0:3
    compute | free x@0 x@1 x@2 s@0 s@1 s@2 s@0:3
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("merge s@0 s@1 s@2", "merge s@0 s@1", "do not tile s@0:3"),
        ("merge s@0 s@1 s@2", "merge s@0 s@2", "do not tile s@0:3"),
        ("merge s@0 s@1 s@2", "merge s@0 s@1 s@1 s@2", "do not tile s@0:3"),
        ("merge s@0 s@1 s@2", "merge s@1 s@0 s@2", "do not tile s@0:3"),
        ("merge s@0 s@1 s@2", "merge s@0 s@1 -> s@0:2\n    compute | merge s@0:2 s@1 s@2", "do not tile s@0:3"),
        (
            "merge s@0 s@1 s@2",
            "merge s@0 s@1 -> s@0:2\n    compute | merge s@1 s@2 -> s@1:3\n    compute | merge s@0:2 s@1:3",
            "do not tile s@0:3",
        ),
        ("compute | wait e1\n", "", "s@0 is read without waiting for action 5"),
        ("network | run add_up @2\n", "", "s@2 is read before it is produced"),
        ("compute | merge", "compute | alloc s@0:3\n    compute | merge", "only values with a token axis have merge"),
        ("run add_up @0\n", "run add_up @0 into s\n", "cannot write s into a given buffer"),
        ("compute | run double @0:3", "compute | split s@0:3 -> s@0:2", "s@0:3 is one sum .* cannot be split"),
        ("run double @0:3", "run double @0", "output t is not there|never runs"),
        ("compute | merge", "compute | free s@0\n    compute | merge", "after it is freed"),
        ("s@2 s@0:3", "s@2", "s@0:3 is never freed"),
    ],
)  # fmt: skip
def test_the_verifier_rejects(old: str, new: str, message: str) -> None:
    program = program_of(SUM)
    verify(program, plan_of(program, GOOD, micro_batches=3))
    assert old in GOOD
    with pytest.raises(PlanError, match=message):
        verify(program, plan_of(program, GOOD.replace(old, new, 1), micro_batches=3))


def test_the_verifier_takes_sums_of_sums() -> None:
    program = program_of(SUM)
    nested = GOOD.replace("merge s@0 s@1 s@2", "merge s@0 s@1 -> s@0:2\n    compute | merge s@0:2 s@2")
    verify(program, plan_of(program, nested.replace("free x@0", "free s@0:2 x@0"), 3))


# -- executors ---------------------------------------------------------------------------------------------------------


def test_a_missing_wait_is_seen_by_real_threads(cpu: CPUExecutor) -> None:
    program = program_of(SUM)
    capture = manual(program, add_up=lambda x: x.sum(), double=lambda s: s * 2)
    good = plan_of(program, GOOD, 3)
    args: tuple[Any, ...] = ([torch.arange(6.0)], [0, 2, 4, 6], no_context)
    assert cpu.bind(capture, good, {})(*args)[0] == 30
    racy = replaced(good, [a for a in good.actions if not (a.kind is ActionKind.WAIT and a.stream == "compute")])
    slow = delayed(capture, random.Random(1))
    with pytest.raises(TypeError, match="NoneType"):
        for _ in range(50):
            cpu.bind(slow, racy, {})(*args)


def test_cuda_executors_add_and_capture_the_additions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WholePlanGraphs, "device_type", "cpu")
    x = torch.randint(-2, 3, (8, HIDDEN), generator=torch.Generator().manual_seed(0)).float()
    plan = lower(build_strategy("nanoflow", {}).record(loss_capture().program, 2), "nanoflow")
    for graph in ("off", "whole"):
        cuda = FakeCuda()
        run = CUDAExecutor(ExecutorOptions(graph=graph), cuda).bind(loss_capture(), plan, {})
        for step in range(4):  # the first is eager, the second is captured, the others are replayed
            with torch.no_grad():
                found = run([x + step], [0, 4, 8], no_context)
            assert all(map(torch.equal, found, by_hand(loss_capture(), x + step)))
        assert sum(entry[0] == "replay" for entry in cuda.log) == (3 if graph == "whole" else 0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (SUM.replace("outputs t\n", "outputs t s\n", 2).replace("  outputs t s\n", "  outputs t\n")
         .replace("value t partial", "value t partial storage=s"), "t and s share memory"),
        (SUM.replace("inputs x\nop", "value g partial\ninputs x g\nop"), "input g has no token axis"),
    ],
)  # fmt: skip
def test_sums_that_a_graph_cannot_have(text: str, reason: str) -> None:
    program = program_of(text)
    assert reason in why_not(program, program.inputs, static_context=False)
