"""`Metrics` counts the steps of one worker for Prometheus.

Contract
- `dynaflow_steps_total{strategy, reason}` counts every step. `strategy` is the candidate or strategy that ran it. An
  un-split step has strategy "none" and a `reason`.
- All series whose labels are known are there from the start, at zero.
- All workers of a process share one registry. An engine's integration brings it to the engine's own endpoint.
- Only the first of the ranks that run the same steps counts them.
- prometheus_client is imported with the first worker, not before. Engines choose how it keeps values across processes
  by a variable that must be set by then.
- The time saved is an estimate, made by the policy from the latest un-split steps of the same bucket.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from dynaflow_serving.core.timeline import Timeline
from dynaflow_serving.session.observers import Observer
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.session.step import Step

NONE = "none"


@cache
def _instruments() -> dict[str, Any]:
    """Return the counters and gauges by name. They are made once per process, as Prometheus refuses a name twice."""
    from prometheus_client import Counter, Gauge

    counters = {
        "steps": ("Steps of the engine, by the strategy that ran them and the reason why not", ["strategy", "reason"]),
        "time_saved_seconds": ("Estimated time saved against un-split steps of the same bucket", []),
        "plan_cache_hits": ("Steps whose plan was made before", []),
        "plans": ("Plans made, verified and bound", []),
        "graph_captures": ("Plans captured as CUDA graphs", []),
        "guard_switch_offs": ("Buckets whose strategy turned out slower while serving", []),
        "checked_steps": ("Split steps compared with un-split ones", ["result"]),
    }
    gauges = {
        "overlap_ratio": "Share of the latest traced step in which streams overlapped",
        "hidden_network_ratio": "Share of the network time of the latest traced step with other work beside it",
        "graph_mebibytes": "Memory of captured plans",
    }
    made: dict[str, Any] = {n: Counter(f"dynaflow_{n}", text, labels) for n, (text, labels) in counters.items()}
    return made | {n: Gauge(f"dynaflow_{n}", text, multiprocess_mode="mostrecent") for n, text in gauges.items()}


def registry() -> Any:
    """Return a Prometheus registry that holds this process' DynaFlow metrics, and nothing else."""
    from prometheus_client import CollectorRegistry

    made = CollectorRegistry()
    for instrument in _instruments().values():
        made.register(instrument)
    return made


class _Uncounted:
    """On ranks that do not count, this stands in for every counter and gauge."""

    def labels(self, *values: str) -> _Uncounted:
        return self

    def inc(self, amount: float = 1.0) -> None:
        pass

    def set(self, value: float) -> None:
        pass


class Metrics(Observer):
    """This observer counts the steps of one worker."""

    def __init__(self, strategy: str, counted: bool = True, candidates: Sequence[str] = ("",)) -> None:
        """Start with the process' counters.

        Args:
            strategy: The name of the configured strategy.
            counted: Whether this rank is the one that counts.
            candidates: What may run steps; "" stands for the strategy itself.
        """
        self.strategy = strategy
        self._made: Mapping[str, Any] = _instruments() if counted else defaultdict(_Uncounted)
        ran = [(candidate or strategy, "") for candidate in candidates]
        self._steps: dict[tuple[str, str], Any] = {labels: self._made["steps"].labels(*labels) for labels in ran}
        for result in ("equal", "different"):
            self._made["checked_steps"].labels(result)
        self._seen: dict[str, float] = {}  # how far totals that are counted elsewhere have been added

    def timed(self, step: Step, seconds: float) -> None:
        split = step.split
        if step.planned:
            labels = split.candidate or self.strategy, ""
        else:
            labels = NONE, split.reason
        if labels not in self._steps:
            self._steps[labels] = self._made["steps"].labels(*labels)
        self._steps[labels].inc()
        if step.saved > 0:
            self._made["time_saved_seconds"].inc(step.saved)
        if step.planned:
            self._count_plans(step.plan_caches)

    def traced(self, step: Step, timelines: Sequence[Timeline]) -> None:
        """Set the gauges of overlap; for a step in several graphs they show the mean by time."""
        seconds = sum(t.makespan for t in timelines)
        if seconds:
            self._made["overlap_ratio"].set(sum(t.overlapped for t in timelines) / seconds)
            self._made["hidden_network_ratio"].set(sum(t.hidden_network * t.makespan for t in timelines) / seconds)

    def compared(self, step: Step, equal: bool) -> None:
        self._made["checked_steps"].labels("equal" if equal else "different").inc()

    def switched_off(self) -> None:
        """Count that the guard has switched off a bucket's strategy."""
        self._made["guard_switch_offs"].inc()

    def _count_plans(self, plan_caches: Sequence[PlanCache]) -> None:
        self._count_up_to("plans", sum(c.made for c in plan_caches))
        self._count_up_to("plan_cache_hits", sum(c.hits for c in plan_caches))
        if plan_caches and (graphs := plan_caches[0].executor.graphs):
            self._count_up_to("graph_captures", graphs.graphs)
            self._made["graph_mebibytes"].set(graphs.mib)

    def _count_up_to(self, name: str, total: float) -> None:
        seen = self._seen.get(name, 0.0)
        if total > seen:
            self._made[name].inc(total - seen)
            self._seen[name] = total
