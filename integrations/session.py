"""One worker process under DynaFlow: its steps, executor and plan caches, and the start of serving.

Contract
- Engine-independent: an integration makes one per worker, adds a PlanCache per captured graph (where the engine has no
  graph, `segmented.SegmentedForward` does), and brackets each real step with `begin` and `end`. Calls outside a step
  (dummy, profiling and capture runs) find `split` None, run whole and are not counted.
- `check` compares the plans themselves over a process group and raises on a difference; `start` then makes the policy's
  decisions, where the strategy is one that decides, and from there on the worker serves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from dynaflow_serving.capture.eager import EagerCapture
from dynaflow_serving.capture.program import CapturedProgram, PlanFunction
from dynaflow_serving.config import Config
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.executor import get_executor
from dynaflow_serving.policy.effects import Facts
from dynaflow_serving.policy.start import start_policy
from dynaflow_serving.policy.table import Table
from dynaflow_serving.policy.tuner import Trials
from dynaflow_serving.session.agreement import agree
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.report import report
from dynaflow_serving.session.steps import Steps
from dynaflow_serving.strategy.splitting import whole


class Session(Steps):
    def __init__(self, config: Config, device_type: str, mode: str, logger: logging.Logger, rank: int = 0) -> None:
        """`mode`: how the engine compiles, for reports; `logger`: the engine's; `rank`: of this worker."""
        super().__init__(config.build(), config, device_type, rank)
        self.config, self.mode, self.logger = config, mode, logger
        self.executor = get_executor(config.executor, device_type, config)
        self.segments: EagerCapture | None = None  # where the engine has no graph
        self.policy: Table | None = None  # what was decided, where the strategy is one that decides
        self._group: Any = None  # of the ranks, once they have compared plans
        self._told = False

    @property
    def max_micro_batches(self) -> int:
        return self.strategy.max_micro_batches

    def add(self, capture: CapturedProgram) -> PlanCache:
        plan_cache = PlanCache(capture, self.strategy, self.executor)
        self.plan_caches.append(plan_cache)
        if self._group is not None:  # recorded anew while serving, by all ranks in one step
            agree([plan_cache.texts()], self._group)
        return plan_cache

    def withdraw(self, reason: str) -> None:
        """The split step in flight was not run under its plan, and the programs do not hold any more."""
        self.counts.split -= 1
        self.counts.unsplit[reason] += 1
        self.plan_caches.clear()
        self.split, self.traced, self._compared = whole(self._batch, reason), False, False
        self.logger.warning("DynaFlow: a step ran without its plan, the model is recorded anew: %s", reason)

    def begin(self, batch: Batch, plan_caches: Sequence[PlanCache] | None = None) -> Split:
        """Decide the split of the step that begins. Raises `ScheduleError` for too many micro-batches."""
        if not self.plan_caches and self.segments is None:
            raise InactiveError("the engine has served a step without compiling a graph through DynaFlow")
        split = super().begin(batch, plan_caches)
        if self.micro_batches and not self._told and not self.tuning:
            self._told = True
            sizes = [p.tokens[1] - p.tokens[0] for p in split.micro_batches]
            self.logger.info("DynaFlow: first split step, %d micro-batches of %s tokens", len(sizes), sizes)
        return split

    def _decide(self, batch: Batch, plan_caches: Sequence[PlanCache]) -> Split:
        if not plan_caches and self.segments is not None:
            return whole(batch, self.segments.waiting)
        return super()._decide(batch, plan_caches)

    def plan(self, plan_cache: PlanCache) -> PlanFunction:
        """What runs `plan_cache`'s program in the split step in flight."""
        assert self.split is not None
        return plan_cache.prepare(self.split.signature, traced=self.traced).run

    def check(self, group: Any) -> None:
        """Raise `InactiveError` unless there is a graph, it can be split, and all ranks of `group` (a process
        group for CPU objects) have the same plans for it."""
        if not self.plan_caches:
            raise InactiveError(
                "DynaFlow was requested, but the engine compiled no graph of this model: it has no torch.compile "
                "support in the engine, or warm-up was skipped; remove the dynaflow option for this model"
            )
        self._group = group
        agree([plan_cache.texts() for plan_cache in self.plan_caches], group)
        for plan_cache in self.plan_caches:
            program = plan_cache.captured.program
            if program.unsplittable and self.max_micro_batches > 1:
                raise InactiveError(f"this model cannot be split: {program.unsplittable}")
            self.logger.info("DynaFlow: program %s, %d operators", program.digest, len(program.operators))

    def start(self, trials: Trials, facts: Callable[[], Facts]) -> None:
        """After `check`: decide by measuring, where the strategy is one that decides; `facts` is asked only then. Steps
        are counted from here on. Raises `InactiveError` for ranks that have different decisions."""
        ranks = Ranks(self._group)
        if self.auto is None:
            self.meet(ranks)
        else:
            self.policy = start_policy(self, self.plan_caches, trials, facts(), ranks, self.logger)

    def report(self) -> dict[str, Any]:
        """What `dynaflow bench` and `dynaflow explain` show; plain data, for a remote call."""
        content = report(self.strategy, self.mode, self.counts, self.plan_caches)
        content["policy"] = None if self.policy is None else self.policy.model_dump()
        content["timelines"] = [t.as_dict() for _, t in self.timelines]
        return content

    def close(self) -> None:
        unsplit = dict(self.counts.unsplit) or "none"
        self.logger.info("DynaFlow: %d steps split, un-split: %s", self.counts.split, unsplit)
        self.executor.close()
