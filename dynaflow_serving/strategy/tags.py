"""Tags: what an operator is, in words that all systems share.

Contract
- The rules of every integration, and of torch's own collectives, give operators these tags. A tag says what an operator
  does; its name may differ from system to system. docs/strategies/tags-and-streams.md has the table.
- A rule or a `mark` may give any other word as a tag, too.
- A strategy says which tags it looks for with `TagUse`, so that a Program without them is no silent surprise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from dynaflow_serving.core.program import Program


class Tag(StrEnum):
    """What an operator does."""

    ATTENTION = "attention"
    KV_UPDATE = "kv_update"
    """It writes new keys and values into the KV cache."""
    EXPERTS = "experts"
    """The products of a mixture of experts."""
    DISPATCH = "dispatch"
    """It sends tokens to the ranks of their experts."""
    COMBINE = "combine"
    """It brings the results of the experts back."""
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    BROADCAST = "broadcast"
    ROW_PARALLEL = "row_parallel"
    """A matrix product whose results the ranks then add up."""
    COLUMN_PARALLEL = "column_parallel"
    """A matrix product whose input is gathered from the ranks before."""
    SEQUENCE_PARALLEL = "sequence_parallel"
    """Its collective cuts or joins the first dimension, so that only another one can be cut besides."""
    ONE_KERNEL = "one_kernel"
    """One kernel does its compute and its communication, one beside the other."""
    REPLICATED = "replicated"
    """All ranks compute the same, token by token, on the result of an all-reduce (residual add and norm)."""


@dataclass(frozen=True)
class TagUse:
    """The tags that a strategy looks for.

    Attributes:
        tags: The strategy needs one of these.
        otherwise: What it does with a Program that has none of them, as a sentence without a full stop.
    """

    tags: tuple[Tag, ...]
    otherwise: str

    def missing_from(self, programs: Iterable[Program]) -> bool:
        """Return whether no operator has one of the tags."""
        return not any(tag in operator.tags for p in programs for operator in p.operators for tag in self.tags)
