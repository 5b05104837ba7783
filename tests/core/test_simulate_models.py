"""The simulator: models as Programs, and its files, names and pictures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import ValidationError
from simulate_support import place, timeline_of

from dynaflow_serving.capture.examples import loss_capture
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.core.parse import parse_program
from dynaflow_serving.core.plan import ActionKind
from dynaflow_serving.core.program import Resource
from dynaflow_serving.core.timeline import chrome_trace
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.simulate import (
    Device,
    Link,
    RooflineCosts,
    Shape,
    compare,
    decoder,
    find,
    names,
    parse_requests,
    simulate,
)
from dynaflow_serving.simulate.kernel_models import workloads
from dynaflow_serving.simulate.picture import WIDTH, strip
from dynaflow_serving.strategies import get_strategy, strategy_names

MODELS = names(Shape)


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
        for name in set(strategy_names()) - {"fused_norms"}:  # which replaces what it finds in a graph
            strategy = get_strategy(name)()
            for n in range(1 if strategy.schedules_unsplit else 2, strategy.max_micro_batches + 1):
                plan = lower(strategy.record(program, n), name)
                verify(program, plan)
                part = workloads(Batch((64,) * n, (32,) * n), [64 * i for i in range(n + 1)])
                costs = RooflineCosts(place(**size), described.work, described.widths, part)
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
    part = workloads(Batch((64, 64)), (0, 64, 128))
    costs = RooflineCosts(place(), described.work, described.widths, part)
    recorded = get_strategy("nanoflow")().record(described.program, 2)
    demands = {}
    for zero_copy in (True, False):
        plan = lower(recorded, "nanoflow", zero_copy)
        (merge,) = (i for i, s in enumerate(plan.actions) if s.kind is ActionKind.MERGE)
        demands[zero_copy] = costs.demands(plan)[merge]
    assert demands[True] is None
    copy = demands[False]
    assert copy is not None and copy.seconds == pytest.approx(128 * 2 * 4096 * 2 / place().device.bandwidth)


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


def test_a_merge_that_adds_costs_by_the_elements_of_the_sum() -> None:
    program = loss_capture().program
    part = workloads(Batch((64, 64, 64)), (0, 64, 128, 192))
    work, sums = {o.name: () for o in program.operators}, {"scaled": 4096**2, "loss": 1}
    costs = RooflineCosts(place(), work, {"y": 16}, part, sums=sums)
    plan = lower(get_strategy("nanoflow")().record(program, 3), "nanoflow")
    merge = next(i for i, s in enumerate(plan.actions) if str(s).startswith("merge scaled@0"))
    added = costs.demands(plan)[merge]
    assert added is not None  # two additions, of 16-bit elements: each reads two of them and writes one
    assert added.seconds == pytest.approx(2 * 3 * 4096**2 * 2 / place().device.bandwidth)
