"""One step of a model on a topology: un-split, in sequential micro-batches, and under a strategy.

Contract
- `compare` gives one row each for the un-split step, the strategy's own micro-batches run one after another on one
  stream, and the strategy's plan; where the strategy does not split, its row says why.
- Every figure that leaves this module (`as_dict`) carries `simulated: true`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.program import Resource
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.simulate.device import Topology
from dynaflow_serving.simulate.engine import Simulation
from dynaflow_serving.simulate.executor import SimulatedExecutor
from dynaflow_serving.simulate.model import Shape, decoder
from dynaflow_serving.strategies.sequential import Sequential
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.splitting import whole

_REQUESTS = re.compile(r"(?:(\d+)x)?(\d+)(?:@(\d+))?$")


@dataclass(frozen=True)
class Row:
    """One way to run the step. `speed_up` is over the un-split step; `reason`: why the strategy did not split."""

    schedule: str
    tokens: tuple[int, ...]  # of each micro-batch
    timeline: Simulation
    speed_up: float
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, in milliseconds and shares of the makespan."""
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


def busy(timeline: Simulation, resource: Resource) -> float:
    """Share of the makespan that the resource was used, 0 to 1."""
    return timeline.busy[resource] / timeline.makespan if timeline.makespan else 0.0


def parse_requests(text: str) -> Batch:
    """`128x1@1024,2x512`: 128 requests of one new token with 1024 in the KV cache, then two of 512. Raises
    `ConfigError`."""
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
) -> list[Row]:
    """The un-split step, then for each strategy its sequential micro-batches and its plan.

    Raises `ConfigError` for a model that does not fit the topology, `ScheduleError` and `PlanError` as the strategy
    does when it is run for real.
    """
    model = decoder(shape, topology)
    executor = SimulatedExecutor(model, topology, graphs)

    def timeline(strategy: OpScheduler, split: Split) -> Simulation:
        plan_cache = PlanCache(CapturedProgram(model.program, {}), strategy, executor)
        result: Simulation = plan_cache.run([batch], split)[0]
        return result

    plain = timeline(Sequential(), whole(batch, ""))
    rows = [Row("un-split", (sum(batch.tokens),), plain, 1.0)]
    in_turn: set[tuple[int, ...]] = set()
    for strategy in strategies:
        split = PlanCache(CapturedProgram(model.program, {}), strategy, executor).decide(batch)
        tokens = tuple(b - a for a, b in (m.tokens for m in split.micro_batches))
        reason = split.reason if len(tokens) == 1 else ""
        if len(tokens) > 1 and split.bounds not in in_turn:
            in_turn.add(split.bounds)
            t = timeline(Sequential(), split)
            rows.append(Row("sequential", tokens, t, plain.makespan / t.makespan))
        t = timeline(strategy, split)
        rows.append(Row(strategy.name, tokens, t, plain.makespan / t.makespan, reason))
    return rows
