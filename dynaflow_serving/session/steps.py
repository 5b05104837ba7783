"""The steps of one worker: each is decided, counted, timed, and, where sampled, traced and compared.

Contract
- `begin` and `end` bracket a step; what runs it asks `split`, `traced` and `checked` in between. Outside a step `split`
  is None.
- `begin` depends on the batch, the programs and the number of steps only, so all ranks of a group decide alike. What
  hangs on measured times (the policy's guard) or on values (shadow mode) is agreed on over `ranks`.
- A step that is not sampled pays for two clock readings, a look-up and the counters. The tuner's are not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dynaflow_serving.config import Config
from dynaflow_serving.core.batch import Batch, MicroBatch, Split
from dynaflow_serving.core.timeline import Timeline
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.policy.bucket import bucket_of
from dynaflow_serving.session.clock import clock_of
from dynaflow_serving.session.counts import StepCounts
from dynaflow_serving.session.metrics import Metrics
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.shadow import Shadow
from dynaflow_serving.session.trace import TraceWriter
from dynaflow_serving.strategies.auto import SWITCHED_OFF, Auto
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.splitting import whole


class Steps:
    def __init__(self, strategy: OpScheduler, config: Config, device_type: str = "cpu", rank: int = 0) -> None:
        """rank: for the names of files; of all ranks the first counts in metrics. Raises `ConfigError` for a trace
        folder that cannot be made."""
        self.strategy, self.rank = strategy, rank
        self.auto = strategy if isinstance(strategy, Auto) else None
        self.clock = clock_of(device_type)
        self.trace = TraceWriter(config.trace, rank) if config.trace else None
        self.shadow = Shadow(config.shadow, rank) if config.shadow else None
        self.metrics = Metrics(strategy.name, counted=rank == 0)
        self.counts = StepCounts()
        self.plan_caches: list[PlanCache] = []
        self.split: Split | None = None  # of the step in flight
        self.traced = False  # whether the step in flight is
        self.timelines: list[tuple[PlanCache, Timeline]] = []  # of the latest traced step
        self.trial_seconds = 0.0  # of the tuner's steps, from begin to end
        self._batch = Batch(())
        self._runtimes: Sequence[PlanCache] = ()
        self._compared = False
        self._profiling = False
        self._split_steps = 0
        self._started: Any = None

    @property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """Those of the step in flight; () if it runs whole, or if there is none."""
        parts = () if self.split is None else self.split.micro_batches
        return parts if len(parts) > 1 else ()

    @property
    def tuning(self) -> bool:
        return self.auto is not None and self.auto.forced is not None

    def meet(self, ranks: Ranks) -> None:
        """From now on decide with `ranks`."""
        if self.shadow is not None:
            self.shadow.ranks = ranks

    def begin(self, batch: Batch, plan_caches: Sequence[PlanCache] | None = None) -> Split:
        """Decide the split of the step that begins, in the programs of `plan_caches` (default: all).

        Raises `ScheduleError` for too many micro-batches."""
        plan_caches = self.plan_caches if plan_caches is None else plan_caches
        self.clock.poll()
        split = self._decide(batch, plan_caches)
        self.traced = self._compared = False
        self._batch, self._runtimes = batch, plan_caches
        if len(split.micro_batches) > 1:
            self.traced = self._profiling
            if not self.tuning:
                self._sample()
        self.split = split
        if not self.tuning:
            self.counts.add(split)
        self._started = self.clock.start()
        return split

    def whole(self, batch: Batch, reason: str) -> None:
        """A step that is not for the strategy to decide, with the reason."""
        split = whole(batch, reason)
        self.counts.add(split)
        self.metrics.step(split, 0.0)

    def _decide(self, batch: Batch, plan_caches: Sequence[PlanCache]) -> Split:
        if self.shadow is not None and self.shadow.stopped:
            return whole(batch, self.shadow.stopped)
        split = self.strategy.split(batch)
        if len(split.micro_batches) > 1 and len(split.micro_batches) > self.strategy.max_micro_batches:
            raise ScheduleError(
                f"strategy {self.strategy.name!r} made {len(split.micro_batches)} micro-batches, more than its "
                f"max_micro_batches ({self.strategy.max_micro_batches})"
            )
        for plan_cache in plan_caches:
            if len(split.micro_batches) > 1:
                split = plan_cache.admit(batch, split)
        return split

    def _sample(self) -> None:
        self._split_steps += 1
        if self.trace is not None and self.trace.wants(self._split_steps):
            self.traced = True
        if self.shadow is not None and self.shadow.wants(self._split_steps):
            self._compared = True

    def checked(self, result: Any, run_whole: Callable[[], Any], inputs: Any = ()) -> Any:
        """`result` of the split step in flight, or, where it is one to compare and differs, that of `run_whole`.

        run_whole: the same step un-split; it finds `micro_batches` empty. inputs: tensors, for the reproducer.
        """
        if not self._compared or self.shadow is None or self.split is None:
            return result
        split, batch = self.split, self._batch
        kept = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, result)
        self.split = whole(batch, "shadow mode")
        try:
            with torch.no_grad():
                expected = run_whole()
        finally:
            self.split = split
        self.shadow.compare(kept, expected, self._about(split, inputs))
        self.metrics.compared(not self.shadow.stopped)
        return expected if self.shadow.stopped else result

    def _about(self, split: Split, inputs: Any) -> dict[str, Any]:
        prepared = [(r, r.prepare(split.signature)) for r in self._runtimes]
        return {
            "step": self._split_steps,
            "strategy": split.candidate or self.strategy.name,
            "options": self.strategy.of(split.candidate).options.model_dump(mode="json"),
            "torch": str(torch.__version__),  # a class of its own, which torch.load refuses
            "tokens": list(self._batch.tokens),
            "context": list(self._batch.context),
            "bounds": list(split.bounds),
            "programs": [r.captured.program.to_text() for r, _ in prepared],
            "plans": [p.plan.to_text() for _, p in prepared],
            "inputs": [t.detach().cpu().clone() for t in inputs if isinstance(t, torch.Tensor)],
        }

    def end(self) -> None:
        """The step in flight has ended, or failed."""
        split, self.split = self.split, None
        if split is None:
            return
        sampled = self.traced or self._compared
        self.clock.stop(self._started, functools.partial(self._took, self._batch, split, self.tuning, sampled))
        if self.traced:
            self.traced = False
            self._take_timelines(split)

    def _took(self, batch: Batch, split: Split, tuning: bool, sampled: bool, seconds: float) -> None:
        if tuning:
            self.trial_seconds += seconds
            return
        saved = 0.0
        parts = len(split.micro_batches)
        guard = None if self.auto is None else self.auto.guard
        if guard is not None and guard.watching and not sampled:  # sampling takes time, too
            saved = guard.observe(bucket_of(batch), parts > 1, sum(batch.tokens), seconds)
        self.metrics.step(split, saved)
        if parts > 1:
            self.metrics.plans(self._runtimes)
        elif self.auto is not None and split.reason == SWITCHED_OFF:
            self.metrics.switched_off(self.auto.switched_off)

    def _take_timelines(self, split: Split) -> None:
        found = [(r, t) for r in self._runtimes if (t := r.timeline(split.signature)).spans]
        self.timelines += found
        timelines = [t for _, t in found]
        if self._profiling:
            return
        self.timelines = found
        self.metrics.overlapped(timelines)
        if self.trace is not None:
            tokens = [b - a for a, b in (p.tokens for p in split.micro_batches)]
            self.trace.write(self._split_steps, timelines, {"tokens": tokens, "requests": len(self._batch.tokens)})

    @contextmanager
    def profiling(self) -> Iterator[None]:
        """Split steps in this block are traced into `timelines`, and not written."""
        self.timelines, self._profiling = [], True
        try:
            yield
        finally:
            self._profiling = False

    def reset(self) -> None:
        self.counts = StepCounts()
