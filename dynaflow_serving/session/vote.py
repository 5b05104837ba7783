"""A `Vote` lets ranks with a batch each decide together whether they split their steps.

Contract
- Data-parallel ranks that share experts meet in the same collectives in every step. So all of them split, or none does.
- Each rank votes once in every step, whatever it runs: with its own split (`cast`), or without one (`abstain`, in the
  dummy step of an idle rank). A rank that leaves out a vote would let the others wait.
- The ranks split if all have cut their batch into the same kind of split (`Signature`). Then all run the same plan.
- A vote also counts the planned steps, which would differ between the ranks. So they compare the same steps.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

from dynaflow_serving.core.batch import Batch, Signature, Split
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.strategy.splitting import whole

OUTVOTED = "another data-parallel rank does not cut its batch in this way"
WHOLE = 0  # the ballot of a rank that does not split


class Vote:
    """This is the vote of one rank.

    Attributes:
        tokens: By rank, the tokens of each micro-batch of the live step; empty if the step runs whole.
    """

    def __init__(self, ranks: Ranks, most: int) -> None:
        """Vote with `ranks`; a step has `most` micro-batches at most."""
        self.ranks, self._most = ranks, most
        self.tokens: list[list[int]] = []

    def cast(self, batch: Batch, split: Split, steps: int) -> tuple[Split, int]:
        """Vote for `split`; every rank calls this or `abstain` once per step.

        Args:
            batch: This rank's batch.
            split: How this rank would cut it.
            steps: This rank has counted so many planned steps.

        Returns:
            The split that holds, and the greatest number of planned steps that a rank has counted.
        """
        parts = split.micro_batches
        splits = len(parts) > 1
        sizes = [part.tokens[1] - part.tokens[0] for part in parts] if splits else []
        ballots = self._exchange(_kind(split.signature) if splits else WHOLE, steps, sizes)
        self.tokens = []
        if splits and all(kind == ballots[0][0] for kind, *_ in ballots):
            self.tokens = [theirs[: len(parts)] for _, _, *theirs in ballots]
        elif splits:
            split = whole(batch, OUTVOTED)
        return split, max(counted for _, counted, *_ in ballots)

    def abstain(self) -> None:
        """Vote against a split, in a step without a batch."""
        self.tokens = []
        self._exchange(WHOLE, 0, [])

    def _exchange(self, kind: int, steps: int, sizes: Sequence[int]) -> list[list[int]]:
        """Return the ballots of all ranks: the kind of split, the planned steps, and the micro-batches' tokens."""
        return self.ranks.gather_numbers([kind, steps, *sizes, *[0] * (self._most - len(sizes))])


@functools.lru_cache(maxsize=1024)
def _kind(signature: Signature) -> int:
    """Return a number for the kind of split, which is the same in all processes and not `WHOLE`."""
    digest = hashlib.sha256(repr(signature).encode()).digest()
    return 1 + int.from_bytes(digest[:7], "big")
