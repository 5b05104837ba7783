"""The simulator: what must hold for every plan, the formulas on cases worked out by hand, and models as Programs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support import lowered, program_of, without

from dynaflow_serving.core.batch import Batch
from dynaflow_serving.core.parse import parse_program
from dynaflow_serving.core.plan import Action, ActionKind, Plan
from dynaflow_serving.core.program import Program, Resource
from dynaflow_serving.core.timeline import chrome_trace
from dynaflow_serving.errors import ConfigError, PlanError
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import happens_before, verify
from dynaflow_serving.simulate import (
    Demand,
    Device,
    Link,
    Measured,
    Roofline,
    Shape,
    Topology,
    compare,
    decoder,
    find,
    names,
    parse_requests,
    simulate,
)
from dynaflow_serving.simulate.collectives import KINDS, transfer
from dynaflow_serving.simulate.cost import Attention, Collective, Gemm, Load, Streaming, loads
from dynaflow_serving.simulate.engine import Simulation, share
from dynaflow_serving.simulate.picture import WIDTH, strip
from dynaflow_serving.strategies import get_strategy, strategy_names

MODELS = names(Shape)
SHARES = st.fixed_dictionaries({}, optional={r: st.floats(0.01, 1) for r in Resource})
SECONDS = st.one_of(st.just(0.0), st.floats(1e-6, 1))


def place(device: str = "h100", link: str = "nvlink4", **sizes: int | float) -> Topology:
    return Topology(device=find(Device, device), link=find(Link, link), network=find(Link, "eth400"), **sizes)


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
            if before[b.index] >> a.index & 1:
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
    assert simulate(one, Measured(program, seconds).demands(one)).makespan == 10
    plan = overlapped(program)
    t = simulate(plan, Measured(program, seconds).demands(plan))
    assert [(s.action.operators[0], s.action.start, s.start, s.end) for s in t.spans] == [
        ("work", 0, 0, 3), ("send", 0, 3, 5), ("work", 1, 3, 6), ("send", 1, 6, 8)
    ]  # fmt: skip
    assert (t.makespan, t.critical_path, t.overlapped, t.exposed_network, t.overlap) == (8, 8, 2, 2, 0.25)
    assert [plan.actions[i].operators[0] for i in t.critical] == ["work", "work", "send"]
    assert t.busy == {Resource.COMPUTE: 6, Resource.MEMORY: 0, Resource.NETWORK: 4}
    slowed = simulate(plan, Measured(program, seconds, network_compute=0.5).demands(plan))
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
    demands = Measured(program, {(o, mb): 1.0 for o in ("work", "send") for mb in (0, 1)}).demands(plan)
    with pytest.raises(PlanError, match=r"never ends: .*stream 'network' for event e0 wait for what is not recorded"):
        simulate(plan, demands)


def test_the_host_holds_back_what_no_graph_replays() -> None:
    plan = Plan("host", "0", 1, (), tuple(Action(ActionKind.RUN, "compute", (f"op{i}",), 0, 1) for i in range(3)))
    assert simulate(plan, [Demand(1.0, {}, issue=2.0)] * 3).makespan == 7
    assert simulate(plan, [Demand(3.0, {}, issue=2.0)] * 3).makespan == 11


def test_measured_costs_say_what_is_missing() -> None:
    program = program_of(PAIR)
    with pytest.raises(ConfigError, match="no measured seconds for work@0"):
        Measured(program, {}).demands(in_turn(program, 1))


# -- costs -------------------------------------------------------------------------------------------


def test_collectives_by_hand() -> None:
    link = Link(name="l", gb_s=1, latency_us=1, efficiency=1)
    direct = link.model_copy(update={"direct": True})
    base = {"device": find(Device, "h100"), "network": link, "per_node": 8}
    ring, switched = Topology(link=link, **base), Topology(link=direct, **base)
    assert transfer("all_reduce", 1e9, 1, ring) == (0, 0)
    assert transfer("all_reduce", 1e9, 4, ring) == pytest.approx((6e-6, 1.5))  # ring
    assert transfer("all_reduce", 10, 8, ring) == pytest.approx((6e-6, 20e-9))  # tree
    assert transfer("all_reduce", 10, 4, switched) == pytest.approx((1e-6, 30e-9))  # one-shot
    assert transfer("all_reduce", 1e9, 4, switched) == pytest.approx((2e-6, 1.5))  # two-shot
    assert transfer("all_gather", 1e9, 4, ring) == pytest.approx((3e-6, 0.75))
    assert transfer("all_to_all", 1e9, 4, ring) == pytest.approx((1e-6, 0.75))
    assert transfer("all_to_all", 1e9, 16, ring) == pytest.approx((1e-6, 0.5))  # half of it leaves the node
    with pytest.raises(ConfigError, match="Did you mean 'all_reduce'"):
        transfer("allreduce", 1, 2, ring)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS), size=st.floats(1, 1e10), nodes=st.integers(1, 512), faster=st.floats(1, 100),
    which=st.sampled_from(("link", "network")),
)  # fmt: skip
def test_a_faster_link_never_slows_a_collective(kind: str, size: float, nodes: int, faster: float, which: str) -> None:
    slow = place()
    link = getattr(slow, which)
    fast = slow.model_copy(update={which: link.model_copy(update={"gb_s": link.gb_s * faster})})
    assert sum(transfer(kind, size, 8 * nodes, fast)) <= sum(transfer(kind, size, 8 * nodes, slow)) * (1 + 1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    requests=st.lists(st.tuples(st.integers(1, 4096), st.integers(0, 8192)), min_size=1, max_size=8),
    faster=st.floats(1, 10),
    field=st.sampled_from(("tflops", "memory_gb_s", "compute_efficiency", "memory_efficiency")),
)  # fmt: skip
def test_a_better_device_never_slows_a_kernel(requests: list[tuple[int, int]], faster: float, field: str) -> None:
    slow, load = place(tp=4), Load(tuple(requests))
    better = min(1.0, getattr(slow.device, field) * faster) if "eff" in field else getattr(slow.device, field) * faster
    fast = slow.model_copy(update={"device": slow.device.model_copy(update={field: better})})
    for kernel in (
        Gemm(4096, 6144), Gemm(4096, 2816, 0.75, 64), Streaming(8192), Attention(8, 256, 256, 256),
        Collective("all_reduce", 4096, 4),
    ):  # fmt: skip
        before, after = kernel.use(load, slow), kernel.use(load, fast)
        assert after.seconds + after.latency <= (before.seconds + before.latency) * (1 + 1e-9)
        for use in (before, after):
            assert max(use.compute, use.memory, use.network) <= use.seconds * (1 + 1e-9)


def test_roofline_regimes() -> None:
    where = place()
    device = where.device
    large = Gemm(8192, 8192).use(Load(((16384, 0),)), where)
    assert large.seconds == pytest.approx(2 * 16384 * 8192**2 / device.flops, rel=0.05)  # full waves
    small = Gemm(8192, 8192).use(Load(((1, 0),)), where)
    assert small.seconds == pytest.approx(2 * 8192**2 / device.bandwidth, rel=0.01)  # the weight is read once
    full, spill = (Gemm(4096, 256 * 33).use(Load(((rows, 0),)), where) for rows in (512, 513))
    assert spill.seconds > 1.2 * full.seconds  # one row more, another wave
    decode = Attention(32, 256, 256, 2048).use(Load(((1, 8192),) * 64), where)
    assert decode.memory == decode.seconds > decode.compute
    prefill = Attention(32, 256, 256, 2048).use(Load(((8192, 0),)), where)
    assert prefill.compute == prefill.seconds > prefill.memory
    few, many = (Gemm(2048, 1408, 0.75, 64).use(Load(((n, 0),)), where) for n in (1, 4096))
    assert few.seconds < many.seconds / 10  # few experts are chosen, few weights read


def test_loads_of_a_request_that_straddles() -> None:
    batch = Batch((4, 1), (10, 20))
    assert loads(batch, (0, 3, 5)) == (Load(((3, 10),)), Load(((1, 13), (1, 20))))
    assert loads(Batch((2, 2)), (0, 4)) == (Load(((2, 0), (2, 0))),)


# -- models ------------------------------------------------------------------------------------------


def timeline_of(model: str, where: Topology, strategy: str, requests: str, **options: object) -> Simulation:
    cls = get_strategy(strategy)
    return compare(find(Shape, model), where, parse_requests(requests), [cls(cls.Options(**options))])[-1].timeline


@pytest.mark.parametrize("model", MODELS)
def test_models_are_programs_that_every_strategy_takes(model: str) -> None:
    shape = find(Shape, model)
    shape = shape.model_copy(update={"layers": shape.dense_layers + 2})
    sizes = [{"tp": 1}, {"tp": 4}] + [{"ep": 8, "dp": 8}, {"tp": 2, "ep": 8, "dp": 4}] * bool(shape.experts)
    for size in sizes:
        described = decoder(shape, place(**size))
        program = described.program
        assert parse_program(program.to_text()) == program
        assert set(described.work) == {o.name for o in program.operators}
        assert all(described.work.values())
        assert set(described.widths) == {v.name for v in program.values.values() if v.scope.value != "shared"}
        network = {o.tags[0] for o in program.operators if o.resource is Resource.NETWORK}
        expected = {"all_reduce"} if size.get("tp", 1) > 1 else set()
        expected |= {"dispatch", "combine"} if "ep" in size else set()
        expected |= {"all_gather"} if "ep" in size and "tp" in size else set()
        assert network == expected
        for name in set(strategy_names()) - {"auto"}:  # which orders nothing itself
            strategy = get_strategy(name)()
            for n in range(1 if strategy.schedules_unsplit else 2, strategy.max_micro_batches + 1):
                plan = lower(strategy.record(program, n), name)
                verify(program, plan)
                part = loads(Batch((64,) * n, (32,) * n), [64 * i for i in range(n + 1)])
                costs = Roofline(place(**size), described.work, described.widths, part)
                assert simulate(plan, costs.demands(plan)).makespan > 0


@pytest.mark.parametrize("requests", ["2x4096", "64x1@1024", "8x1@1024,1x512"])
def test_one_stream_takes_the_sum_and_no_more_with_more_bandwidth(requests: str) -> None:
    shape = find(Shape, "llama-3-8b").model_copy(update={"layers": 2})
    batch = parse_requests(requests)
    found = []
    for device in ("h100", "h200"):  # alike but for the memory
        (row,) = compare(shape, place(device, tp=4), batch, [])
        t = row.timeline
        found.append(t.makespan)
        assert t.overlapped == 0
        assert t.makespan == pytest.approx(t.critical_path) == pytest.approx(sum(s.end - s.start for s in t.spans))
    assert found[1] <= found[0]


def test_splitting_reads_weights_twice_and_pays_in_decode_but_not_in_prefill() -> None:
    def ratio(requests: str) -> float:
        whole = timeline_of("llama-3-8b", place(tp=4), "sequential", requests)
        return timeline_of("llama-3-8b", place(tp=4), "nanoflow", requests, min_tokens=1).makespan / whole.makespan

    assert ratio("64x1@1024") > 1 > ratio("8x1024")


def test_thousands_of_ranks_are_one_simulation() -> None:
    shape = find(Shape, "deepseek-v3-like").model_copy(update={"layers": 5})
    cls = get_strategy("dual_batch")
    rows = {}
    for dp in (64, 4096):
        strategies = [cls(cls.Options(min_tokens=1))]
        rows[dp] = compare(shape, place(ep=64, dp=dp), parse_requests("128x1@1024"), strategies)
    assert [r.timeline.makespan for r in rows[64]] == [r.timeline.makespan for r in rows[4096]]
    assert [len(r.timeline.spans) for r in rows[64]] == [len(r.timeline.spans) for r in rows[4096]]
    uneven = compare(shape, place(ep=64, dp=64, imbalance=2.0), parse_requests("128x1@1024"), [])
    assert uneven[0].timeline.makespan > rows[64][0].timeline.makespan


def test_a_merge_that_copies_costs_and_one_in_place_does_not() -> None:
    described = decoder(find(Shape, "llama-3-8b").model_copy(update={"layers": 1}), place())
    part = loads(Batch((64, 64)), (0, 64, 128))
    costs = Roofline(place(), described.work, described.widths, part)
    recorded = get_strategy("nanoflow")().record(described.program, 2)
    demands = {}
    for zero_copy in (True, False):
        plan = lower(recorded, "nanoflow", zero_copy)
        (merge,) = (i for i, s in enumerate(plan.actions) if s.kind is ActionKind.MERGE)
        demands[zero_copy] = costs.demands(plan)[merge]
    assert demands[True] is None
    copy = demands[False]
    assert copy is not None and copy.seconds == pytest.approx(128 * 2 * 4096 * 2 / place().device.bandwidth)


# -- names, files, pictures --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Device, Link, Shape])
def test_everything_shipped_is_valid_and_a_file_works_like_a_name(kind: type, tmp_path: Path) -> None:
    for name in names(kind):
        entry = find(kind, name)
        file = tmp_path / f"{name}.yaml"
        file.write_text("\n".join(f"{k}: {v}" for k, v in entry.model_dump(exclude_none=True).items()))
        assert find(kind, str(file)) == entry


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("sms: [", "is not valid YAML"),
        ("- 1", "must hold a mapping of fields. Valid: name, sms, tflops"),
        ("sms: 1\ntflop: 3\nmemory_gb_s: 1", "Did you mean 'tflops'"),
        ("sms: 0\ntflops: 3\nmemory_gb_s: 1", "sms: Input should be greater than or equal to 1"),
        ("sms: 1", "tflops: Field required"),
    ],
)
def test_a_wrong_device_file_says_what_is_wrong(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        find(Device, str(file))
    assert message in str(caught.value)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown device 'h10'. Did you mean 'h100'\? Valid: b200, h100, h200"):
        find(Device, "h10")
    with pytest.raises(ValidationError, match="ep=3 does not divide the 4 ranks"):
        place(tp=4, ep=3)
    with pytest.raises(ValidationError, match="tp=12 is over one node of 8 ranks, but not whole nodes"):
        place(tp=12)
    with pytest.raises(ConfigError, match="32 attention heads cannot be spread evenly over 3 ranks"):
        decoder(find(Shape, "llama-3-8b"), place(tp=3))
    with pytest.raises(ConfigError, match="llama-3-8b has no experts"):
        decoder(find(Shape, "llama-3-8b"), place(ep=2, dp=2))


def test_requests_as_text() -> None:
    assert parse_requests("64, 8") == Batch((64, 8), (0, 0))
    assert parse_requests("2x1@1024,512") == Batch((1, 1, 512), (1024, 1024, 0))
    for wrong in ("", "x", "0", "0x4", "4x", "3@", "-1", "1.5"):
        with pytest.raises(ConfigError, match="is not of the form"):
            parse_requests(wrong)


def test_pictures_say_simulated_and_show_every_step() -> None:
    t = timeline_of("llama-3-8b", place(tp=4), "nanoflow", "8x1024")
    trace = chrome_trace(t)
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert trace["otherData"]["simulated"] is True
    assert len(events) == len(t.spans) and all(e["args"]["simulated"] is True for e in events)
    assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(t.makespan * 1e6)
    head, *lines = strip(t).splitlines()
    assert "simulated" in head
    assert [line.split()[0] for line in lines] == list(t.plan.streams)
    assert all(len(line.split()[1]) == WIDTH and set(line.split()[1]) <= set("01.") for line in lines)
    assert math.isclose(t.makespan, max(s.end for s in t.spans))
