"""What one engine step brings, and how it is cut.

Contract
- Only data. All counts are of one step; all ranges are half-open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Batch:  # what a strategy may look at when it decides a split; all counts are of this step
    tokens: tuple[int, ...]  # new tokens of each request, in batch order
    context: tuple[int, ...] = ()  # tokens already in the KV cache, per request; () if unknown
    depends: tuple[tuple[int, int], ...] = ()  # (writer request, reader request) of shared KV blocks
    width: int = 1  # positions per token, where what is cut is not tokens (sequences of that length)


@dataclass(frozen=True, slots=True)
class MicroBatch:  # half-open ranges into the step's batch; a request may straddle two micro-batches
    requests: tuple[int, int]
    tokens: tuple[int, int]


class Signature(NamedTuple):  # of a Split: what its Plan depends on, besides the Program
    micro_batches: int
    depends: tuple[tuple[int, int], ...] = ()
    candidate: str = ""


@dataclass(frozen=True, slots=True)
class Split:  # how one step's batch is cut
    micro_batches: tuple[MicroBatch, ...]
    depends: tuple[tuple[int, int], ...] = ()  # (earlier, later): later reads engine state that earlier writes
    reason: str = ""  # why there is one micro-batch only
    candidate: str = ""  # who cut it and orders it, where a policy chooses among strategies

    @property
    def signature(self) -> Signature:
        return Signature(len(self.micro_batches), self.depends, self.candidate)

    @property
    def bounds(self) -> tuple[int, ...]:  # token offsets of the cuts, first 0 and last the number of tokens
        return (0, *(m.tokens[1] for m in self.micro_batches))
