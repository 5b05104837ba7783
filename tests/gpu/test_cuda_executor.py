"""The CUDA executor on a device: equal to the CPU result, real streams that really race without waits, no leak."""

from __future__ import annotations

import pytest
import torch
from gpu_support import ON_GPU, arguments_of, on_gpu, slow_bump
from support import without

from dynaflow_serving.capture.examples import example_capture
from dynaflow_serving.config import ExecutorOptions
from dynaflow_serving.core.plan import ActionKind
from dynaflow_serving.errors import InactiveError, PlanError
from dynaflow_serving.executor.cuda import CUDAExecutor
from dynaflow_serving.executor.cuda_streams import green_contexts
from dynaflow_serving.executor.sequential import SequentialExecutor
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.session.plan_cache import no_context
from dynaflow_serving.strategies import get_strategy

pytestmark = ON_GPU


@pytest.mark.parametrize("model", ["llama", "moe", "dit"])
@pytest.mark.parametrize("strategy", ["sequential", "nanoflow", "dual_batch", "prefill_decode", "branches"])
def test_equals_the_cpu(model: str, strategy: str) -> None:
    reference, capture = example_capture(model), on_gpu(model)
    plan = lower(get_strategy(strategy)().record(capture.program, 2), strategy)
    verify(capture.program, plan)
    inputs = arguments_of(capture, 64, "cpu")
    with torch.no_grad():
        (expected,) = SequentialExecutor().bind(reference, plan, {})(inputs, [0, 32, 64], no_context)
        run = CUDAExecutor().bind(capture, plan, {})
        for _ in range(20):
            moved = [i.cuda() if isinstance(i, torch.Tensor) else i for i in inputs]
            (out,) = run(moved, [0, 32, 64], no_context)
    torch.testing.assert_close(out.cpu(), expected, atol=1e-3, rtol=1e-3)


def test_a_missing_wait_is_rejected_and_would_corrupt_the_result() -> None:
    capture, plan = slow_bump()
    x = torch.arange(1024.0, device="cuda")
    executor = CUDAExecutor()
    (right,) = executor.bind(capture, plan, {})([x], [0, 1024], no_context)
    assert torch.equal(right, (x + 1) * 2)
    racy = without(plan, ActionKind.WAIT, "compute")
    with pytest.raises(PlanError, match=r"does not wait for action|is not joined"):
        verify(capture.program, racy)
    run = executor.bind(capture, racy, {})
    (wrong,) = run([x], [0, 1024], no_context)
    torch.cuda.current_stream().synchronize()
    assert torch.equal(wrong, x * 2)  # `read` has not waited for `bump`
    torch.cuda.synchronize()


def test_memory_returns_to_the_start() -> None:
    capture = on_gpu("llama")
    run = CUDAExecutor().bind(capture, lower(get_strategy("nanoflow")().record(capture.program, 3), "nanoflow"), {})
    inputs = arguments_of(capture, 48)
    with torch.no_grad():
        for _ in range(10):  # workspaces are made once per stream
            run(inputs, [0, 16, 32, 48], no_context)
        torch.cuda.synchronize()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        for _ in range(1000):
            run(inputs, [0, 16, 32, 48], no_context)
        torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == (allocated, reserved)


def test_after_an_exception_the_executor_works_and_nothing_is_reused_early() -> None:
    capture, plan = slow_bump()
    failing = {"now": True}

    def read(y: torch.Tensor) -> torch.Tensor:
        if failing["now"]:
            raise ValueError("boom")
        return y * 2

    capture.functions["read"] = read
    run = CUDAExecutor().bind(capture, plan, {})
    x = torch.arange(1024.0, device="cuda")
    stream = torch.cuda.current_stream()
    with pytest.raises(ValueError, match="boom"):
        run([x], [0, 1024], no_context)
    assert torch.cuda.current_stream() == stream
    reused = torch.zeros(1024, device="cuda")  # may get the memory of y, which `bump` still writes
    assert torch.equal(reused, torch.zeros_like(reused))
    failing["now"] = False
    assert torch.equal(run([x], [0, 1024], no_context)[0], (x + 1) * 2)


@pytest.mark.parametrize("graph", ["off", "whole"])
def test_an_sm_share_is_given_or_refused_by_name(graph: str) -> None:
    options = ExecutorOptions(streams={"network": {"sm_share": 0.25}}, graph=graph)
    if green_contexts(torch.cuda) is None:
        with pytest.raises(InactiveError, match="no green contexts"):
            CUDAExecutor(options)
        pytest.skip("this build of torch has no green contexts")
    capture = on_gpu("llama")
    plan = lower(get_strategy("nanoflow")().record(capture.program, 2), "nanoflow")
    inputs = arguments_of(capture, 64)
    with torch.no_grad():
        (expected,) = CUDAExecutor().bind(capture, plan, {})(inputs, [0, 32, 64], no_context)
        executor = CUDAExecutor(options)
        run = executor.bind(capture, plan, {})
        for _ in range(5):
            (out,) = run(inputs, [0, 32, 64], no_context)
    torch.testing.assert_close(out, expected)
    if graph == "whole":
        assert executor.report()["graphs"]["captured"]
