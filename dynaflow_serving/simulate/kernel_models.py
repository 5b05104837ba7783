"""The kernels of a decoder as rooflines: the time of each with the device to itself, and its use of the device.

Contract
- Weights are read once per execution, so a split reads them once per micro-batch; activations go by tokens.
- Every element has 16 bits, and a kernel takes the longer of its compute and its memory time (roofline, Williams 2009).
- The figures are estimates, never measurements: whoever prints them says `simulated`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

from dynaflow_serving.core.batch import Batch
from dynaflow_serving.simulate.collectives import transfer
from dynaflow_serving.simulate.device import Device, Topology

BYTES = 2  # of an element
SPLIT_K = (1, 2, 4, 8)  # into how many parts a GEMM may cut k
ATTENTION_EFFICIENCY = 0.85  # of attention kernels, of what GEMMs reach
STREAMING_SMS = 0.3  # share of the multiprocessors that it takes to saturate the memory


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of a GEMM, and the share of `Device.flops` that it reaches."""

    rows: int
    columns: int
    efficiency: float


# Small tiles fill the multiprocessors with few rows, but load more bytes per operation. The shares are assumed, for
# Hopper-like devices.
TILES = (
    Tile(rows=128, columns=256, efficiency=1.0),
    Tile(rows=128, columns=128, efficiency=0.9),
    Tile(rows=64, columns=128, efficiency=0.7),
    Tile(rows=64, columns=64, efficiency=0.55),
    Tile(rows=16, columns=128, efficiency=0.3),
)


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of one micro-batch, or of several merged: (new tokens, tokens in the KV cache) per request."""

    requests: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        """The number of new tokens."""
        return sum(new for new, _ in self.requests)


def workloads(batch: Batch, bounds: Sequence[int]) -> tuple[Workload, ...]:
    """Cut a batch at the token offsets `bounds`; the tokens of a request before a cut are context behind it."""
    context = batch.context or (0,) * len(batch.tokens)
    offsets = [0, *accumulate(batch.tokens)]
    parts = []
    for start, stop in pairwise(bounds):
        cut = [(max(a, start), min(b, stop), c, a) for (a, b), c in zip(pairwise(offsets), context)]
        parts.append(Workload(tuple((b - a, c + a - first) for a, b, c, first in cut if b > a)))
    return tuple(parts)


@dataclass(frozen=True, slots=True)
class KernelUse:
    """One execution of a kernel with the device to itself.

    Attributes:
        seconds: Its duration.
        compute: The device-seconds of compute that it uses; likewise `memory` and `network`.
        latency: Seconds besides those of the launch in which it uses nothing.
    """

    seconds: float
    compute: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    latency: float = 0.0


class KernelModel(Protocol):
    """A kernel whose time depends on the work and on the place where it runs."""

    def use(self, load: Workload, topology: Topology) -> KernelUse:
        """Return what one execution uses."""


@dataclass(frozen=True, slots=True)
class Gemm:
    """A matrix product with `rows` rows per token, spread evenly over `groups` weights of k x n (experts).

    A weight without rows is not read.
    """

    k: int
    n: int
    rows: float = 1.0
    groups: int = 1

    def use(self, load: Workload, topology: Topology) -> KernelUse:
        device, rows = topology.device, self.rows * load.tokens
        # the expected number of groups with rows, when each row falls to any group alike
        active = self.groups * -math.expm1(-rows / self.groups) if self.groups > 1 else 1.0
        compute, used = self._tiled(rows / active, active, device)
        moved = BYTES * (active * self.k * self.n + rows * (self.k + self.n))
        memory = moved / device.bandwidth
        return KernelUse(seconds=max(compute, memory), compute=used, memory=memory)

    def _tiled(self, rows: float, groups: float, device: Device) -> tuple[float, float]:
        """Return the seconds and the device-seconds of compute with the best tile.

        Tiles run in waves over the multiprocessors.
        """
        best = (math.inf, math.inf)
        for tile in TILES:
            for cut in SPLIT_K:
                tiles = math.ceil(groups * math.ceil(rows / tile.rows) * math.ceil(self.n / tile.columns)) * cut
                one = 2 * tile.rows * tile.columns * self.k / cut * device.sms / (device.flops * tile.efficiency)
                waves = math.ceil(tiles / device.sms)
                best = min(best, (waves * one, tiles * one / device.sms))
        return best


@dataclass(frozen=True, slots=True)
class Streaming:
    """A kernel that reads and writes `elements` per token: norms, activations, permutations, copies."""

    elements: float

    def use(self, load: Workload, topology: Topology) -> KernelUse:
        seconds = BYTES * self.elements * load.tokens / topology.device.bandwidth
        return KernelUse(seconds=seconds, compute=STREAMING_SMS * seconds, memory=seconds)


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal attention over a KV cache of `cache` elements per token.

    A pair of query and key costs 2 * `heads` * `width` operations, width being query and value dimension together;
    `decode_width` is for requests with one new token (absorbed MLA works on latents).
    """

    heads: int
    width: int
    decode_width: int
    cache: int

    def use(self, load: Workload, topology: Topology) -> KernelUse:
        device = topology.device
        flops = moved = streamed = 0.0
        for new, context in load.requests:
            pairs = new * (context + (new + 1) / 2)
            flops += 2 * self.heads * pairs * (self.decode_width if new == 1 else self.width)
            streamed += (context + new) * self.cache
            moved += new * self.heads * self.width
        compute = flops / (device.flops * ATTENTION_EFFICIENCY)
        memory = BYTES * (streamed + moved) / device.bandwidth
        seconds = max(compute, memory)
        return KernelUse(seconds=seconds, compute=min(seconds, max(compute, STREAMING_SMS * memory)), memory=memory)


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective over `ranks` adjacent ranks.

    Attributes:
        kind: A name in `collectives.KINDS`.
        elements: Elements per token: of the full tensor, or for all_to_all those that a rank sends.
        ranks: The number of ranks.
    """

    kind: str
    elements: float
    ranks: int

    def use(self, load: Workload, topology: Topology) -> KernelUse:
        size = BYTES * self.elements * load.tokens
        latency, seconds = transfer(self.kind, size, self.ranks, topology)
        if not seconds:
            return KernelUse(0.0, latency=latency)
        sms = min(1.0, topology.link.sms / topology.device.sms)
        memory = min(seconds, 2 * size / topology.device.bandwidth)
        return KernelUse(seconds=seconds, compute=sms * seconds, memory=memory, network=seconds, latency=latency)
