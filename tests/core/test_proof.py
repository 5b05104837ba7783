"""Proof that it is on and right: traces of real steps, shadow mode with a wrong kernel, counters, clocks."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_standin import FakeCuda
from hypothesis import given
from hypothesis import strategies as st
from policy_support import Engine, adopted, per_token, table_for
from prometheus_client import REGISTRY
from rounding import assert_same, integers, with_integer_weights
from torch import nn

import dynaflow_serving as dynaflow
from dynaflow_serving.config import Config, load
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.parse import parse_plan, parse_program
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.executor.tracing import EventTracer
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.session.clock import CUDAClock
from dynaflow_serving.session.session import Session
from dynaflow_serving.session.shadow import TOLERANCES, difference
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.rules import SplitModule
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import cut_evenly
from dynaflow_serving.torch_backend import Backend, Compiled


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


# -- shadow mode ---------------------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class WithKernel(OpScheduler):
    """Runs the second block of every micro-batch by a kernel."""

    name = "with_kernel"
    annotations = (SplitModule("Block"),)

    def __init__(self, kernel: Any) -> None:
        super().__init__()
        self.kernel = kernel

    def split(self, batch: Batch) -> Split:
        return cut_evenly(batch, 2)

    def schedule(self, s: Schedule) -> None:
        while ready := s.get_ready_ops():
            s.execute(ready[0], replace=self.kernel if "1" in ready[0].name else None)


def shadowed(kernel: Any, folder: Path, **shadow: Any) -> tuple[Model, Any]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = with_integer_weights(Model())
    config = Config(strategy="sequential", shadow={"folder": str(folder), "every": 2, **shadow})
    session = Session(FixedStrategy(WithKernel(kernel(model.layers[1]))), config)
    backend = Backend(session, 0, "dynamo")
    return model, Compiled(model, backend, 0)


def wrong(block: Any) -> Any:
    def a_little_more(x: torch.Tensor, *weights: Any) -> torch.Tensor:
        return block(x) * 1.001

    return a_little_more


def right(block: Any) -> Any:
    def same(x: torch.Tensor, *weights: Any) -> torch.Tensor:
        return block(x)  # type: ignore[no-any-return]

    return same


@torch.no_grad()
def test_a_wrong_kernel_is_caught_stopped_and_reproducible(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, compiled = shadowed(wrong, tmp_path)
    x = integers(12, 16)
    with caplog.at_level(logging.ERROR):
        first = compiled(x)
    assert torch.equal(first, model(x)), "the step that was compared gives the un-split result"
    assert "with_kernel is STOPPED" in caplog.text and "Reproducer" in caplog.text
    assert torch.equal(compiled(x), model(x))  # nothing is split any more
    counts = compiled.session.counts
    assert counts.split == 1 and counts.unsplit == {"shadow mode: outputs differed from un-split ones": 1}
    (file,) = tmp_path.iterdir()
    content = torch.load(file, weights_only=True)
    assert content["bounds"] == [0, 6, 12] and content["strategy"] == "with_kernel"
    (program,), (plan,) = map(parse_program, content["programs"]), map(parse_plan, content["plans"])
    verify(program, plan)
    assert [s.kernel for s in plan.actions if s.kernel] == ["a_little_more"] * 2
    assert torch.equal(content["whole"][0], model(x)) and not torch.allclose(content["split"][0], model(x), rtol=1e-5)
    assert any(torch.equal(t, x) for t in content["inputs"])


@torch.no_grad()
def test_a_right_kernel_is_left_alone(tmp_path: Path) -> None:
    model, compiled = shadowed(right, tmp_path, every=1)
    for size in (12, 9, 2):
        x = integers(size, 16)
        assert torch.equal(compiled(x), model(x))
    session = compiled.session
    assert session.shadow.comparisons == 3 == session.counts.split and not list(tmp_path.iterdir())


@torch.no_grad()
def test_every_second_split_step_is_compared(tmp_path: Path) -> None:
    _, compiled = shadowed(right, tmp_path, every=2)
    for _ in range(5):
        compiled(integers(8, 16))
    assert compiled.session.shadow.comparisons == 3


def test_while_training_the_result_keeps_its_gradients(tmp_path: Path) -> None:
    model, compiled = shadowed(right, tmp_path, every=1)
    x = integers(8, 16)
    compiled(x).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).sum().backward()
    for found, parameter in zip(gradients, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert_same(found, parameter.grad, "gradients")


@given(st.sampled_from(list(TOLERANCES)), st.floats(-6, 0), st.integers(0, 9))
def test_the_tolerance_is_relative_to_the_greatest_value(dtype: torch.dtype, exponent: float, place: int) -> None:
    whole = torch.linspace(-3, 2, 10).to(dtype)
    split = whole.clone()
    split[place] += 3 * 10**exponent
    apart = float((split.double() - whole.double()).abs().max() / 3)
    found = difference([split], [whole], None)
    if not math.isclose(apart, TOLERANCES[dtype], rel_tol=1e-3):
        assert (found is not None) == (apart > TOLERANCES[dtype])
    assert (difference([split], [whole], 0.0) is None) == torch.equal(split, whole)


def test_nan_and_shapes_differ_and_equal_nan_does_not() -> None:
    nan = torch.tensor([1.0, torch.nan])
    assert difference([nan.clone()], [nan], None) is None
    assert difference([torch.tensor([1.0, 2.0])], [nan], None) is not None
    assert difference([torch.ones(3)], [torch.ones(4)], None) is not None
    assert difference([torch.ones(3, dtype=torch.int64)], [torch.full((3,), 2)], None) is not None


# -- counters ------------------------------------------------------------------------------------------
def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"dynaflow_{name}", labels) or 0.0


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
        ({"shadow": {"every": 0}}, "shadow.every"),
        ({"shadow": {"tolerance": -1}}, "shadow.tolerance"),
    ],
)
def test_wrong_config(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load({"strategy": "nanoflow", **content})
