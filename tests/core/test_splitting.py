"""Splits tile the batch, and `depends` names every pair of micro-batches that share engine state."""

from __future__ import annotations

from itertools import accumulate, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.strategy.splitting import cut_at_requests, cut_at_tokens, cut_evenly

REQUESTS = st.lists(st.integers(1, 20), min_size=1, max_size=12)


def owners(split: Split, tokens: list[int]) -> list[set[int]]:
    """Request -> the micro-batches that hold a token of it, token by token."""
    request_of = [r for r, n in enumerate(tokens) for _ in range(n)]
    held: list[set[int]] = [set() for _ in tokens]
    for i, m in enumerate(split.micro_batches):
        for t in range(*m.tokens):
            held[request_of[t]].add(i)
    return held


@settings(max_examples=400, deadline=None, derandomize=True)
@given(tokens=REQUESTS, n=st.integers(1, 6), minimum=st.integers(1, 8), data=st.data())
def test_splits_tile_the_batch_and_name_all_dependences(
    tokens: list[int], n: int, minimum: int, data: st.DataObject
) -> None:
    request = st.integers(0, len(tokens) - 1)
    shared = tuple(data.draw(st.lists(st.tuples(request, request), max_size=3)))
    batch = Batch(tuple(tokens), depends=shared)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, sum(tokens) - 1)), max_size=n)) - {sum(tokens)})
    for split in (
        cut_at_requests(batch, n, minimum),
        cut_evenly(batch, n, minimum),
        cut_at_tokens(batch, cuts, minimum),
    ):
        parts = split.micro_batches
        assert split.bounds == (0, *(m.tokens[1] for m in parts))
        assert parts[0].tokens[0] == 0 and parts[-1].tokens[1] == sum(tokens)
        assert all(a.tokens[1] == b.tokens[0] for a, b in pairwise(parts))
        assert all(a < b for m in parts for a, b in (m.tokens, m.requests))
        assert parts[0].requests[0] == 0 and parts[-1].requests[1] == len(tokens)
        held = owners(split, tokens)
        for i, m in enumerate(parts):
            assert {r for r, mine in enumerate(held) if i in mine} == set(range(*m.requests))
        expected = {(i, j) for mine in held for i in mine for j in mine if i < j}
        expected |= {(i, j) for w, r in shared for i in held[w] for j in held[r] if i != j}
        assert set(split.depends) == expected
        if len(parts) == 1:
            assert split.reason or (cuts == [] and not split.depends)
        else:
            assert all(b - a >= minimum for a, b in pairwise(split.bounds))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(tokens=REQUESTS, n=st.integers(2, 6))
def test_cutting_at_requests_cuts_no_request(tokens: list[int], n: int) -> None:
    split = cut_at_requests(Batch(tuple(tokens)), n)
    assert set(split.bounds) <= {0, *accumulate(tokens)}
    assert split.depends == ()


def test_the_cut_is_the_nearest_request_boundary() -> None:
    assert cut_at_requests(Batch((5, 1, 1, 1, 8)), 2).bounds == (0, 8, 16)
    assert cut_at_requests(Batch((9, 1)), 2).bounds == (0, 9, 10)
    assert cut_evenly(Batch((9, 1)), 2).bounds == (0, 5, 10)


def test_reasons() -> None:
    assert cut_at_requests(Batch((7,)), 2).reason == "one request"
    assert cut_evenly(Batch((1,)), 2).reason == "one token"
    assert "under 4 tokens" in cut_at_requests(Batch((3, 9)), 2, 4).reason
