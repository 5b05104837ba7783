"""Plans in eager mode are clean under torch's CUDA sanitizer, which sees every launch, event and allocation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_support import ON_GPU

pytestmark = ON_GPU
FOLDERS = os.pathsep.join(str(Path(__file__).parents[1] / name) for name in ("gpu", "core"))

PROGRAM = """
import sys, torch
from gpu_support import arguments_of, on_gpu, slow_bump
from support import without
from dynaflow_serving.session.plan_cache import no_context
from dynaflow_serving.executor.cuda import CUDAExecutor
from dynaflow_serving.core.plan import ActionKind
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.strategies import get_strategy

assert torch.cuda._sanitizer.cuda_sanitizer.enabled
executor = CUDAExecutor()
with torch.no_grad():
    if sys.argv[1] == "racy":
        capture, plan = slow_bump()
        run = executor.bind(capture, without(plan, ActionKind.WAIT, "compute"), {})
        run([torch.ones(1024, device="cuda")], [0, 1024], no_context)
    else:
        capture = on_gpu(sys.argv[1])
        plan = lower(get_strategy(sys.argv[2])().record(capture.program, 2), sys.argv[2])
        run = executor.bind(capture, plan, {})
        for tokens in (64, 32, 64):
            run(arguments_of(capture, tokens), [0, 20, tokens], no_context)
torch.cuda.synchronize()
print("finished")
"""


def sanitized(*args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TORCH_CUDA_SANITIZER": "1", "PYTHONPATH": FOLDERS}
    command = [sys.executable, "-c", PROGRAM, *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("strategy", ["nanoflow", "dual_batch", "prefill_decode", "branches"])
@pytest.mark.parametrize("model", ["llama", "moe"])
def test_plans_are_clean(model: str, strategy: str) -> None:
    result = sanitized(model, strategy)
    assert result.returncode == 0 and "finished" in result.stdout, result.stderr[-4000:]
    assert "CSAN detected" not in result.stderr


def test_a_missing_wait_is_found() -> None:
    result = sanitized("racy")
    assert result.returncode != 0 and "CSAN detected a possible data race" in result.stderr, result.stderr[-4000:]
