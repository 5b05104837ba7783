"""One worker process under DynaFlow: the strategy, the runtimes of its graphs, and the step in flight.

Contract
- Engine-independent: an integration makes one per worker, adds a Runtime per captured graph (where the engine has no
  graph, `segmented.SegmentedForward` does), and brackets each real step with `begin` and `end`. Calls outside a step
  (dummy, profiling and capture runs) find `split` None, run whole and are not counted.
- `begin` depends on the batch and the programs only, so all ranks decide alike; `check` compares the plans
  themselves over a process group and raises on a difference.
"""

from __future__ import annotations

import logging
from typing import Any

from dynaflow_serving.agreement import agree
from dynaflow_serving.config import Config
from dynaflow_serving.errors import InactiveError, ScheduleError
from dynaflow_serving.executor import get_executor
from dynaflow_serving.ir import Batch, MicroBatch, Split
from dynaflow_serving.partition import Capture
from dynaflow_serving.runtime import Runtime, StepCounts, report
from dynaflow_serving.segments import Segments
from dynaflow_serving.splitting import whole


class Session:
    def __init__(self, config: Config, device_type: str, mode: str, logger: logging.Logger) -> None:
        """`mode`: how the engine compiles, for reports; `logger`: the engine's."""
        self.config, self.mode, self.logger = config, mode, logger
        self.strategy = config.build()
        self.executor = get_executor(config.executor, device_type, config)
        self.runtimes: list[Runtime] = []
        self.split: Split | None = None  # of the step in flight
        self.counts = StepCounts()
        self.segments: Segments | None = None  # where the engine has no graph
        self._group: Any = None  # of the ranks, once they have compared plans

    @property
    def max_micro_batches(self) -> int:
        return self.strategy.max_micro_batches

    @property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """Those of the step in flight; () if it runs whole, or if there is none."""
        parts = () if self.split is None else self.split.micro_batches
        return parts if len(parts) > 1 else ()

    def add(self, capture: Capture) -> Runtime:
        runtime = Runtime(capture, self.strategy, self.executor)
        self.runtimes.append(runtime)
        if self._group is not None:  # recorded anew while serving, by all ranks in one step
            agree([runtime.texts()], self._group)
        return runtime

    def withdraw(self, reason: str) -> None:
        """The split step in flight was not run under its plan, and the programs do not hold any more."""
        self.counts.split -= 1
        self.counts.unsplit[reason] += 1
        self.runtimes.clear()
        self.logger.warning("DynaFlow: a step ran without its plan, the model is recorded anew: %s", reason)

    def begin(self, batch: Batch) -> Split:
        """Decide the split of the step that begins. Raises `ScheduleError` for too many micro-batches."""
        if self.runtimes:
            split = self.strategy.split(batch)
        elif self.segments is not None:
            split = whole(batch, self.segments.waiting)
        else:
            raise InactiveError("the engine has served a step without compiling a graph through DynaFlow")
        if len(split.micro_batches) > self.max_micro_batches:
            raise ScheduleError(
                f"strategy {self.strategy.name!r} made {len(split.micro_batches)} micro-batches, more than its "
                f"max_micro_batches ({self.max_micro_batches})"
            )
        for runtime in self.runtimes:
            if len(split.micro_batches) > 1:
                split = runtime.admit(batch, split)
        if len(split.micro_batches) > 1 and not self.counts.split:
            sizes = [p.tokens[1] - p.tokens[0] for p in split.micro_batches]
            self.logger.info("DynaFlow: first split step, %d micro-batches of %s tokens", len(sizes), sizes)
        self.counts.add(split)
        self.split = split
        return split

    def end(self) -> None:
        self.split = None

    def check(self, group: Any) -> None:
        """Raise `InactiveError` unless there is a graph, it can be split, and all ranks of `group` (a process
        group for CPU objects) have the same plans for it."""
        if not self.runtimes:
            raise InactiveError(
                "DynaFlow was requested, but the engine compiled no graph of this model: it has no torch.compile "
                "support in the engine, or warm-up was skipped; remove the dynaflow option for this model"
            )
        self._group = group
        agree([runtime.texts() for runtime in self.runtimes], group)
        for runtime in self.runtimes:
            program = runtime.capture.program
            if program.unsplittable and self.max_micro_batches > 1:
                raise InactiveError(f"this model cannot be split: {program.unsplittable}")
            self.logger.info("DynaFlow: program %s, %d operators", program.digest, len(program.operators))

    def report(self) -> dict[str, Any]:
        """What `dynaflow bench` and `dynaflow explain` show; plain data, for a remote call."""
        return report(self.strategy, self.mode, self.counts, self.runtimes)

    def reset(self) -> None:
        self.counts = StepCounts()

    def close(self) -> None:
        unsplit = dict(self.counts.unsplit) or "none"
        self.logger.info("DynaFlow: %d steps split, un-split: %s", self.counts.split, unsplit)
        self.executor.close()
