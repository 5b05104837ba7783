"""The requests of one engine step, and how a strategy cuts them.

Contract
- These classes are data only. All counts are of one step; all ranges are half-open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Batch:
    """What a strategy may look at when it decides a split."""

    tokens: tuple[int, ...]
    """The new tokens of each request, in batch order."""
    context: tuple[int, ...] = ()
    """The tokens that each request has in the KV cache already; () if unknown."""
    depends: tuple[tuple[int, int], ...] = ()
    """Pairs (writer, reader) of requests that share KV blocks."""
    width: int = 1
    """Positions per token, where the batch is cut along something else than tokens (sequences of that length)."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Ranges (start, stop) of the step's batch. A request may straddle two micro-batches."""

    requests: tuple[int, int]
    tokens: tuple[int, int]


class Signature(NamedTuple):
    """The part of a Split that its Plan depends on, besides the Program."""

    micro_batches: int
    depends: tuple[tuple[int, int], ...] = ()
    candidate: str = ""


@dataclass(frozen=True, slots=True)
class Split:
    """How the batch of one step is cut."""

    micro_batches: tuple[MicroBatch, ...]
    depends: tuple[tuple[int, int], ...] = ()
    """Pairs (earlier, later) of micro-batches: the later one reads engine state that the earlier one writes."""
    reason: str = ""
    """Why there is one micro-batch only."""
    candidate: str = ""
    """The strategy that cut it and orders it, where a policy chooses among strategies."""

    @property
    def signature(self) -> Signature:
        return Signature(len(self.micro_batches), self.depends, self.candidate)

    @property
    def bounds(self) -> tuple[int, ...]:
        """The token offsets of the cuts; the first is 0, the last the number of tokens."""
        return (0, *(m.tokens[1] for m in self.micro_batches))
