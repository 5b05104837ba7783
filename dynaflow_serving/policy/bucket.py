"""A bucket holds all batches of one kind and about one size; the policy decides per bucket.

Contract
- `bucket_of` runs in every step, so it takes a few integer operations. It depends on the batch alone, so all ranks of
  a tensor-parallel group get the same bucket.
- A bucket is named by its greatest batch: tokens up to a power of two, requests up to a power of four.
- `representatives` gives one batch of each bucket that can occur within the limits of an engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import NamedTuple

from dynaflow_serving.core.batch import Batch

DECODE, PREFILL, MIXED = "decode", "prefill", "mixed"
KINDS = (PREFILL, MIXED, DECODE)
LEAST_TOKENS = 16  # smaller prefill and mixed buckets are not tuned, because a split has nothing to win there
TYPICAL_TOKENS, TYPICAL_REQUESTS = 512, 32  # of a step with prompts; of a step that decodes
CONTEXT = 256  # a representative decode request has so many tokens in the KV cache, where the engine has room


class Bucket(NamedTuple):
    """A bucket holds the batches of one kind, up to a number of tokens and of requests.

    Attributes:
        kind: `prefill`, `mixed` or `decode`.
        tokens: The greatest number of new tokens, a power of two.
        requests: The greatest number of requests, a power of four.
    """

    kind: str
    tokens: int
    requests: int

    def __str__(self) -> str:
        return f"{self.kind}, up to {self.tokens} tokens of {self.requests} requests"


@dataclass(frozen=True)
class Limits:
    """An engine limits each of its steps.

    Attributes:
        tokens: The greatest number of new tokens.
        requests: The greatest number of requests.
        length: The greatest number of tokens of one request, including the new ones.
        cached: The tokens of all requests together that fit into the KV cache.
    """

    tokens: int
    requests: int
    length: int
    cached: int


# Both run in every step, where a cached result is cheaper than the computation.
@cache
def next_power_of_two(n: int) -> int:
    """Return the least power of two that is not less than `n`."""
    return 1 << (n - 1).bit_length()


@cache
def next_power_of_four(n: int) -> int:
    """Return the least power of four that is not less than `n`."""
    return 1 << 2 * (((n - 1).bit_length() + 1) // 2)


def bucket_of(batch: Batch) -> Bucket:
    """Return the bucket of `batch`. A request with one new token decodes, and any other one prefills."""
    tokens = batch.tokens
    requests, total = len(tokens), sum(tokens) * batch.width
    kind = DECODE if total == requests else MIXED if batch.width == 1 and 1 in tokens else PREFILL
    return Bucket(kind, next_power_of_two(total), next_power_of_four(requests))


def representatives(limits: Limits) -> Iterator[Batch]:
    """Yield the largest batch that `limits` allow, of every bucket of at least two requests.

    The kinds take turns. Each begins with what serving meets most (`TYPICAL_TOKENS`, `TYPICAL_REQUESTS`), and goes on
    to what is larger or smaller, so that a tuning budget that ends early was spent there.
    """
    kinds = (_prompts(PREFILL, limits), _decodes(limits), _prompts(MIXED, limits))
    for batches in zip_longest(*map(_typical_first, kinds)):
        yield from (batch for batch in batches if batch is not None)


def _typical_first(batches: Iterator[Batch]) -> list[Batch]:
    """Order `batches` of one kind by how near they are to what is typical, the larger of two first."""

    def distance(batch: Batch) -> tuple[float, float, int]:
        tokens, requests = sum(batch.tokens), len(batch.tokens)
        typical = TYPICAL_REQUESTS if tokens == requests else TYPICAL_TOKENS
        return round(abs(math.log2(tokens / typical))), abs(math.log2(requests / TYPICAL_REQUESTS)), -tokens

    return sorted(batches, key=distance)


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
    """Yield `most`, then the powers of two below it, down to `least`."""
    size = most
    while size >= least:
        yield size
        size = next_power_of_two(size) // 2


def _batch(kind: str, tokens: int, requests: int, limits: Limits) -> Batch | None:
    """Return the batch of `kind` with so many tokens and requests, or None if `limits` allow none.

    Three quarters of the requests of a mixed batch decode, or fewer where the prompts would be too long. Prompts share
    the remaining tokens as evenly as possible.
    """
    prompts = requests
    if kind == MIXED:
        needed = math.ceil((tokens - requests) / max(1, limits.length - 1))
        prompts = min(requests, max(requests - requests * 3 // 4, needed))
    decodes = requests - prompts
    length, longer = divmod(tokens - decodes, prompts)
    if requests < 2 or length < 2 or length + (longer > 0) > limits.length or (kind == MIXED and not decodes):
        return None
    context = min(CONTEXT, limits.length - 1, (limits.cached - tokens) // decodes - 1) if decodes else 0
    if tokens > limits.cached or (decodes and context < 1):
        return None
    new = (1,) * decodes + (length + 1,) * longer + (length,) * (prompts - longer)
    return Batch(new, (context,) * decodes + (0,) * prompts)
