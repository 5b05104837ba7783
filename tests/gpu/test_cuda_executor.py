"""The CUDA executor on a device: equal to the CPU result, with real streams that really race without waits."""

from __future__ import annotations

import pytest
import torch

from dynaflow_serving.examples import HIDDEN, example_capture
from dynaflow_serving.executor.cuda import CUDAExecutor
from dynaflow_serving.executor.sequential import SequentialExecutor
from dynaflow_serving.lowering import lower
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.verify import verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and none is visible"),
]


@pytest.mark.parametrize("model", ["llama", "moe"])
@pytest.mark.parametrize("strategy", ["sequential", "nanoflow", "dual_batch"])
def test_equals_the_cpu(model: str, strategy: str) -> None:
    capture = example_capture(model)
    plan = lower(get_strategy(strategy)().record(capture.program, 2), strategy)
    verify(capture.program, plan)
    x = torch.randn(64, HIDDEN)
    names = capture.program.inputs[: len(capture.program.inputs) - len(capture.constants)]
    with torch.no_grad():
        inputs = [x if n == "l_x_" else 64 for n in names]
        (expected,) = SequentialExecutor().bind(capture, plan, {})(inputs, [0, 32, 64], lambda mb: None)
        capture.constants = tuple(c.cuda() for c in capture.constants)
        for name, maker in capture.buffers.items():
            capture.buffers[name] = lambda tokens, maker=maker: maker(tokens).cuda()
        run = CUDAExecutor().bind(capture, plan, {})
        for _ in range(20):
            (out,) = run([i.cuda() if isinstance(i, torch.Tensor) else i for i in inputs], [0, 32, 64], lambda mb: None)
    torch.testing.assert_close(out.cpu(), expected, atol=1e-3, rtol=1e-3)
