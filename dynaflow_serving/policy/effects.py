"""What else a split does, besides overlapping: inputs of the decision, and part of its reason.

Contract
- `veto` says why a split is not even timed, by the limits in the config; `listed` says what it costs, in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from dynaflow_serving.core.batch import Batch, Split

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Facts:
    """What is known of a model and its engine. `key`: what a decision holds for."""

    key: dict[str, str]
    weight_bytes: int = 0  # of this rank
    collective_bytes: int = 0  # that a collective moves per token; 0: there are none
    graphs: bool = False  # un-split steps replay CUDA graphs of the engine's, split ones cannot


@dataclass(frozen=True)
class SideEffects:
    weight_bytes: int  # read besides the first time
    least_collective: int  # bytes of the smallest micro-batch's collective; 0: there are none
    straddling: int  # cuts inside a request
    loses_graphs: bool

    @staticmethod
    def of(batch: Batch, split: Split, facts: Facts) -> SideEffects:
        parts = split.micro_batches
        least = min(p.tokens[1] - p.tokens[0] for p in parts) * batch.width
        return SideEffects(
            facts.weight_bytes * (len(parts) - 1),
            least * facts.collective_bytes,
            sum(a.requests[1] > b.requests[0] for a, b in pairwise(parts)),
            facts.graphs,
        )

    def veto(self, straddle: bool, min_collective_kib: int) -> str:
        """ "" if there is none."""
        if self.straddling and not straddle:
            return f"cuts inside {self.straddling} requests (straddle: false)"
        if self.least_collective and self.least_collective < min_collective_kib * KIB:
            return f"a collective would move {self.least_collective / KIB:.0f} KiB, under {min_collective_kib} KiB"
        return ""

    def listed(self) -> list[str]:
        found = []
        if self.weight_bytes:
            found.append(f"reads {self.weight_bytes / MIB:,.1f} MiB of weights again")
        if self.least_collective:
            found.append(f"collectives of {self.least_collective / KIB:,.0f} KiB and more")
        if self.straddling:
            found.append(f"{self.straddling} cuts inside a request")
        if self.loses_graphs:
            found.append("runs without the engine's CUDA graph")
        return found
