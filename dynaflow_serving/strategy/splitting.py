"""Ways to cut a batch, for strategies.

Contract
- Every micro-batch holds at least one token; ranges are adjacent and cover the batch.
- `depends` of the result is complete: requests that straddle a cut, and shared KV blocks that one
  request of the step writes and another reads (`Batch.depends`).
- When no cut is possible or worthwhile: one micro-batch, and `reason` says why. Most steps of a server are such (they
  decode), so a step that is too small is found before any cut is computed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import accumulate, pairwise

from dynaflow_serving.core.batch import Batch, MicroBatch, Split


def whole(batch: Batch, reason: str) -> Split:
    """Return the un-split step.

    Args:
        batch: the step.
        reason: why it is not split; reports count the steps of each reason.
    """
    return Split((MicroBatch((0, len(batch.tokens)), (0, sum(batch.tokens))),), reason=reason)


def _too_small(batch: Batch, min_tokens: int) -> Split:
    return whole(batch, f"a micro-batch would have under {min_tokens} tokens")


def cut_at_requests(batch: Batch, micro_batches: int, min_tokens: int = 1) -> Split:
    """Cut at the request boundaries that are nearest to equal token counts, as NanoFlow does.

    Args:
        batch: the step.
        micro_batches: how many to make at most; there are no more than requests.
        min_tokens: the step stays whole if a micro-batch would have fewer tokens.
    """
    n = min(micro_batches, len(batch.tokens))
    if n < 2:
        return whole(batch, "one request")
    if sum(batch.tokens) < n * min_tokens:
        return _too_small(batch, min_tokens)
    offsets = [0, *accumulate(batch.tokens)]
    cuts = [0]
    for k in range(1, n):
        target = offsets[-1] * k / n
        i = bisect_left(offsets, target)
        if i > 0 and target - offsets[i - 1] <= offsets[i] - target:
            i -= 1
        cuts.append(min(max(i, cuts[-1] + 1), len(batch.tokens) - (n - k)))
    return cut_at_tokens(batch, [offsets[c] for c in cuts[1:]], min_tokens)


def cut_evenly(batch: Batch, micro_batches: int, min_tokens: int = 1) -> Split:
    """Cut into equal token counts, inside a request where need be, as TokenWeave does.

    Args:
        batch: the step.
        micro_batches: how many to make at most; there are no more than tokens.
        min_tokens: the step stays whole if a micro-batch would have fewer tokens.
    """
    total = sum(batch.tokens)
    n = min(micro_batches, total)
    if n < 2:
        return whole(batch, "one token")
    if total < n * min_tokens:
        return _too_small(batch, min_tokens)
    return cut_at_tokens(batch, [total * k // n for k in range(1, n)], min_tokens)


def cut_prefill_decode(batch: Batch, min_tokens: int = 1, decode_first: bool = True) -> Split:
    """Cut at the border between decode requests and prefill requests, as POD-Attention and DuetServe do.

    A request decodes if it has one new token and some context (one new token, where the context is unknown). Every
    other one prefills.

    Args:
        batch: the step.
        min_tokens: the step stays whole if a micro-batch would have fewer tokens.
        decode_first: which kind must come first, so that a plan knows its micro-batches by position.
    """
    context = batch.context or batch.tokens
    decodes = [new == 1 and old > 0 for new, old in zip(batch.tokens, context, strict=True)]
    n = sum(decodes)
    if n in (0, len(decodes)):
        return whole(batch, "decode requests only" if n else "prefill requests only")
    first = n if decode_first else len(decodes) - n
    if decodes != sorted(decodes, reverse=decode_first):
        kinds = ("decode", "prefill") if decode_first else ("prefill", "decode")
        return whole(batch, f"not all {kinds[0]} requests come before the {kinds[1]} requests")
    return cut_at_tokens(batch, [sum(batch.tokens[:first])], min_tokens)


def cut_at_tokens(batch: Batch, cuts: list[int], min_tokens: int = 1) -> Split:
    """Cut at token offsets.

    Args:
        batch: the step.
        cuts: offsets, ascending, inside the batch.
        min_tokens: the step stays whole if a micro-batch would have fewer tokens.
    """
    offsets = [0, *accumulate(batch.tokens)]
    edges = [0, *cuts, offsets[-1]]
    if any(b - a < min_tokens for a, b in pairwise(edges)):
        return _too_small(batch, min_tokens)
    parts = tuple(
        MicroBatch((bisect_right(offsets, a) - 1, bisect_left(offsets, b)), (a, b)) for a, b in pairwise(edges)
    )
    pairs = {
        (i, j)
        for i in range(len(parts))
        for j in range(i + 1, len(parts))
        if parts[i].requests[1] > parts[j].requests[0]  # a request straddles
    }
    for writer, reader in batch.depends:
        w = {i for i, p in enumerate(parts) if p.requests[0] <= writer < p.requests[1]}
        r = {i for i, p in enumerate(parts) if p.requests[0] <= reader < p.requests[1]}
        pairs |= {(i, j) for i in w for j in r if i != j}
    return Split(parts, tuple(sorted(pairs)))
