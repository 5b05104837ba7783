"""Batches of one kind and size: what a decision of the policy is about.

Contract
- `bucket_of` is what happens per step: a few integer operations, a function of the batch alone, so that all ranks of a
  tensor-parallel group get the same.
- A bucket is named by its greatest batch: tokens up to a power of two, requests up to a power of four.
- `representatives` gives, for what an engine can serve, one batch of each bucket that can occur.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from dynaflow_serving.core.batch import Batch

DECODE, PREFILL, MIXED = "decode", "prefill", "mixed"
KINDS = (PREFILL, MIXED, DECODE)
LEAST_TOKENS = 16  # of prefill and mixed buckets that are tuned; below, a split has nothing to win
CONTEXT = 256  # tokens in the KV cache of a representative decode request, where the engine has room


class Bucket(NamedTuple):
    kind: str
    tokens: int  # at most
    requests: int  # at most

    def __str__(self) -> str:
        return f"{self.kind}, up to {self.tokens} tokens of {self.requests} requests"


@dataclass(frozen=True)
class Limits:
    """What one step of the engine may have at most."""

    tokens: int
    requests: int
    length: int  # tokens of one request, the new ones included
    cached: int  # tokens in the KV cache, of all requests together


def bucket_of(batch: Batch) -> Bucket:
    """A request with one new token decodes, any other one prefills."""
    tokens = batch.tokens
    requests, total = len(tokens), sum(tokens) * batch.width
    kind = DECODE if total == requests else MIXED if batch.width == 1 and 1 in tokens else PREFILL
    bits = (requests - 1).bit_length()
    return Bucket(kind, 1 << (total - 1).bit_length(), 1 << bits + (bits & 1))


def representatives(limits: Limits) -> Iterator[Batch]:
    """The largest batch that `limits` allow, of every bucket of at least two requests.

    Kinds take turns, each from large to small, first every fourth bucket, then those between: a budget that ends early
    has seen all sizes.
    """
    kinds = (_prompts(PREFILL, limits), _decodes(limits), _prompts(MIXED, limits))
    for batches in zip_longest(*map(_coarse_to_fine, kinds)):
        yield from (batch for batch in batches if batch is not None)


def _coarse_to_fine(batches: Iterator[Batch]) -> list[Batch]:
    found = list(batches)
    order = dict.fromkeys(i for stride in (4, 2, 1) for i in range(0, len(found), stride))
    return [found[i] for i in order]


def _most_requests(limits: Limits) -> int:
    return min(limits.requests, limits.tokens)


def _decodes(limits: Limits) -> Iterator[Batch]:
    for requests in _halving(_most_requests(limits), 2):
        context = min(CONTEXT, limits.length - 1, limits.cached // requests - 1)
        if context > 0:
            yield Batch((1,) * requests, (context,) * requests)


def _prompts(kind: str, limits: Limits) -> Iterator[Batch]:
    most = _most_requests(limits)
    for tokens in _halving(limits.tokens, LEAST_TOKENS):
        for requests in sorted({min(most, 4**k) for k in range(1, (most - 1).bit_length() // 2 + 2)}):
            batch = _batch(kind, tokens, requests, limits)
            if batch is not None:
                yield batch


def _halving(most: int, least: int) -> Iterator[int]:
    """`most`, then the powers of two below it."""
    size = most
    while size >= least:
        yield size
        size = 1 << (size - 1).bit_length() - 1


def _batch(kind: str, tokens: int, requests: int, limits: Limits) -> Batch | None:
    """None if there is no such batch."""
    decodes = requests * 3 // 4 if kind == MIXED else 0
    prompts = requests - decodes
    length, longer = divmod(tokens - decodes, prompts)
    if requests < 2 or length < 2 or length + (longer > 0) > limits.length or (kind == MIXED and not decodes):
        return None
    context = min(CONTEXT, limits.length - 1, (limits.cached - tokens) // decodes - 1) if decodes else 0
    if tokens > limits.cached or (decodes and context < 1):
        return None
    new = (1,) * decodes + (length + 1,) * longer + (length,) * (prompts - longer)
    return Batch(new, (context,) * decodes + (0,) * prompts)
