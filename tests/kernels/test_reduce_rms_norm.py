"""The one-kernel reduction: in one process as a whole, and for each rank's tokens in turn, as peers would run it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import DEVICE, assert_like, dtypes, random_tensor, seeds

pytest.importorskip("triton", reason="needs triton, which is not installed")

from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels.collectives import own_tokens
from dynaflow_serving.kernels.reduce_rms_norm import (
    addresses,
    launch,
    reduce_add_rms_norm,
    reduce_add_rms_norm_reference,
)

Inputs = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]


def inputs(ranks: int, tokens: int, hidden: int, dtype: torch.dtype, seed: int) -> Inputs:
    partials = [random_tensor(tokens, hidden, dtype=dtype, seed=seed + i) for i in range(ranks)]
    residual = random_tensor(tokens, hidden, dtype=dtype, seed=seed + ranks)
    return partials, residual, random_tensor(hidden, dtype=dtype, seed=seed + ranks + 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 11), st.integers(1, 300), dtypes, st.integers(1, 9), seeds)
def test_equals_the_reference(ranks: int, tokens: int, hidden: int, dtype: torch.dtype, ctas: int, seed: int) -> None:
    partials, residual, weight = inputs(ranks, tokens, hidden, dtype, seed)
    expected = reduce_add_rms_norm_reference(partials, residual, weight, eps=1e-5)
    assert_like(reduce_add_rms_norm(partials, residual, weight, eps=1e-5, ctas=ctas), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 4), st.integers(1, 11), st.integers(1, 100), st.booleans(), st.integers(1, 4), seeds)
def test_all_ranks_in_turn(ranks: int, tokens: int, hidden: int, gather_total: bool, ctas: int, seed: int) -> None:
    partials, residual, weight = inputs(ranks, tokens, hidden, torch.float32, seed)
    totals = [torch.full_like(residual, torch.nan) for _ in range(ranks)]
    normeds = [torch.full_like(residual, torch.nan) for _ in range(ranks)]
    for rank in range(ranks):
        tables = addresses(partials), addresses(totals if gather_total else [totals[rank]]), addresses(normeds)
        launch(tables, residual, weight, 1e-6, own_tokens(tokens, rank, ranks), ctas)
    total, normed = reduce_add_rms_norm_reference(partials, residual, weight)
    for rank in range(ranks):
        own = own_tokens(tokens, rank, ranks)
        rows = slice(None) if gather_total else slice(own.start, own.stop)
        assert_like((totals[rank][rows], normeds[rank]), (total[rows], normed))
        assert torch.equal(normeds[rank], normeds[0])
        if not gather_total:
            assert int(totals[rank].isnan().any(1).sum()) == tokens - len(own)


@given(st.integers(0, 300), st.integers(1, 9))
def test_own_tokens_tile_the_tokens_evenly(tokens: int, ranks: int) -> None:
    shares = [own_tokens(tokens, rank, ranks) for rank in range(ranks)]
    assert [t for share in shares for t in share] == list(range(tokens))
    assert max(map(len, shares)) == -(-tokens // ranks)
    assert shares == sorted(shares, key=len, reverse=True)


def test_wrong_arguments() -> None:
    partials, residual, weight = inputs(2, 4, 8, torch.float32, 0)
    with pytest.raises(ScheduleError, match="partials is empty"):
        reduce_add_rms_norm([], residual, weight)
    with pytest.raises(ScheduleError, match="ctas is 0; valid: 1 and more"):
        reduce_add_rms_norm(partials, residual, weight, ctas=0)
    with pytest.raises(ScheduleError, match=r"residual has shape \(3, 8\)"):
        reduce_add_rms_norm(partials, residual[:3], weight)
    with pytest.raises(ScheduleError, match="partial is not contiguous"):
        reduce_add_rms_norm([partials[0], torch.cat(partials, 1)[:, :8]], residual, weight)
    with pytest.raises(ScheduleError, match="does not start at a multiple of 16 bytes"):
        reduce_add_rms_norm([torch.zeros(33, device=DEVICE)[1:].view(4, 8)], residual, weight)
