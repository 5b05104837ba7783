"""benchmarks/gpu/kernels.py, with tiny shapes, without a device and without waiting: the rows it would write."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_support import DEVICE

pytest.importorskip("triton", reason="needs triton, which is not installed")

from benchmarks.gpu import kernels
from benchmarks.gpu.limits import Limits


class OneCall:
    """Calls what it is given once, and says that it took a millisecond."""

    def milliseconds(self, call: Callable[[], Any], calls: int) -> float:
        call()
        return 1.0


def rows(**change: Any) -> list[dict[str, Any]]:
    options = {"tokens": (3,), "hidden": 32, "intermediate": 24, "dtype": torch.float32, "device": DEVICE} | change
    return kernels.rows(0.0, OneCall(), Limits(1e9, 1e12), compiler=lambda f: f, **options)


def test_every_kernel_is_timed_against_both_baselines() -> None:
    found = rows()
    by_case = {r["case"].partition(",")[0] for r in found}
    assert by_case == {"add_rms_norm", "silu_mul"}
    assert not [r for r in found if "error" in r]
    ours = [r for r in found if r["variant"].startswith("triton")]
    assert len(ours) == 2
    assert all(r["speedup"].keys() == {kernels.EAGER, kernels.COMPILED} for r in ours)
    (norm,) = (r for r in ours if r["case"].startswith("add_rms_norm"))
    assert norm["bytes"] == 4 * 3 * 32 * 4
    assert norm["bytes_per_s"] == norm["bytes"] / 1e-3
    assert norm["of_limit"] == pytest.approx(norm["bytes"] / 1e9 * 1e3)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.get_kernel
    monkeypatch.setattr(kernels, "get_kernel", lambda name, **c: lambda *a, **k: right(name, **c)(*(x * 2 for x in a)))
    with pytest.raises(RuntimeError, match="add_rms_norm, 3 tokens: triton is wrong"):
        rows()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no CUDA device")
def test_without_a_device_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="none is visible"):
        kernels.rows(1.0)
    command = [sys.executable, "-m", "benchmarks.gpu.kernels"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "the kernels are timed on a CUDA device, and none is visible"
