"""The simulator: what must hold for every plan, and timelines worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import lowered, program_of, without

from dynaflow_serving.core.plan import Action, ActionKind, Plan
from dynaflow_serving.core.program import Program, Resource
from dynaflow_serving.errors import ConfigError, PlanError
from dynaflow_serving.planning.happens_before import contains, happens_before
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.simulate import (
    Demand,
    MeasuredCosts,
    simulate,
)
from dynaflow_serving.simulate.engine import share
from dynaflow_serving.strategies import get_strategy

SHARES = st.fixed_dictionaries({}, optional={r: st.floats(0.01, 1) for r in Resource})
SECONDS = st.one_of(st.just(0.0), st.floats(1e-6, 1))


@st.composite
def timed_plans(draw: st.DrawFn) -> tuple[Plan, list[Demand | None]]:
    """Runs on three streams, with a WAIT for any earlier RECORD now and then."""
    steps: list[Action] = []
    events = 0
    for i in range(draw(st.integers(1, 14))):
        stream = draw(st.sampled_from(("compute", "network", "side")))
        if events and draw(st.booleans()):
            steps.append(Action(ActionKind.WAIT, stream, event=draw(st.integers(0, events - 1))))
        steps.append(Action(ActionKind.RUN, stream, (f"op{i}",), 0, 1))
        if draw(st.booleans()):
            steps.append(Action(ActionKind.RECORD, stream, event=events))
            events += 1
    demands = [
        Demand(draw(SECONDS), draw(SHARES), draw(SECONDS), draw(SECONDS)) if s.kind is ActionKind.RUN else None
        for s in steps
    ]
    return Plan("random", "0", 1, (), tuple(steps)), demands


@settings(max_examples=400, deadline=None, derandomize=True)
@given(timed=timed_plans())
def test_the_makespan_has_its_bounds_and_streams_and_events_are_in_order(
    timed: tuple[Plan, list[Demand | None]],
) -> None:
    plan, demands = timed
    timeline = simulate(plan, demands)
    real = [d for d in demands if d is not None]
    slack = 1 + 1e-9
    assert timeline.makespan * slack >= timeline.critical_path
    assert timeline.makespan <= sum(d.alone + d.issue for d in real) * slack
    for resource in Resource:
        assert timeline.makespan * slack >= timeline.busy[resource]
    assert 0 <= timeline.overlapped <= timeline.makespan * slack
    assert 0 <= timeline.exposed_network <= timeline.makespan * slack
    assert sum(demands[i].alone for i in timeline.critical) <= timeline.critical_path * slack  # type: ignore[union-attr]
    before = happens_before(plan)
    for a in timeline.spans:
        assert a.end - a.start >= demands[a.index].alone * (1 - 1e-9)  # type: ignore[union-attr]
        for b in timeline.spans:
            if contains(before[b.index], a.index):
                assert a.end <= b.start * slack
    assert {s.index for s in timeline.spans} == {i for i, d in enumerate(demands) if d is not None and d.alone > 0}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(timed=timed_plans(), factor=st.floats(0.1, 10))
def test_a_device_that_is_faster_in_everything_is_faster_by_as_much(
    timed: tuple[Plan, list[Demand | None]], factor: float
) -> None:
    plan, demands = timed
    scaled = [d and Demand(d.seconds * factor, d.shares, d.latency * factor, d.issue * factor) for d in demands]
    assert simulate(plan, scaled).makespan == pytest.approx(simulate(plan, demands).makespan * factor)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(wanted=st.lists(SHARES, min_size=1, max_size=6))
def test_nobody_is_sped_up_no_resource_is_overfull_and_the_device_is_not_idle(
    wanted: list[dict[Resource, float]],
) -> None:
    rates = share(wanted)
    assert all(0 < rate <= 1 for rate in rates)
    load = {r: sum(x * w.get(r, 0.0) for x, w in zip(rates, wanted)) for r in Resource}
    assert max(load.values()) <= 1 + 1e-9
    assert min(rates) == 1 or max(load.values()) > 1 - 1e-9


def test_two_alike_take_twice_as_long_and_complements_hardly_disturb_each_other() -> None:
    compute = {Resource.COMPUTE: 1.0, Resource.MEMORY: 0.2}
    memory = {Resource.COMPUTE: 0.2, Resource.MEMORY: 1.0}
    network = {Resource.NETWORK: 1.0, Resource.COMPUTE: 0.1}
    assert share([compute, compute]) == [0.5, 0.5]
    assert min(share([compute, memory])) == pytest.approx(0.8)
    assert share([compute, network]) == pytest.approx([0.9, 1.0])  # its few multiprocessors are its own


PAIR = """
value x batch:0
value y batch:0
value z batch:0
inputs x
op work compute
  inputs x
  outputs y
op send network
  inputs y
  outputs z
outputs z
"""


def in_turn(program: Program, n: int) -> Plan:
    return lower(get_strategy("sequential")().record(program, n), "sequential")


def overlapped(program: Program) -> Plan:
    order = (("work", 0, "compute"), ("send", 0, "network"), ("work", 1, "compute"), ("send", 1, "network"))
    return lowered(program, 2, *order)


def test_the_timeline_of_two_overlapped_micro_batches() -> None:
    program = program_of(PAIR)
    seconds = {("work", 0): 3.0, ("work", 1): 3.0, ("send", 0): 2.0, ("send", 1): 2.0}
    one = in_turn(program, 2)
    assert simulate(one, MeasuredCosts(program, seconds).demands(one)).makespan == 10
    plan = overlapped(program)
    t = simulate(plan, MeasuredCosts(program, seconds).demands(plan))
    assert [(s.action.operators[0], s.action.start, s.start, s.end) for s in t.spans] == [
        ("work", 0, 0, 3), ("send", 0, 3, 5), ("work", 1, 3, 6), ("send", 1, 6, 8)
    ]  # fmt: skip
    assert (t.makespan, t.critical_path, t.overlapped, t.exposed_network, t.overlap) == (8, 8, 2, 2, 0.25)
    assert [plan.actions[i].operators[0] for i in t.critical] == ["work", "work", "send"]
    assert t.busy == {Resource.COMPUTE: 6, Resource.MEMORY: 0, Resource.NETWORK: 4}
    slowed = simulate(plan, MeasuredCosts(program, seconds, network_compute=0.5).demands(plan))
    assert slowed.makespan == 9  # work@1 runs at half speed for the 2 seconds of send@0


def test_more_bandwidth_can_slow_a_plan_with_streams_but_never_its_operators() -> None:
    """What the engine's contract says: the shortened operator's successor gets in beside the critical one."""
    steps = [
        Action(ActionKind.RUN, "side", ("short",), 0, 1),
        Action(ActionKind.RUN, "side", ("rival",), 0, 1),
        Action(ActionKind.RUN, "compute", ("critical",), 0, 1),
        Action(ActionKind.RUN, "compute", ("tail",), 0, 1),
    ]
    plan = Plan("anomaly", "0", 1, (), tuple(steps))

    def makespan(short: float) -> float:
        alone = {"short": {Resource.NETWORK: 1.0}, "tail": {Resource.MEMORY: 1.0}}
        seconds = {"short": short, "rival": 4.0, "critical": 4.0, "tail": 4.0}
        return simulate(plan, [Demand(seconds[n], alone.get(n, {Resource.COMPUTE: 1.0})) for n in seconds]).makespan

    assert makespan(4.0) == 8
    assert makespan(2.0) == 10


def test_a_plan_that_waits_for_ever_is_an_error() -> None:
    program = program_of(PAIR)
    plan = without(overlapped(program), ActionKind.RECORD, "compute")
    demands = MeasuredCosts(program, {(o, mb): 1.0 for o in ("work", "send") for mb in (0, 1)}).demands(plan)
    with pytest.raises(
        PlanError, match=r"never ends: .*stream 'network' for event e0 wait for an event that is not recorded"
    ):
        simulate(plan, demands)


def test_the_host_holds_back_what_no_graph_replays() -> None:
    plan = Plan("host", "0", 1, (), tuple(Action(ActionKind.RUN, "compute", (f"op{i}",), 0, 1) for i in range(3)))
    assert simulate(plan, [Demand(1.0, {}, issue=2.0)] * 3).makespan == 7
    assert simulate(plan, [Demand(3.0, {}, issue=2.0)] * 3).makespan == 11


def test_measured_costs_say_what_is_missing() -> None:
    program = program_of(PAIR)
    with pytest.raises(ConfigError, match="no measured seconds for work@0"):
        MeasuredCosts(program, {}).demands(in_turn(program, 1))
