"""Timelines: what is said about overlap is what the spans say, of hand-made ones and of real threads."""

from __future__ import annotations

import json
import time
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_support import CHAIN
from support import manual, program_of

from dynaflow_serving.core.batch import Batch
from dynaflow_serving.core.plan import Action, ActionKind, Instance, Plan
from dynaflow_serving.core.timeline import Span, Timeline, chrome_trace, spans_of
from dynaflow_serving.executor.cpu import CPUExecutor
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.strategies.nanoflow import NanoFlow
from dynaflow_serving.strategies.sequential import Sequential
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import cut_evenly

STREAMS = ("compute", "network", "side")


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """Actions of up to three streams, one after another on each, at whole seconds; some of them of no length."""
    actions: list[Action] = []
    marks: list[tuple[int, float, float]] = []
    network = set()
    for stream in STREAMS:
        now = 0
        for idle, length in draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=6)):
            start = draw(st.integers(0, 3))
            kind = draw(st.sampled_from([ActionKind.RUN, ActionKind.REPLACE]))
            names = (f"op{len(actions)}",) if kind is ActionKind.RUN else (f"op{len(actions)}", f"op{len(actions)}b")
            action = Action(kind, stream, names, start, start + draw(st.integers(1, 2)))
            action = (
                action
                if kind is ActionKind.RUN
                else Action(kind, stream, names, action.start, action.stop, kernel="fused")
            )
            marks.append((len(actions), float(now + idle), float(now + idle + length)))
            actions.append(action)
            now += idle + length
            if draw(st.booleans()):
                network.add(names[0])
    plan = Plan("made_up", "0" * 16, 5, (), tuple(actions))
    return Timeline(plan, spans_of(plan, draw(st.permutations(marks))), frozenset(network), draw(st.booleans()))


@given(timelines())
def test_overlap_is_that_of_a_brute_force_sampling(t: Timeline) -> None:
    """Everything happens at whole seconds, so the middles of all seconds tell everything."""
    seconds = [[s for s in t.spans if s.start < second + 0.5 < s.end] for second in range(int(t.makespan))]
    overlapped = sum(len(running) > 1 for running in seconds)
    on_network = [running for running in seconds if any(map(t.is_network, running))]
    exposed = sum(all(map(t.is_network, running)) for running in on_network)
    assert t.overlapped == overlapped and t.exposed_network == exposed
    assert t.overlap == pytest.approx(overlapped / t.makespan if t.makespan else 0)
    assert t.hidden_network == pytest.approx(1 - exposed / len(on_network) if on_network else 0)
    assert 0 <= t.overlap <= 1 and 0 <= t.hidden_network <= 1


@given(timelines())
def test_the_first_span_starts_at_zero_and_the_last_ends_with_the_run(t: Timeline) -> None:
    assert [s.start for s in t.spans] == sorted(s.start for s in t.spans)
    assert not t.spans or (t.spans[0].start == 0 and t.makespan == max(s.end for s in t.spans))


@given(timelines())
def test_plain_data_round_trips_through_json(t: Timeline) -> None:
    if t.plan.actions:  # a plan's streams are those of its actions
        assert Timeline.from_dict(json.loads(json.dumps(t.as_dict()))) == t


@given(timelines())
def test_a_chrome_trace_has_every_span_with_its_operators_micro_batches_and_stream(t: Timeline) -> None:
    trace = json.loads(json.dumps(chrome_trace(t, {"action": 7})))
    stream = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    kind = "simulated" if t.simulated else "measured"
    assert set(stream.values()) == {f"{s} ({kind})" for s in t.plan.streams}

    def told(e: dict) -> tuple:
        a = e["args"]
        return (
            a["action"],
            tuple(a["operators"]),
            tuple(a["micro_batches"]),
            stream[e["tid"]],
            e["ts"],
            e["dur"],
            e["cat"],
        )

    found = Counter(told(e) for e in trace["traceEvents"] if e["ph"] == "X")
    assert found == Counter(
        (
            s.index, s.action.operators, tuple(range(s.action.start, s.action.stop)), f"{s.action.stream} ({kind})",
            s.start * 1e6, (s.end - s.start) * 1e6, "network" if t.is_network(s) else "operator",
        )
        for s in t.spans
    )  # fmt: skip
    about = trace["otherData"]
    assert (about["overlap"], about["action"], about["simulated"]) == (t.overlap, 7, t.simulated)


def test_a_span_that_is_no_operator_is_named_too() -> None:
    whole = Action(
        ActionKind.MERGE, "compute", instances=(Instance("y", 0, 2), Instance("y", 0, 1), Instance("y", 1, 2))
    )
    plan = Plan("made_up", "0" * 16, 2, (), (whole,))
    (_, event) = chrome_trace(Timeline(plan, (Span(0, whole, 0, 1),), frozenset(), False))["traceEvents"]
    assert event["name"] == "merge y@0 y@1 -> y@0:2" and event["args"]["operators"] == []


# -- real threads --------------------------------------------------------------------------------------
def measured(strategy: OpScheduler) -> Timeline:
    """A run of CHAIN in two micro-batches; each operator sleeps for 50 ms, which needs no core."""

    def operator(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return x + 1

    executor = CPUExecutor()
    try:
        captured = manual(program_of(CHAIN), **dict.fromkeys(("c0", "n0", "c1", "n1"), operator))
        plan_cache = PlanCache(captured, FixedStrategy(strategy), executor)
        split = cut_evenly(Batch((8,)), 2)
        (out,) = plan_cache.run([torch.zeros(8, 1)], split, traced=True)
        assert torch.equal(out, torch.full((8, 1), 4.0))
        timeline = plan_cache.timeline(split.signature)
        assert timeline is not None
        return timeline
    finally:
        executor.close()


@pytest.mark.alone
def test_a_network_operator_on_its_own_stream_overlaps_and_on_the_same_stream_it_does_not() -> None:
    """Ideal: c0@0 | c0@1 n0@0 | n0@1 c1@0 | c1@1 n1@0 | n1@1, that is, 3 of 5."""
    overlapped, in_turn = measured(NanoFlow()), measured(Sequential())
    assert overlapped.overlap > 0.5 and overlapped.hidden_network > 0.5
    assert {s.action.stream for s in overlapped.spans if overlapped.is_network(s)} == {"network"}
    assert (in_turn.overlap, in_turn.hidden_network) == (0, 0)
    assert in_turn.makespan > overlapped.makespan
