"""How long an operator takes, and what it uses of the device meanwhile: roofline estimates, or measured seconds.

Contract
- A `CostModel` gives every action of a plan a `Demand`, or None for what takes no device time (views, frees, events).
- Weights are read once per execution, so a split reads them once per micro-batch; activations go by tokens.
- Everything is 16 bit, and a kernel reaches the larger of its compute and its memory time (roofline, Williams 2009).
- Estimates, never measurements: whoever prints them says `simulated`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Protocol

from dynaflow_serving.core.batch import Batch
from dynaflow_serving.core.plan import Action, ActionKind, Instance, Plan
from dynaflow_serving.core.program import Program, Resource
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.simulate.collectives import transfer
from dynaflow_serving.simulate.device import Device, Topology

BYTES = 2  # of an element
# GEMM tiles (rows, columns) with the share of `Device.flops` that they reach, and how often k may be cut: small
# tiles fill the multiprocessors with few rows, but load more bytes per operation. Assumed, for Hopper-like devices.
TILES = ((128, 256, 1.0), (128, 128, 0.9), (64, 128, 0.7), (64, 64, 0.55), (16, 128, 0.3))
SPLIT_K = (1, 2, 4, 8)
ATTENTION_EFFICIENCY = 0.85  # of attention kernels, of what GEMMs reach
STREAMING_SMS = 0.3  # share of the multiprocessors that it takes to saturate the memory


@dataclass(frozen=True, slots=True)
class Demand:
    """One execution of an action with the device to itself: `latency` seconds in which it uses nothing, then `seconds`
    in which it uses `shares` (0 to 1) of the resources. `issue`: seconds of the host before it can start."""

    seconds: float
    shares: Mapping[Resource, float]
    latency: float = 0.0
    issue: float = 0.0

    @property
    def alone(self) -> float:
        return self.latency + self.seconds


class CostModel(Protocol):
    def demands(self, plan: Plan) -> list[Demand | None]:
        """One entry per action of `plan`."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one micro-batch, or several merged, has to do: (new tokens, tokens in the KV cache) per request."""

    requests: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(new for new, _ in self.requests)


def loads(batch: Batch, bounds: Sequence[int]) -> tuple[Load, ...]:
    """`batch` cut at the token offsets `bounds`; what a request has before a cut is context behind it."""
    context = batch.context or (0,) * len(batch.tokens)
    offsets = [0, *accumulate(batch.tokens)]
    parts = []
    for start, stop in pairwise(bounds):
        cut = [(max(a, start), min(b, stop), c, a) for (a, b), c in zip(pairwise(offsets), context)]
        parts.append(Load(tuple((b - a, c + a - first) for a, b, c, first in cut if b > a)))
    return tuple(parts)


@dataclass(frozen=True, slots=True)
class Use:
    """Of one kernel: seconds alone, device-seconds of each resource, and latency besides the launch."""

    seconds: float
    compute: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    latency: float = 0.0


class Kernel(Protocol):
    def use(self, load: Load, topology: Topology) -> Use: ...


@dataclass(frozen=True, slots=True)
class Gemm:
    """`rows` per token, spread evenly over `groups` weights of k x n (experts); a weight without rows is not read."""

    k: int
    n: int
    rows: float = 1.0
    groups: int = 1

    def use(self, load: Load, topology: Topology) -> Use:
        device, rows = topology.device, self.rows * load.tokens
        # expected, when each row falls to any group alike
        active = self.groups * -math.expm1(-rows / self.groups) if self.groups > 1 else 1.0
        compute, used = self._tiled(rows / active, active, device)
        moved = BYTES * (active * self.k * self.n + rows * (self.k + self.n))
        memory = moved / device.bandwidth
        return Use(max(compute, memory), used, memory)

    def _tiled(self, rows: float, groups: float, device: Device) -> tuple[float, float]:
        """(seconds, device-seconds of compute) with the best tile: waves of tiles over the multiprocessors."""
        best = (math.inf, math.inf)
        for height, width, efficiency in TILES:
            for cut in SPLIT_K:
                tiles = math.ceil(groups * math.ceil(rows / height) * math.ceil(self.n / width)) * cut
                one = 2 * height * width * self.k / cut * device.sms / (device.flops * efficiency)
                waves = math.ceil(tiles / device.sms)
                best = min(best, (waves * one, tiles * one / device.sms))
        return best


@dataclass(frozen=True, slots=True)
class Streaming:
    """Reads and writes `elements` per token: norms, activations, permutations, copies."""

    elements: float

    def use(self, load: Load, topology: Topology) -> Use:
        seconds = BYTES * self.elements * load.tokens / topology.device.bandwidth
        return Use(seconds, STREAMING_SMS * seconds, seconds)


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

    def use(self, load: Load, topology: Topology) -> Use:
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
        return Use(seconds, min(seconds, max(compute, STREAMING_SMS * memory)), memory)


@dataclass(frozen=True, slots=True)
class Collective:
    """`kind` over `ranks` adjacent ranks; `elements` per token: of the whole tensor, for all_to_all sent by a rank."""

    kind: str
    elements: float
    ranks: int

    def use(self, load: Load, topology: Topology) -> Use:
        size = BYTES * self.elements * load.tokens
        latency, seconds = transfer(self.kind, size, self.ranks, topology)
        if not seconds:
            return Use(0.0, latency=latency)
        sms = min(1.0, topology.link.sms / topology.device.sms)
        memory = min(seconds, 2 * size / topology.device.bandwidth)
        return Use(seconds, sms * seconds, memory, seconds, latency)


@dataclass(frozen=True)
class Roofline:
    """The demand of every action from the kernels of its operators (`work`) and the `loads` of the micro-batches.

    `widths`: elements per token of values, for merges that copy. `graphs`: a CUDA graph replays the plan, so that the
    host issues nothing. A replacement kernel costs what its operators do with the latency of one launch saved per
    operator: what fusion itself saves is not known here.
    """

    topology: Topology
    work: Mapping[str, tuple[Kernel, ...]]
    widths: Mapping[str, int]
    loads: tuple[Load, ...]
    graphs: bool = True

    def demands(self, plan: Plan) -> list[Demand | None]:
        in_place: set[Instance] = set()
        result: list[Demand | None] = []
        for action in plan.actions:
            in_place |= {Instance(v, action.start, action.stop) for v in action.into}
            result.append(self._demand(action, in_place))
        return result

    def _demand(self, action: Action, in_place: set[Instance]) -> Demand | None:
        if action.kind in (ActionKind.RUN, ActionKind.REPLACE):
            kernels = [k for name in action.operators for k in self.work[name]]
            launches = len(kernels) - (len(action.operators) - 1)
            return self._together(kernels, action.start, action.stop, launches)
        if action.kind is ActionKind.MERGE:
            copied = [p for p in action.instances[1:] if p not in in_place]
            if copied:
                copy = Streaming(2 * self.widths[copied[0].value])
                return self._together([copy], min(p.start for p in copied), max(p.stop for p in copied), 1)
        return None

    def _together(self, kernels: Sequence[Kernel], start: int, stop: int, launches: int) -> Demand:
        load = Load(tuple(r for part in self.loads[start:stop] for r in part.requests))
        uses = [k.use(load, self.topology) for k in kernels]
        seconds = sum(u.seconds for u in uses)
        device = self.topology.device
        total = {
            Resource.COMPUTE: sum(u.compute for u in uses),
            Resource.MEMORY: sum(u.memory for u in uses),
            Resource.NETWORK: sum(u.network for u in uses),
        }
        return Demand(
            seconds,
            {r: min(1.0, t / seconds) for r, t in total.items() if t and seconds},
            latency=sum(u.latency for u in uses) + 1e-6 * device.launch_us * launches,
            issue=0.0 if self.graphs else 1e-6 * device.issue_us * launches,
        )


@dataclass(frozen=True)
class Measured:
    """The demand of every action from measured `seconds` per (operator, micro-batch); it uses all of its resource.

    `network_compute`: share of compute that a network operator takes from others (0: another core or engine moves the
    bytes). Merged actions cost the sum of their parts. Raises `ConfigError` for what was not measured.
    """

    program: Program
    seconds: Mapping[tuple[str, int], float]
    network_compute: float = field(default=0.0)

    def demands(self, plan: Plan) -> list[Demand | None]:
        return [self._demand(s) if s.kind in (ActionKind.RUN, ActionKind.REPLACE) else None for s in plan.actions]

    def _demand(self, action: Action) -> Demand:
        keys = [(name, mb) for name in action.operators for mb in range(action.start, action.stop)]
        if missing := [f"{name}@{mb}" for name, mb in keys if (name, mb) not in self.seconds]:
            raise ConfigError(f"no measured seconds for {', '.join(missing)}: profile the plan's own operators")
        resource = self.program.by_name[action.operators[0]].resource
        shares = {resource: 1.0}
        if resource is Resource.NETWORK and self.network_compute:
            shares[Resource.COMPUTE] = self.network_compute
        return Demand(sum(self.seconds[k] for k in keys), shares)
