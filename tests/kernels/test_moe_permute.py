"""MoE permute and unpermute: against the references by masks, and the properties a dispatch relies on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import DEVICE, assert_like, dtypes, random_tensor, seeds

pytest.importorskip("triton", reason="needs triton, which is not installed")

from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels.moe_permute import (
    moe_permute,
    moe_permute_reference,
    moe_unpermute,
    moe_unpermute_reference,
)

id_types = st.sampled_from((torch.int32, torch.int64))


def random_ids(tokens: int, topk: int, experts: int, seed: int, elsewhere: bool, dtype: torch.dtype) -> torch.Tensor:
    """Expert ids; with `elsewhere`, some name no expert here: -1, or too large."""
    low, high = (-1, experts + 2) if elsewhere else (0, experts)
    return torch.randint(low, high, (tokens, topk), generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 12),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 1100),
    dtypes,
    id_types,
    st.booleans(),
    seeds,
)
def test_equals_the_reference(
    tokens: int,
    topk: int,
    experts: int,
    width: int,
    dtype: torch.dtype,
    id_type: torch.dtype,
    elsewhere: bool,
    seed: int,
) -> None:
    hidden = random_tensor(tokens, width, dtype=dtype, seed=seed)
    ids = random_ids(tokens, topk, experts, seed, elsewhere, id_type)
    rows, positions, offsets = moe_permute(hidden, ids, experts=experts)
    expected, expected_positions, expected_offsets = moe_permute_reference(hidden, ids, experts=experts)
    used = int(offsets[-1])
    assert torch.equal(positions, expected_positions)
    assert torch.equal(offsets, expected_offsets)
    assert torch.equal(rows[:used], expected[:used])
    rows[used:] = torch.nan  # unspecified, so nobody may look
    weights = random_tensor(tokens, topk, dtype=torch.float32, seed=seed + 1)
    out = moe_unpermute(rows, positions, weights)
    assert_like(out, moe_unpermute_reference(rows, positions, weights))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 9), seeds)
def test_weights_that_sum_to_one_give_the_tokens_back(tokens: int, topk: int, experts: int, seed: int) -> None:
    hidden = random_tensor(tokens, 20, dtype=torch.float32, seed=seed)
    ids = random_ids(tokens, topk, experts, seed, False, torch.int64)
    rows, positions, offsets = moe_permute(hidden, ids, experts=experts)
    assert torch.equal(offsets.diff().cpu(), torch.bincount(ids.flatten().cpu(), minlength=experts).int())
    assert sorted(positions.flatten().tolist()) == list(range(tokens * topk))
    weights = torch.full((tokens, topk), 1 / topk, device=DEVICE)
    torch.testing.assert_close(moe_unpermute(rows, positions, weights), hidden)


def test_layouts() -> None:
    wide = random_tensor(10, 40, dtype=torch.float32, seed=1)
    ids = random_ids(10, 3, 4, 2, False, torch.int64)
    weights = random_tensor(3, 10, dtype=torch.float16, seed=3).t()
    for hidden in (wide, wide[:, 5:25], wide[:, ::2], wide[:10, :10].t()):
        rows, positions, _ = moe_permute(hidden, ids, experts=4)
        assert torch.equal(rows, moe_permute_reference(hidden, ids, experts=4)[0])
        expected = moe_unpermute_reference(rows, positions, weights)
        for given_rows in (rows, torch.cat((rows, rows), 1)[:, : hidden.shape[1]]):
            assert_like(moe_unpermute(given_rows, positions, weights), expected)


def test_wrong_arguments() -> None:
    hidden, ids = torch.zeros(4, 8, device=DEVICE), torch.zeros(4, 2, dtype=torch.int64, device=DEVICE)
    rows, positions, _ = moe_permute(hidden, ids, experts=3)
    with pytest.raises(ScheduleError, match=r"topk_ids is torch\.float32; valid: int32, int64"):
        moe_permute(hidden, ids.float(), experts=3)
    with pytest.raises(ScheduleError, match=r"as many tokens, not \(4, 8\) and \(3, 2\)"):
        moe_permute(hidden, ids[:3], experts=3)
    with pytest.raises(ScheduleError, match=r"hidden is torch\.int32"):
        moe_permute(hidden.int(), ids, experts=3)
    with pytest.raises(ScheduleError, match=r"weights has shape \(4, 1\), needed is \(4, 2\)"):
        moe_unpermute(rows, positions, torch.ones(4, 1, device=DEVICE))
    with pytest.raises(ScheduleError, match=r"rows has shape \(7, 8\), needed is \(8, 8\)"):
        moe_unpermute(rows[:7], positions, torch.ones(4, 2, device=DEVICE))
    with pytest.raises(ScheduleError, match=r"positions is .* of int32"):
        moe_unpermute(rows, positions.long(), torch.ones(4, 2, device=DEVICE))
