"""SiLU-mul against its reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import DEVICE, assert_like, dtypes, random_tensor, seeds

pytest.importorskip("triton", reason="needs triton, which is not installed")

from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels.silu_mul import silu_mul, silu_mul_reference


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6), st.integers(0, 2500), dtypes, seeds)
def test_equals_the_reference(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    gate, up = (random_tensor(rows, width, dtype=dtype, seed=seed + i) * 4 for i in range(2))
    assert_like(silu_mul(gate, up), silu_mul_reference(gate, up))


def test_layouts() -> None:
    wide = random_tensor(6, 4, 24, dtype=torch.float32, seed=1)
    for both in (wide, wide[2:5], wide[:, 1:3], wide[..., 4:20], wide[..., ::2], wide.transpose(0, 1), wide[0, 0]):
        gate, up = both.chunk(2, -1)  # the halves of a merged projection
        for left, right in ((gate, up), (gate.contiguous(), up), (gate, up.contiguous())):
            out = silu_mul(left, right)
            assert_like(out, silu_mul_reference(left, right))
            assert out.is_contiguous()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in the interpreter: exp(200) is inf
def test_far_from_zero() -> None:
    gate, up = (torch.tensor([x], device=DEVICE) for x in ([-200.0, 200.0, 0.0], [3.0, 5.0, 7.0]))
    torch.testing.assert_close(silu_mul(gate, up), torch.tensor([[0.0, 1000.0, 0.0]], device=DEVICE))


def test_halves_of_different_shapes_are_refused() -> None:
    with pytest.raises(ScheduleError, match=r"kernel 'silu_mul': up has shape \(3, 6\), needed is \(3, 7\)"):
        silu_mul(torch.zeros(3, 7, device=DEVICE), torch.zeros(3, 6, device=DEVICE))
