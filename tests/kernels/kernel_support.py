"""What the kernel tests share, and what runs in the processes they start."""

from __future__ import annotations

import sys
from typing import Any

import torch
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# A few units in the last place. triton's interpreter truncates float32 to bfloat16 where a GPU rounds, which costs
# one at each of the roundings (sum, norm, product).
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 4e-2}
dtypes = st.sampled_from(list(TOLERANCE))
seeds = st.integers(0, 2**16)


def random_tensor(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_like(actual: Any, expected: Any) -> None:
    """Equal structure, shapes and dtypes, and values within the tolerance of the dtype."""
    actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        tolerance = TOLERANCE.get(b.dtype, 0)
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def run_python(code: str, **environment: str) -> str:
    """Standard output of `code` in a fresh interpreter without TRITON_INTERPRET."""
    import os
    import subprocess

    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout
