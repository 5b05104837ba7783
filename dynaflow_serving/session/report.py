from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynaflow_serving.session.counts import StepCounts
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.strategy.base import OpScheduler


def report(strategy: OpScheduler, mode: str, counts: StepCounts, plan_caches: Sequence[PlanCache]) -> dict[str, Any]:
    """What `dynaflow bench` and `dynaflow explain` show of one process; plain data, for a remote call."""
    plans = [p for r in plan_caches for p in r.plans if p.micro_batches > 1]
    return {
        "strategy": strategy.name,
        "mode": mode,
        "steps": {"split": counts.split, "unsplit": dict(counts.unsplit)},
        "plan_hash": plans[-1].digest if plans else "",
        "executors": [e.report() for e in dict.fromkeys(r.executor for r in plan_caches)],
        "programs": [
            {"program": r.captured.program.to_text(), "plans": [p.to_text() for p in r.plans]} for r in plan_caches
        ],
    }
