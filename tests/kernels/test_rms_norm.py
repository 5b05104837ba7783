"""Fused residual add + RMSNorm against its reference, and the reference against torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import DEVICE, assert_like, dtypes, random_tensor, seeds

pytest.importorskip("triton", reason="needs triton, which is not installed")

from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels.launch import INTERPRETED
from dynaflow_serving.kernels.rms_norm import add_rms_norm, add_rms_norm_reference


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 700), dtypes, st.sampled_from((1e-6, 1e-5, 0.1)), st.booleans(), seeds)
def test_equals_the_reference(
    rows: int, hidden: int, dtype: torch.dtype, eps: float, round_first: bool, seed: int
) -> None:
    x, residual = (random_tensor(rows, hidden, dtype=dtype, seed=seed + i) for i in range(2))
    weight = random_tensor(hidden, dtype=dtype, seed=seed + 2)
    constants = {"eps": eps, "round_first": round_first}
    total, normed = add_rms_norm(x, residual, weight, **constants)
    assert_like((total, normed), add_rms_norm_reference(x, residual, weight, **constants))
    if not (INTERPRETED and dtype is torch.bfloat16):  # the interpreter truncates
        assert torch.equal(total, x + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_torchs_rms_norm(dtype: torch.dtype) -> None:
    x, residual = (random_tensor(7, 33, dtype=dtype, seed=i) for i in range(2))
    weight = random_tensor(33, dtype=dtype, seed=3)
    _, normed = add_rms_norm_reference(x, residual, weight, eps=1e-5, round_first=False)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(x + residual, (33,), weight, 1e-5))


@pytest.mark.parametrize("hidden", [1, 2, 4095, 8192, 16384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_row_lengths_up_to_the_limit(hidden: int, dtype: torch.dtype) -> None:
    x, residual = (random_tensor(2, hidden, dtype=dtype, seed=i) for i in range(2))
    weight = random_tensor(hidden, dtype=dtype, seed=2)
    assert_like(add_rms_norm(x, residual, weight), add_rms_norm_reference(x, residual, weight))


def views() -> list[torch.Tensor]:
    """Twelve rows of 10 as a micro-batch's view, strided rows, a strided last dimension, two token axes."""
    wide = random_tensor(20, 30, dtype=torch.float32, seed=5)
    return [
        wide[3:15, :10].contiguous(),
        wide[3:15, 7:17],
        wide[:12, :20:2],
        wide[:10, :12].t(),
        wide.view(2, 10, 30)[:, 2:8, 4:14],
        wide[:1, :10].expand(12, 10),
    ]


@pytest.mark.parametrize("i", range(6))
@pytest.mark.parametrize("j", range(6))
def test_layouts(i: int, j: int) -> None:
    x, residual = views()[i], views()[j].reshape(views()[i].shape)
    weight = random_tensor(20, dtype=torch.float32, seed=6)[::2]
    given_x, given_residual = x.clone(), residual.clone()
    results = add_rms_norm(x, residual, weight)
    assert_like(results, add_rms_norm_reference(x, residual, weight))
    assert all(r.is_contiguous() for r in results)
    assert torch.equal(x, given_x)
    assert torch.equal(residual, given_residual)


def test_large_values_do_not_overflow_in_half_precision() -> None:
    x = torch.full((1, 64), 1000.0, dtype=torch.float16, device=DEVICE)
    weight = torch.ones(64, dtype=torch.float16, device=DEVICE)
    _, normed = add_rms_norm(x, torch.zeros_like(x), weight)
    torch.testing.assert_close(normed, torch.ones_like(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(4, 7)}, r"residual has shape \(4, 7\), needed is \(4, 8\)"),
        ({"weight": torch.zeros(7)}, r"weight has shape \(7,\), needed is \(8,\)"),
        ({"weight": torch.zeros(8, dtype=torch.float16)}, "weight is torch.float16 .* but x is torch.float32"),
        ({"x": torch.zeros(4, 8, dtype=torch.int32)}, "x is torch.int32; valid: float16, bfloat16, float32"),
        (
            {"x": torch.zeros(1, 16385), "residual": torch.zeros(1, 16385), "weight": torch.zeros(16385)},
            "rows of 16385 elements; valid: 1 to 16384",
        ),
    ],
)
def test_wrong_arguments(change: dict[str, torch.Tensor], message: str) -> None:
    arguments = {"x": torch.zeros(4, 8), "residual": torch.zeros(4, 8), "weight": torch.zeros(8), **change}
    with pytest.raises(ScheduleError, match=f"kernel 'add_rms_norm': .*{message}"):
        add_rms_norm(**{k: v.to(DEVICE) for k, v in arguments.items()})


def test_a_gradient_is_refused_rather_than_lost() -> None:
    x, weight = torch.zeros(4, 8, device=DEVICE), torch.nn.Parameter(torch.ones(8, device=DEVICE))
    with pytest.raises(ScheduleError, match="has no backward, but weight requires a gradient"):
        add_rms_norm(x, x, weight)
    with torch.no_grad():
        add_rms_norm(x, x, weight)
