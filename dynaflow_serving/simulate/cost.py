"""The time of an action of a plan, and its use of the device meanwhile: by rooflines, or as measured.

Contract
- A `CostModel` gives every action of a plan a `Demand`, or None to those that take no device time (views, frees,
  events).
- The figures are estimates, never measurements: whoever prints them says `simulated`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from dynaflow_serving.core.plan import Action, ActionKind, Instance, Plan
from dynaflow_serving.core.program import Program, Resource
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.planning.mirror import backward_name
from dynaflow_serving.simulate.device import Topology
from dynaflow_serving.simulate.kernel_models import KernelModel, Streaming, Workload


@dataclass(frozen=True, slots=True)
class Demand:
    """One execution of an action with the device to itself.

    Attributes:
        seconds: The time in which it uses `shares`.
        shares: The share of each resource, 0 to 1.
        latency: Seconds before that, in which it uses nothing.
        issue: Seconds of the host before it can start.
    """

    seconds: float
    shares: Mapping[Resource, float]
    latency: float = 0.0
    issue: float = 0.0

    @property
    def alone(self) -> float:
        """The seconds of the execution, with the device to itself."""
        return self.latency + self.seconds


class CostModel(Protocol):
    """Says what the actions of a plan demand."""

    def demands(self, plan: Plan) -> list[Demand | None]:
        """Return one entry per action of the plan."""


@dataclass(frozen=True)
class RooflineCosts:
    """Takes the demand of an action from the kernels of its operators.

    A replacement kernel costs the same as its operators, less the latency of one launch per operator. The time that
    fusion itself saves is not known here.

    Attributes:
        topology: The place where the plan runs.
        work: The kernels of each operator.
        widths: The elements per token of each value, for merges that copy.
        workloads: The work of each micro-batch.
        graphs: Whether a CUDA graph replays the plan, so that the host issues nothing.
        sums: The elements of each PARTIAL value, for merges that add.
    """

    topology: Topology
    work: Mapping[str, tuple[KernelModel, ...]]
    widths: Mapping[str, int]
    workloads: tuple[Workload, ...]
    graphs: bool = True
    sums: Mapping[str, int] = field(default_factory=dict)

    def demands(self, plan: Plan) -> list[Demand | None]:
        """Return one entry per action of the plan."""
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
        if action.kind is ActionKind.MERGE and action.instances[0].value in self.sums:
            additions = len(action.instances) - 2  # each reads two sums, and writes one
            add = Streaming(3 * self.sums[action.instances[0].value] * additions)
            return self._at_once([add], Workload(((1, 0),)), additions)
        if action.kind is ActionKind.MERGE:
            copied = [p for p in action.instances[1:] if p not in in_place]
            if copied:
                copy = Streaming(2 * self.widths[copied[0].value])
                return self._together([copy], min(p.start for p in copied), max(p.stop for p in copied), 1)
        return None

    def _together(self, kernels: Sequence[KernelModel], start: int, stop: int, launches: int) -> Demand:
        load = Workload(tuple(r for part in self.workloads[start:stop] for r in part.requests))
        return self._at_once(kernels, load, launches)

    def _at_once(self, kernels: Sequence[KernelModel], load: Workload, launches: int) -> Demand:
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
class MeasuredCosts:
    """Takes the demand of an action from the measured seconds of its operators; it uses all of its resource.

    An action of several operators or micro-batches costs the sum of their seconds.

    Attributes:
        program: The Program of the plans.
        seconds: The seconds of each (operator, micro-batch).
        network_compute: The share of compute that a network operator takes from others; 0 where another core or engine
            moves the bytes.
    """

    program: Program
    seconds: Mapping[tuple[str, int], float]
    network_compute: float = 0.0

    def demands(self, plan: Plan) -> list[Demand | None]:
        """Return one entry per action of the plan.

        Raises:
            ConfigError: An operator of the plan was not measured.
        """
        runs = (ActionKind.RUN, ActionKind.REPLACE)
        return [self._demand(action) if action.kind in runs else None for action in plan.actions]

    def _demand(self, action: Action) -> Demand:
        keys = [(name, mb) for name in action.operators for mb in range(action.start, action.stop)]
        if missing := [f"{name}@{mb}" for name, mb in keys if (name, mb) not in self.seconds]:
            raise ConfigError(f"no measured seconds for {', '.join(missing)}: profile the plan's own operators")
        resource = self.program.by_name[action.operators[0]].resource
        shares = {resource: 1.0}
        if resource is Resource.NETWORK and self.network_compute:
            shares[Resource.COMPUTE] = self.network_compute
        return Demand(sum(self.seconds[k] for k in keys), shares)


def backward_seconds(
    program: Program, forward: Mapping[tuple[str, int], float], total: float
) -> dict[tuple[str, int], float]:
    """Estimate the seconds of the gradients of operators from those of the forward pass.

    A gradient that the network bounds takes as long as its operator, or, where that sends nothing, as operators that do
    (the median). The others share the rest of `total` in proportion to their operators.

    Args:
        program: The forward pass.
        forward: The seconds of each (operator, micro-batch).
        total: The seconds of the whole backward pass, one operator after the other.

    Returns:
        The seconds of each (operator of the backward pass, micro-batch), which add up to `total` if any computes.
    """
    sent = {key: s for key, s in forward.items() if program.by_name[key[0]].resource is Resource.NETWORK}
    typical = median(sent.values()) if sent else 0.0
    bound: dict[tuple[str, int], float] = {}  # by the network
    computed: dict[tuple[str, int], float] = {}
    for key, seconds in forward.items():
        operator = program.by_name[key[0]]
        if (operator.gradient or operator).resource is Resource.NETWORK:
            bound[key] = sent.get(key, typical)
        else:
            computed[key] = 0.0 if key in sent else seconds
    measured, computing = sum(bound.values()), sum(computed.values())
    sending = min(measured, total)
    scales = ((bound, sending / (measured or 1)), (computed, (total - sending) / (computing or 1)))
    return {(backward_name(name), mb): s * scale for part, scale in scales for (name, mb), s in part.items()}
