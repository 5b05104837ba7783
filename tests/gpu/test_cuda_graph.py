"""Whole-plan CUDA graphs on a device: a replay equals eager execution, and costs what the report says."""

from __future__ import annotations

import random

import pytest
import torch
from gpu_support import ON_GPU, arguments_of, on_gpu, slow_bump

from dynaflow_serving.config import ExecutorOptions
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.executor.cuda import CUDAExecutor
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.session.plan_cache import PlanCache, no_context
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import cut_evenly

pytestmark = ON_GPU
WHOLE = ExecutorOptions(graph="whole")


@pytest.mark.parametrize("model", ["llama", "moe", "dit"])
@pytest.mark.parametrize("strategy", ["sequential", "nanoflow", "dual_batch", "branches"])
def test_replays_equal_eager_over_random_batches(model: str, strategy: str) -> None:
    rng = random.Random(0)
    capture, executor = on_gpu(model), CUDAExecutor(WHOLE)
    graphed = PlanCache(capture, FixedStrategy(get_strategy(strategy)()), executor)
    eager = PlanCache(capture, FixedStrategy(get_strategy(strategy)()), CUDAExecutor())
    sizes = [rng.randint(8, 200) for _ in range(5)]
    with torch.no_grad():
        for _ in range(100):
            tokens = rng.choice(sizes)
            args = arguments_of(capture, tokens)
            split = cut_evenly(Batch((1,) * tokens), rng.choice((1, 2)))
            (expected,) = eager.run(args, split)
            (out,) = graphed.run(args, split)
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    report = executor.report()["graphs"]
    assert set(report["eager"]) == {"warm-up: the first run of a bucket"}
    assert sum(g["replays"] for g in report["captured"]) == 100 - report["eager"]["warm-up: the first run of a bucket"]
    assert all(g["capture_seconds"] > 0 and g["mib"] >= 0 for g in report["captured"])
    executor.close()


def test_a_fork_and_a_join_are_in_the_graph() -> None:
    """The write on the other stream is late by tens of milliseconds, in every replay."""
    capture, plan = slow_bump()
    run = CUDAExecutor(WHOLE).bind(capture, plan, {})
    with torch.no_grad():
        for i in range(5):
            x = torch.full((1024,), float(i), device="cuda")
            assert torch.equal(run([x], [0, 1024], no_context)[0], (x + 1) * 2)


def test_memory_returns_to_the_start() -> None:
    capture, executor = on_gpu("llama"), CUDAExecutor(WHOLE)
    run = executor.bind(capture, lower(get_strategy("nanoflow")().record(capture.program, 2), "nanoflow"), {})
    inputs = arguments_of(capture, 48)
    with torch.no_grad():
        for _ in range(10):
            run(inputs, [0, 16, 48], no_context)
        torch.cuda.synchronize()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        for _ in range(1000):
            run(inputs, [0, 16, 48], no_context)
        torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == (allocated, reserved)
    assert executor.report()["graphs"]["captured"][0]["replays"] == 1009


def test_graphs_of_several_buckets_share_their_pool() -> None:
    """Intermediates reuse one pool: the tenth bucket adds little more than its static buffers and outputs."""
    capture, executor = on_gpu("llama"), CUDAExecutor(WHOLE)
    run = executor.bind(capture, lower(get_strategy("nanoflow")().record(capture.program, 2), "nanoflow"), {})
    with torch.no_grad():
        for tokens in range(200_000, 199_990, -1):
            for _ in range(2):
                run(arguments_of(capture, tokens), [0, 100_000, tokens], no_context)
    sizes = [g["mib"] for g in executor.report()["graphs"]["captured"]]
    assert len(sizes) == 10 and max(sizes[1:]) < sizes[0]


def test_a_capture_that_fails_leaves_the_device_usable() -> None:
    capture, plan = slow_bump()
    capture.functions["read"] = lambda y: y * 2 if y.sum().item() else y  # a capture cannot synchronise
    executor = CUDAExecutor(WHOLE)
    run = executor.bind(capture, plan, {})
    x = torch.ones(1024, device="cuda")
    stream = torch.cuda.current_stream()
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(run([x], [0, 1024], no_context)[0], (x + 1) * 2)
            assert torch.cuda.current_stream() == stream
    reasons = executor.report()["graphs"]["eager"]
    assert any(reason.startswith("capture failed: ") for reason in reasons)
