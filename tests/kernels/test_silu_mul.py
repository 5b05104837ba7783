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
@given(st.integers(0, 6), st.integers(1, 2500), dtypes, seeds)
def test_equals_the_reference(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = random_tensor(rows, 2 * width, dtype=dtype, seed=seed) * 4
    assert_like(silu_mul(gate_up), silu_mul_reference(gate_up))


def test_layouts() -> None:
    wide = random_tensor(6, 4, 24, dtype=torch.float32, seed=1)
    for gate_up in (wide, wide[2:5], wide[:, 1:3], wide[..., 3:21], wide[..., ::2], wide.transpose(0, 1), wide[0, 0]):
        out = silu_mul(gate_up)
        assert_like(out, silu_mul_reference(gate_up))
        assert out.is_contiguous()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in the interpreter: exp(200) is inf
def test_far_from_zero() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 0.0, 3.0, 5.0, 7.0]], device=DEVICE)
    torch.testing.assert_close(silu_mul(gate_up), torch.tensor([[0.0, 1000.0, 0.0]], device=DEVICE))


@pytest.mark.parametrize("width", [7, 0])
def test_an_odd_or_empty_last_dimension_is_refused(width: int) -> None:
    with pytest.raises(ScheduleError, match=f"kernel 'silu_mul': the last dimension .* even, not {width}"):
        silu_mul(torch.zeros(3, width, device=DEVICE))
