"""Proof that it is on and right: traces of real steps, counters, clocks, wrong configs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_standin import FakeCuda
from policy_support import Engine, adopted, per_token, table_for
from prometheus_client import REGISTRY
from torch import nn

import dynaflow_serving as dynaflow
from dynaflow_serving.config import Config, load
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.executor.tracing import EventTracer
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.session.clock import CPUClock, CUDAClock, Told
from dynaflow_serving.session.observers import Observer
from dynaflow_serving.session.session import Session
from dynaflow_serving.session.step import Step


# -- traces --------------------------------------------------------------------------------------------
def traced_engine(folder: Path, rank: int = 0, **trace: Any) -> Engine:
    engine = Engine(per_token)
    config = Config(strategy="nanoflow", options={"min_tokens": 1}, trace={"folder": str(folder), **trace})
    engine.session = Session(build_selector(config), config, rank=rank)
    engine.plan_cache = engine.session.add(engine.plan_cache.captured)
    return engine


def test_sampled_steps_are_traced_with_names_micro_batches_streams_and_overlap(tmp_path: Path) -> None:
    engine = traced_engine(tmp_path / "traces", rank=3, every=3, limit=2)
    for _ in range(10):
        engine.step(Batch((8,) * 8))
    files = sorted((tmp_path / "traces").iterdir())
    assert [f.name for f in files] == ["step000001-rank3.json", "step000004-rank3.json"]
    trace = json.loads(files[1].read_text())
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    ran = Counter((o, mb) for e in spans for o in e["args"]["operators"] for mb in e["args"]["micro_batches"])
    assert ran == {(o, mb): 1 for o in ("c0", "n0", "c1", "n1") for mb in (0, 1)}
    streams = {e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert streams == {"compute (measured)", "network (measured)"}
    about = trace["otherData"]
    assert about["tokens"] == [32, 32] and about["rank"] == 3 and about["simulated"] is False
    assert 0.3 < about["overlap"] < 0.8 and about["hidden_network"] > 0.4  # 3 of 5 halves in the ideal schedule


def test_a_step_that_is_not_sampled_runs_the_plan_without_stamps(tmp_path: Path) -> None:
    engine = traced_engine(tmp_path, every=1, limit=1)
    for _ in range(2):
        engine.step(Batch((8,) * 8))
    signature = engine.session.selector.split(Batch((8,) * 8)).signature
    plain, traced = (engine.plan_cache.prepare(signature, traced=t) for t in (False, True))
    assert "stamp" not in plain.source and traced.source.count("mark(") >= 8


@pytest.mark.parametrize("gradients", [False, True])
def test_steps_are_traced_with_and_without_gradients(tmp_path: Path, gradients: bool) -> None:
    torch._dynamo.reset()
    config = {"strategy": "nanoflow", "options": {"min_tokens": 1}, "trace": {"folder": str(tmp_path), "every": 1}}
    compiled = dynaflow.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), config)
    with torch.set_grad_enabled(gradients):
        for _ in range(2):
            compiled(torch.randn(8, 4))
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["step000001-rank0.json", "step000002-rank0.json"]


def test_a_trace_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"trace: folder .* cannot be made"):
        traced_engine(tmp_path / "file" / "x")


# -- counters ------------------------------------------------------------------------------------------
def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"dynaflow_{name}", labels) or 0.0


def test_series_are_there_before_the_first_step() -> None:
    Engine(per_token, candidates=["nanoflow"], micro_batches=[7])
    for name, labels in (("steps", {"strategy": "nanoflow x7", "reason": ""}), ("checked_steps", {"result": "equal"})):
        assert REGISTRY.get_sample_value(f"dynaflow_{name}_total", labels) is not None


def test_every_step_is_counted_by_strategy_and_reason(tmp_path: Path) -> None:
    engine = traced_engine(tmp_path, every=1)
    labels = {"strategy": "nanoflow", "reason": ""}, {"strategy": "none", "reason": "one request"}
    before = [metric("steps_total", **each) for each in labels]
    for batch in (Batch((8, 8)), Batch((8,)), Batch((4, 4, 4)), Batch((5,))):
        engine.step(batch)
    assert [metric("steps_total", **each) - was for each, was in zip(labels, before, strict=True)] == [2, 2]
    assert 0 < metric("overlap_ratio") < 1 and 0 < metric("hidden_network_ratio") <= 1
    assert metric("plans_total") >= 2 and metric("plan_cache_hits_total") >= 1


@pytest.mark.alone
def test_the_time_saved_is_counted_where_there_is_something_to_compare_with() -> None:
    engine, before = Engine(per_token), metric("time_saved_seconds_total")
    engine.selector.serve_by(table_for(adopted()), engine.session)
    for _ in range(12):
        engine.step(Batch((8,) * 8))
    saved = metric("time_saved_seconds_total") - before
    assert 0 < saved < 12 * 8 * per_token(64)


# -- devices -------------------------------------------------------------------------------------------
class TimedEvent:
    """`reached`: whether the device has passed it."""

    now = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.reached = False

    def record(self, stream: Any = None) -> None:
        TimedEvent.now += 10.0
        self.at = TimedEvent.now

    def query(self) -> bool:
        return self.reached

    def elapsed_time(self, other: TimedEvent) -> float:
        return other.at - self.at  # milliseconds


class TimedCuda(FakeCuda):
    Event = TimedEvent  # type: ignore[assignment]

    def synchronize(self) -> None:
        pass


def test_a_device_clock_never_waits_and_tells_later() -> None:
    clock, told = CUDAClock(TimedCuda()), list[float]()
    first, second = clock.start(), clock.start()
    clock.stop(first, told.append)
    clock.stop(second, told.append)
    clock.poll()
    assert told == []
    for _, ended, _ in clock._running:
        ended.reached = True
        clock.poll()
        break
    assert told == pytest.approx([0.02])


class Ticking(CPUClock):
    """Every reading of this clock is a second after the one before."""

    now = 0.0

    def start(self) -> float:
        self.now += 1
        return self.now

    def stop(self, started: float, told: Told) -> None:
        told(self.start() - started)


def test_a_training_step_takes_as_long_as_its_forward_and_backward_pass() -> None:
    class Noting(Observer):
        def timed(self, step: Step, seconds: float) -> None:
            told.append(seconds)

    told: list[float] = []
    session = Session(build_selector(load("sequential")), load("sequential"), None)
    session.clock = Ticking()
    session.observe_with(Noting())
    x = torch.ones(2, requires_grad=True)
    for gradients in (True, True, False):
        with session.step(Batch((1, 1))) as step, torch.set_grad_enabled(gradients):
            output = x * 2
            step.time_backward(x, output)
        if gradients:
            session.clock.now += 100  # the loss is not ours
            before = list(told)
            output.sum().backward()
            assert told == [*before, 2.0]
    assert told == [2.0, 2.0, 1.0]


def test_device_events_become_seconds_from_the_first() -> None:
    tracer = EventTracer(TimedCuda())
    for step in (4, 7):
        tracer.mark(step, tracer.stamp("s"), tracer.stamp("s"))
    assert [(i, round(a, 6), round(b, 6)) for i, a, b in tracer.take()] == [(4, 0.0, 0.01), (7, 0.02, 0.03)]
    assert tracer.take() == []


# -- the config ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"trace": {}}, "'trace.folder' is missing"),
        ({"trace": {"folder": "x", "evry": 3}}, "unknown option"),
        ({"check": {"every": 0}}, "check.every"),
        ({"check": {"tolerance": -1}}, "check.tolerance"),
        ({"check": "nevr"}, "check: .*say first, never, or options such as {every: 100}"),
        ({"check": {"evry": 2}}, "unknown option"),
    ],
)
def test_wrong_config(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load({"strategy": "nanoflow", **content})
