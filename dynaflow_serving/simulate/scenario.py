"""One step of a model on a topology: un-split, in sequential micro-batches, and under a strategy.

Contract
- `compare` returns one schedule each for the un-split step, for the strategy's own micro-batches one after another on
  one stream, and for the strategy's plan. Where the strategy does not split, its schedule says why.
- Every figure that leaves this module (`as_dict`) carries `simulated: true`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.config import Config
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.program import Resource
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.simulate.device import Topology
from dynaflow_serving.simulate.engine import Simulation
from dynaflow_serving.simulate.executor import SimulatedExecutor
from dynaflow_serving.simulate.model import Shape, decoder
from dynaflow_serving.strategies import build_strategy
from dynaflow_serving.strategies.sequential import Sequential
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.selector import FixedStrategy, Selector
from dynaflow_serving.strategy.splitting import whole

_REQUESTS = re.compile(r"(?:(\d+)x)?(\d+)(?:@(\d+))?$")


MICRO_BATCHES = (2, 3, 4)  # compared where the user names no number


@dataclass(frozen=True)
class SimulatedSchedule:
    """One way to run the step.

    Attributes:
        schedule: The name of the strategy, or "un-split".
        tokens: The tokens of each micro-batch.
        timeline: What was simulated.
        speed_up: Over the un-split step.
        reason: Why the strategy did not split; "" if it did.
    """

    schedule: str
    tokens: tuple[int, ...]
    timeline: Simulation
    speed_up: float
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data; times are in milliseconds, the others are shares of the makespan."""
        t = self.timeline
        return {
            "simulated": True,
            "schedule": self.schedule,
            "micro_batches": len(self.tokens),
            "tokens": list(self.tokens),
            "ms": t.makespan * 1e3,
            "speed_up": self.speed_up,
            "overlap": t.overlap,
            "busy": {r.value: busy(t, r) for r in Resource},
            "exposed_network_ms": t.exposed_network * 1e3,
            "critical_path_ms": t.critical_path * 1e3,
            "plan": t.plan.digest,
            "not_split": self.reason,
        }


@dataclass(frozen=True)
class Scenario:
    """A step that several schedules are compared on.

    Attributes:
        shape: The model.
        topology: The ranks that run it.
        batch: The requests of one data-parallel rank.
        graphs: Whether CUDA graphs spare the host the issuing of kernels.
    """

    shape: Shape
    topology: Topology
    batch: Batch
    graphs: bool = True

    @property
    def title(self) -> str:
        """The scenario in words."""
        return f"{self.shape.name} on {self.topology.title}, {len(self.batch.tokens)} requests a rank"

    def simulate(self, strategies: Sequence[OpScheduler]) -> list[SimulatedSchedule]:
        """Compare the strategies; schedules with one plan and one cut are listed once.

        Raises:
            ConfigError, ScheduleError, PlanError: As `compare` raises them.
        """
        compared = compare(self.shape, self.topology, self.batch, strategies, self.graphs)
        return list({(s.schedule, s.tokens, s.timeline.plan.digest): s for s in compared}.values())

    def as_dict(self, batch: str, config: Config, schedules: Sequence[SimulatedSchedule]) -> dict[str, Any]:
        """Return the schedules and all they depend on as plain data.

        Args:
            batch: The requests as the user wrote them.
            config: The config whose strategy was simulated.
            schedules: The result of `simulate`.
        """
        return {
            "simulated": True,
            "model": self.shape.model_dump(),
            "topology": self.topology.model_dump(),
            "batch": batch,
            "graphs": self.graphs,
            "strategy": config.model_dump(),
            "rows": [schedule.as_dict() for schedule in schedules],
        }


def variants(selector: Selector, config: Config) -> list[OpScheduler]:
    """Return the strategies that a config and its selector stand for.

    These are the candidates of a strategy that chooses among several. Else they are the strategy with each number of
    `MICRO_BATCHES`, unless it has no such option or the config names a number.
    """
    strategies = [selector.strategy(candidate) for candidate in selector.candidates]
    numbered = "micro_batches" in type(selector.options).model_fields
    if len(strategies) > 1 or not numbered or "micro_batches" in config.options:
        return strategies
    return [build_strategy(config.strategy, config.options | {"micro_batches": n}) for n in MICRO_BATCHES]


def busy(timeline: Simulation, resource: Resource) -> float:
    """Return the share of the makespan in which the resource was used, 0 to 1."""
    return timeline.busy[resource] / timeline.makespan if timeline.makespan else 0.0


def parse_requests(text: str) -> Batch:
    """Read requests such as `128x1@1024,2x512`: 128 of one new token with 1024 in the KV cache, then two of 512.

    Raises:
        ConfigError: The text is not of this form.
    """
    tokens: list[int] = []
    context: list[int] = []
    for part in text.split(","):
        m = _REQUESTS.match(part.strip())
        if m is None or not int(m[2]) or m[1] == "0":
            raise ConfigError(
                f"--batch {text!r}: {part!r} is not of the form [COUNTx]TOKENS[@CONTEXT], such as 64, 2x512 or "
                "128x1@1024 (count and tokens at least 1)"
            )
        tokens += [int(m[2])] * int(m[1] or 1)
        context += [int(m[3] or 0)] * int(m[1] or 1)
    return Batch(tuple(tokens), tuple(context))


def compare(
    shape: Shape, topology: Topology, batch: Batch, strategies: Sequence[OpScheduler], graphs: bool = True
) -> list[SimulatedSchedule]:
    """Simulate the un-split step, then for each strategy its sequential micro-batches and its plan.

    Raises:
        ConfigError: The model does not fit the topology.
        ScheduleError: A strategy does not schedule the model, as when it is run for real.
        PlanError: A plan is wrong.
    """
    model = decoder(shape, topology)
    executor = SimulatedExecutor(model, topology, graphs)

    def timeline(strategy: OpScheduler, split: Split) -> Simulation:
        plan_cache = PlanCache(CapturedProgram(model.program, {}), FixedStrategy(strategy), executor)
        result: Simulation = plan_cache.run([batch], split)[0]
        return result

    unsplit = timeline(Sequential(), whole(batch, ""))
    found = [SimulatedSchedule("un-split", (sum(batch.tokens),), unsplit, speed_up=1.0)]
    in_turn: set[tuple[int, ...]] = set()
    for strategy in strategies:
        split = PlanCache(CapturedProgram(model.program, {}), FixedStrategy(strategy), executor).decide(batch)
        tokens = tuple(b - a for a, b in (m.tokens for m in split.micro_batches))
        reason = split.reason if len(tokens) == 1 else ""
        if len(tokens) > 1 and split.bounds not in in_turn:
            in_turn.add(split.bounds)
            t = timeline(Sequential(), split)
            found.append(SimulatedSchedule("sequential", tokens, t, speed_up=unsplit.makespan / t.makespan))
        t = timeline(strategy, split)
        speed_up = unsplit.makespan / t.makespan
        found.append(SimulatedSchedule(strategy.name, tokens, t, speed_up=speed_up, reason=reason))
    return found
