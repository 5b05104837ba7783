"""A split has side effects besides overlapping: they are inputs of the decision, and part of its reason.

Contract
- `veto` says why a split is not even timed, by the limits in the config.
- `in_words` lists the costs of a split for people.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from dynaflow_serving.core.batch import Batch, Split

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Facts:
    """The policy knows these facts about a model and its engine.

    Attributes:
        key: The model, machine and releases that a decision holds for.
        weight_bytes: The size of this rank's weights that a micro-batch reads.
        collective_bytes: The bytes that a collective moves per token; 0 where there are no collectives.
        graphs: Whether un-split steps replay CUDA graphs of the engine. Split steps cannot replay them.
    """

    key: dict[str, str]
    weight_bytes: int = 0
    collective_bytes: int = 0
    graphs: bool = False


@dataclass(frozen=True)
class SideEffects:
    """These are the side effects of one split.

    Attributes:
        weight_bytes: The weights that are read again, in bytes.
        least_collective: The bytes that the smallest micro-batch's collective moves; 0 where there are no collectives.
        straddling: The number of cuts inside a request.
        loses_graphs: Whether the step could have replayed a CUDA graph of the engine.
    """

    weight_bytes: int
    least_collective: int
    straddling: int
    loses_graphs: bool

    @classmethod
    def of_split(cls, batch: Batch, split: Split, facts: Facts) -> SideEffects:
        """Work out the side effects of running `batch` as `split`."""
        parts = split.micro_batches
        least = min(p.tokens[1] - p.tokens[0] for p in parts) * batch.width
        return cls(
            weight_bytes=facts.weight_bytes * (len(parts) - 1),
            least_collective=least * facts.collective_bytes,
            straddling=sum(a.requests[1] > b.requests[0] for a, b in pairwise(parts)),
            loses_graphs=facts.graphs,
        )

    def veto(self, straddle: bool, min_collective_kib: int) -> str:
        """Return why the options `straddle` and `min_collective_kib` rule the split out, or ""."""
        if self.straddling and not straddle:
            return f"cuts inside {self.straddling} requests (straddle: false)"
        if self.least_collective and self.least_collective < min_collective_kib * KIB:
            return f"a collective would move {self.least_collective / KIB:.0f} KiB, under {min_collective_kib} KiB"
        return ""

    def in_words(self) -> list[str]:
        """Return one phrase per side effect that the split has."""
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
