"""The discrete-event run of a plan: streams in order, events, and a device that concurrent operators share.

Contract
- The order is the plan's own: a stream runs its actions one after another, and a WAIT holds its stream until the
  RECORD.
- Operators that run at a time share the device: none runs faster than alone, and no resource is used beyond 1. An
  operator that asks for little of a crowded resource gets it; the others share the rest alike (max-min fair). So a
  memory-bound operator beside a compute-bound one slows neither much, and two alike take twice as long.
- Hence critical path <= makespan <= the sum of all operators alone and of the host's issuing. The makespan is not under
  the busy time of any resource.
- More bandwidth never slows an operator, nor a plan on one stream. It may slow a plan with several streams, in which an
  operator that ends sooner lets its successor in beside a critical one. Real devices have such anomalies (Graham) too.

Algorithm
    until all streams are at their end: start all that can start, fix the rates, advance to the next end of a phase
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dynaflow_serving.core.plan import ActionKind, Plan
from dynaflow_serving.core.program import Resource
from dynaflow_serving.core.timeline import Span, Timeline
from dynaflow_serving.errors import PlanError
from dynaflow_serving.simulate.cost import Demand

Shares = Mapping[Resource, float]


@dataclass(frozen=True)
class Simulation(Timeline):
    """The result of `simulate`: a timeline of which everything is simulated, in seconds."""

    ended: float  # when the host and all streams were done
    busy: dict[Resource, float]  # device-seconds used of each resource
    critical: tuple[int, ...]  # actions of the longest chain, each operator as long as alone
    critical_path: float  # its length

    @property
    def makespan(self) -> float:
        """Seconds."""
        return self.ended


@dataclass(slots=True)
class _Running:
    """An action that has started and not ended."""

    index: int
    demand: Demand
    start: float
    latency: float
    work: float  # seconds left as if alone

    @property
    def left(self) -> float:
        return self.latency or self.work


@dataclass
class _State:
    plan: Plan
    demands: Sequence[Demand | None]
    queues: dict[str, list[int]]
    issued: list[float]  # when the host has issued each action
    now: float = 0.0
    recorded: set[int] = field(default_factory=set)
    running: dict[str, _Running] = field(default_factory=dict)

    def start_ready(self) -> float:
        """Start all that can start now.

        Returns:
            When the host issues the next action of an idle stream; inf if there is none.
        """
        moved, wake = True, float("inf")
        while moved:
            moved, wake = False, float("inf")
            for stream, queue in self.queues.items():
                while queue and stream not in self.running:
                    i = queue[-1]
                    action, demand = self.plan.actions[i], self.demands[i]
                    if action.kind is ActionKind.WAIT and action.event not in self.recorded:
                        break
                    if demand is not None and self.issued[i] > self.now:
                        wake = min(wake, self.issued[i])
                        break
                    queue.pop()
                    moved = True
                    if action.kind is ActionKind.RECORD:
                        self.recorded.add(action.event)
                    if demand is not None and demand.alone > 0:
                        self.running[stream] = _Running(i, demand, self.now, demand.latency, demand.seconds)
        return wake


def simulate(plan: Plan, demands: Sequence[Demand | None]) -> Simulation:
    """Run a plan.

    Args:
        plan: The plan.
        demands: One demand per action, as `CostModel.demands` returns them.

    Raises:
        PlanError: The plan never ends.
    """
    queues = {s: [i for i, action in enumerate(plan.actions) if action.stream == s][::-1] for s in plan.streams}
    state = _State(plan, demands, queues, list(_issue_times(demands)))
    spans: list[Span] = []
    while True:
        wake = state.start_ready()
        running = state.running
        if not running and wake == float("inf"):
            break
        rates = dict(zip(running, share([r.demand.shares if not r.latency else {} for r in running.values()])))
        ends = {s: r.left / rates[s] for s, r in running.items()}
        elapsed = min([*ends.values(), wake - state.now])
        state.now = wake if elapsed == wake - state.now else state.now + elapsed
        for stream, r in list(running.items()):
            done = ends[stream] <= elapsed * (1 + 1e-12)
            if r.latency:
                r.latency = 0.0 if done else r.latency - elapsed
                done = done and r.work <= 0
            elif not done:
                r.work -= elapsed * rates[stream]
            if done:
                del running[stream]
                spans.append(Span(r.index, plan.actions[r.index], r.start, state.now))
    if stuck := [plan.actions[q[-1]] for q in queues.values() if q]:
        held = ", ".join(f"stream {action.stream!r} for event e{action.event}" for action in stuck)
        raise PlanError(f"the plan never ends: {held} wait for an event that is not recorded")
    path, length = _critical(plan, demands, state.issued)
    busy = {r: sum(d.seconds * d.shares.get(r, 0.0) for d in demands if d is not None) for r in Resource}
    spans.sort(key=lambda s: (s.start, s.index))
    on_network = [i for i, d in enumerate(demands) if d is not None and Resource.NETWORK in d.shares]
    network = frozenset(name for i in on_network for name in plan.actions[i].operators)
    return Simulation(
        plan=plan,
        spans=tuple(spans),
        network=network,
        simulated=True,
        ended=state.now,
        busy=busy,
        critical=path,
        critical_path=length,
    )


def share(wanted: Sequence[Shares]) -> list[float]:
    """Return how fast operators that want these shares run together, each relative to alone (0 to 1)."""
    rates = [1.0] * len(wanted)
    while True:
        load = {r: sum(x * w.get(r, 0.0) for x, w in zip(rates, wanted)) for r in Resource}
        resource = max(load, key=lambda r: load[r])
        if load[resource] <= 1 + 1e-12:
            return rates
        # each resource is filled once at most: rates only fall, so that it does not overflow again
        level = _water_level([x * w.get(resource, 0.0) for x, w in zip(rates, wanted)])
        rates = [min(x, level / w[resource]) if w.get(resource) else x for x, w in zip(rates, wanted)]


def _water_level(amounts: Iterable[float]) -> float:
    """Return the most that each may take, so that a resource of 1 is used up: sum(min(amount, level)) == 1."""
    rest, amounts = 1.0, sorted(amounts)
    for i, amount in enumerate(amounts):
        fair = rest / (len(amounts) - i)
        if amount >= fair:
            return fair
        rest -= amount
    return 1.0


def _issue_times(demands: Sequence[Demand | None]) -> Iterable[float]:
    """Yield when the host has issued each action."""
    now = 0.0
    for demand in demands:
        now += demand.issue if demand is not None else 0.0
        yield now


def _critical(plan: Plan, demands: Sequence[Demand | None], issued: Sequence[float]) -> tuple[tuple[int, ...], float]:
    """Return the actions and the length of the longest chain through streams and events, with nothing shared."""
    end: list[float] = []
    via: list[int] = []
    last: dict[str, int] = {}
    recorded: dict[int, int] = {}
    for i, action in enumerate(plan.actions):
        before = [last[action.stream]] if action.stream in last else []
        if action.kind is ActionKind.WAIT and action.event in recorded:
            before.append(recorded[action.event])
        latest = max(before, key=end.__getitem__, default=-1)
        demand = demands[i]
        start = end[latest] if latest >= 0 else 0.0
        if demand is not None and issued[i] > start:
            latest, start = -1, issued[i]  # the host is late
        end.append(start + (demand.alone if demand is not None else 0.0))
        via.append(latest)
        last[action.stream] = i
        if action.kind is ActionKind.RECORD:
            recorded[action.event] = i
    at = max(range(len(end)), key=end.__getitem__, default=-1)
    length = end[at] if at >= 0 else 0.0
    path = []
    while at >= 0:
        path += [at] if demands[at] is not None else []
        at = via[at]
    return tuple(reversed(path)), length
