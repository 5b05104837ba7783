"""Batches that a strategy's `split` is tried on before it serves, and what a split must be.

Contract
- The probes are the kinds of steps that engines make. None of them is large in memory: a batch is token counts.
- `split_fault` is the one definition of a correct split; `OpScheduler.check_splits` and `testing` use it.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from dynaflow_serving.core.batch import Batch, Split

PROBES: dict[str, Batch] = {
    "one token": Batch((1,), (64,)),
    "one request": Batch((8192,), (0,)),
    "decode": Batch((1,) * 256, (512,) * 256),
    "prefill": Batch((4096,) * 4, (0,) * 4),
    "mixed": Batch((1,) * 64 + (8192,) * 2, (512,) * 64 + (0,) * 2),
    "shared prefix": Batch((4096,) * 4, (0,) * 4, depends=((0, 3),)),
    # No threshold keeps this batch whole; its context is unknown.
    "huge": Batch((1,) * 64 + (100_000,) * 16),
}


def split_fault(batch: Batch, split: object, max_micro_batches: int) -> str:
    """Return what is wrong with `split` as a cut of `batch`; "" if nothing is.

    Args:
        batch: the step.
        split: what a strategy's `split` returned.
        max_micro_batches: how many micro-batches the strategy promised to make at most.
    """
    if not isinstance(split, Split):
        return f"split() returned {type(split).__name__}, not a Split"
    parts = split.micro_batches
    if not parts:
        return "split() made no micro-batch"
    if len(parts) > max_micro_batches:
        return (
            f"split() made {len(parts)} micro-batches, more than max_micro_batches={max_micro_batches}; derive the "
            "options from SplitOptions, or define max_micro_batches in the strategy"
        )
    total = sum(batch.tokens)
    if parts[0].tokens[0] != 0 or parts[-1].tokens[1] != total or any(a >= b for a, b in (p.tokens for p in parts)):
        return f"the micro-batches hold tokens {[p.tokens for p in parts]}, which do not tile 0 to {total}"
    if any(a.tokens[1] != b.tokens[0] for a, b in pairwise(parts)):
        return f"the micro-batches hold tokens {[p.tokens for p in parts]}, which are not adjacent"
    return _requests_fault(batch, split) or _depends_fault(batch, split)


def _requests_fault(batch: Batch, split: Split) -> str:
    """Compare each micro-batch's requests with those that its tokens belong to."""
    ends = list(accumulate(batch.tokens))
    for i, part in enumerate(split.micro_batches):
        start, stop = part.tokens
        held = [r for r, (end, n) in enumerate(zip(ends, batch.tokens)) if end - n < stop and end > start]
        if part.requests != (held[0], held[-1] + 1):
            return f"micro-batch {i} names requests {part.requests}, its tokens are of {(held[0], held[-1] + 1)}"
    return ""


def _depends_fault(batch: Batch, split: Split) -> str:
    """Look for micro-batches that share state without a dependence between them."""
    holders = [
        {i for i, part in enumerate(split.micro_batches) if part.requests[0] <= r < part.requests[1]}
        for r in range(len(batch.tokens))
    ]
    needed = {(i, j) for mine in holders for i in mine for j in mine if i < j}
    needed |= {(i, j) for w, r in batch.depends for i in holders[w] for j in holders[r] if i != j}
    if missing := sorted(needed - set(split.depends)):
        return f"depends lacks {missing}: the later micro-batch reads the KV cache that the earlier one writes"
    return ""
