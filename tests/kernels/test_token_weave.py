"""TokenWeave in two real gloo processes: equal to the un-split model, with a reduce-scatter for each all-reduce."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from two_ranks import on_two_ranks
from weave_support import CASES, LAYERS, refused, weave_all

from dynaflow_serving.core.batch import Batch
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.strategies.token_weave import weave_point

COUNTS = [8, 9, 10, 17, 5, 64]  # of two halves with 2 ranks: even, uneven, too few to shard


@pytest.fixture(scope="module")
def woven() -> list[dict[str, torch.Tensor]]:
    return on_two_ranks(weave_all, COUNTS)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_the_model(case: str, woven: list[dict[str, torch.Tensor]]) -> None:
    for values in woven:
        for tokens in COUNTS:
            got, expected = values[f"{case}.{tokens}.got"], values[f"{case}.{tokens}.expected"]
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
            assert torch.equal(got, woven[0][f"{case}.{tokens}.got"])
        assert int(values[f"{case}.replaced"]) == 2 * LAYERS
        assert int(values[f"{case}.split"]) == len(COUNTS)
        # one reduce-scatter and one all-gather per layer and half: the residual stream itself is never sent
        assert values[f"{case}.64.sent"].tolist() == [2 * LAYERS, 2 * LAYERS]
        assert values[f"{case}.5.sent"].tolist() == [0, 0]


def test_what_cannot_be_woven_is_refused_on_all_ranks() -> None:
    for values in on_two_ranks(refused):
        texts = {name: bytes(text.tolist()).decode() for name, text in values.items()}
        assert "weight" in texts["unequal"]
        assert "is not the same on all ranks; use strategy 'nanoflow'" in texts["unequal"]
        assert "none of the 3 operators that follow an all-reduce (" in texts["in_place"]
        assert "kernel 'shard_tokens' has no backward" in texts["gradients"]


tiles = st.integers(1, 256)


@given(st.integers(1, 20000), st.integers(1, 3000), tiles, st.integers(1, 300), st.integers(1, 200))
def test_the_cut_is_the_best_multiple_of_a_tile(tokens: int, least: int, tile: int, columns: int, sms: int) -> None:
    def waves(part: int) -> int:
        return -(-(-(-part // tile) * columns) // sms)

    allowed = [c for c in range(tile, tokens, tile) if c >= least and tokens - c >= least]
    cut = weave_point(tokens, least, tile, columns, sms)
    if not allowed:
        assert cut == 0
    else:
        assert cut in allowed
        assert waves(cut) + waves(tokens - cut) == min(waves(c) + waves(tokens - c) for c in allowed)


def test_split_says_why_not_and_cuts_inside_a_request() -> None:
    strategy = get_strategy("token_weave")()
    assert strategy.split(Batch((100, 200))).reason == "a half would have under 2048 tokens"
    first, second = strategy.split(Batch((100, 8092))).micro_batches
    assert first.tokens[1] % 128 == 0 and second.tokens == (first.tokens[1], 8192)
