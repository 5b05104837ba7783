"""All-reduce + add + norm of functional collectives, in two real gloo processes; the probe of symmetric memory."""

from __future__ import annotations

import pytest
import torch
from kernel_support import all_reduce_cases, assert_like
from two_ranks import RANKS, on_two_ranks

pytest.importorskip("triton", reason="needs triton, which is not installed")

from dynaflow_serving.errors import InactiveError
from dynaflow_serving.kernels.collectives import own_tokens
from dynaflow_serving.kernels.symmetric import SymmetricAllReduce, unsupported


@pytest.mark.skipif(torch.cuda.is_available(), reason="the gloo processes run triton's interpreter, so need no CUDA")
def test_two_ranks_equal_all_reduce_then_add_then_norm() -> None:
    counts = [0, 1, 2, 3, 7, 16]  # even, uneven, and fewer tokens than ranks
    results = on_two_ranks(all_reduce_cases, counts, 24, torch.float32)
    for tokens in counts:
        for rank, values in enumerate(results):
            expected = values[f"{tokens}.expected_total"], values[f"{tokens}.expected_normed"]
            assert_like((values[f"{tokens}.total"], values[f"{tokens}.normed"]), expected)
            assert torch.equal(values[f"{tokens}.normed"], results[0][f"{tokens}.normed"])
            own = own_tokens(tokens, rank, RANKS)
            assert_like(values[f"{tokens}.own_total"][own.start : own.stop], expected[0][own.start : own.stop])
            assert torch.equal(values[f"{tokens}.own_normed"], values[f"{tokens}.normed"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no CUDA device")
def test_symmetric_memory_says_what_is_missing() -> None:
    assert unsupported() == "no CUDA device is visible"
    with pytest.raises(InactiveError, match="no CUDA device is visible; use kernel 'all_reduce_add_rms_norm'"):
        SymmetricAllReduce(4, 8, torch.float32, None, torch.device("cpu"))
