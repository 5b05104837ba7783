"""What the decisions about other buckets tell about one: how long its steps take, that it loses, or what to do with it.

Contract
- A split costs relatively more in a smaller batch. So what has lost clearly in a larger bucket is not tried, and what
  the budget does not reach may follow a smaller neighbour, or one of twice its size.
- Only buckets of one kind (prefill, mixed, decode) are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from dynaflow_serving.core.batch import Batch
from dynaflow_serving.policy.bucket import DECODE, Bucket
from dynaflow_serving.policy.selector import AutoSelector
from dynaflow_serving.policy.side_effects import Facts
from dynaflow_serving.policy.table import Decision

LOSES_CLEARLY = 0.9  # below this speed-up, smaller buckets are not tried


def expected_seconds(bucket: Bucket, decisions: Iterable[Decision]) -> float:
    """Return the seconds that an un-split step of `bucket` takes at least; 0.0 if no step of its kind was timed.

    A step with more tokens than another one takes at least as long, and one with fewer at least its proportion.
    """
    known = [(d.tokens, d.plain_ms) for d in decisions if d.kind == bucket.kind and d.plain_ms is not None]
    return max((ms / 1e3 * min(1.0, bucket.tokens / tokens) for tokens, ms in known), default=0.0)


def too_long(step: float, left: float) -> str:
    """Say that a step takes too long for the seconds of the budget that are left."""
    return f"not tuned: a step takes {step:.2g} s or more, and {max(0.0, left):.2g} s of the budget are left for it"


def lost_before(bucket: Bucket, decisions: list[Decision]) -> str:
    """Return why a bucket need not be tried, or "" if it must."""
    for larger in _larger(bucket, decisions):
        best = larger.best
        speed_up = (best.measured or best.predicted) if best is not None else None
        if not larger.candidate and speed_up is not None and speed_up < LOSES_CLEARLY:
            return f"not tried: {speed_up:.2f}x at up to {larger.tokens} tokens already"
    return ""


def infer(
    decision: Decision, batch: Batch, decisions: Iterable[Decision], selector: AutoSelector, facts: Facts
) -> None:
    """Fill in a `decision` that the budget did not reach, by its nearest neighbour. The guard will watch it.

    Args:
        decision: It is left as it is if it was decided, or if no neighbour is split.
        batch: The representative of its bucket.
        decisions: All decisions.
        selector: It cuts the batch.
        facts: For the side effects of the split, which may be vetoed.
    """
    if decision.decided or (source := _neighbour(decision.bucket, decisions)) is None:
        return
    split = selector.cut(batch, source.candidate)
    if len(split.micro_batches) == 1 and not selector.plans_unsplit(source.candidate):
        return
    if selector.veto(batch, split, facts):
        return
    decision.candidate, decision.noise = source.candidate, source.noise
    decision.decided = decision.inferred = True
    decision.reason = f"inferred from {source.bucket} ({decision.reason})"


def _neighbour(bucket: Bucket, decisions: Iterable[Decision]) -> Decision | None:
    """Return the nearest measured decision of the kind, with at most twice the tokens, if that is split."""
    measured = [d for d in decisions if d.kind == bucket.kind and d.decided and not d.inferred and d.trials]

    def distance(d: Decision) -> tuple[float, float]:
        return abs(math.log2(d.tokens / bucket.tokens)), abs(math.log2(d.requests / bucket.requests))

    found = min((d for d in measured if d.tokens <= 2 * bucket.tokens), key=distance, default=None)
    return found if found is not None and found.candidate else None


def _larger(bucket: Bucket, decisions: list[Decision]) -> Iterator[Decision]:
    """Yield the decisions with trials about larger buckets of the same kind and, unless they decode, requests."""
    for d in decisions:
        same = d.kind == bucket.kind and (d.kind == DECODE or d.requests == bucket.requests)
        if same and d.tokens > bucket.tokens and d.trials:
            yield d
