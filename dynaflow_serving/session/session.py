"""A `Session` is DynaFlow in one worker: its steps, executors and plan caches.

Contract
- An integration makes one session per worker, adds a plan cache per captured graph, and runs each real step in
  `with session.step(batch):`.
- Calls outside a step (dummy, profiling and capture runs) find `in_flight` None, run whole and are not counted.
- A split depends only on the batch, the programs and the number of steps, so all ranks of a group decide alike. They
  exchange whatever depends on measured times or on values. Ranks with a batch each vote.
- Steps in `with session.trial(candidate):` run as that candidate splits them. They are timed, not counted.
- A step that is not sampled costs two clock readings, a look-up and the counters.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree

from dynaflow_serving.capture.eager import EagerCapture
from dynaflow_serving.capture.independence import row_wise
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.config import Config
from dynaflow_serving.core.batch import Batch, MicroBatch, Split
from dynaflow_serving.core.timeline import Timeline
from dynaflow_serving.errors import DynaflowError, InactiveError, ScheduleError
from dynaflow_serving.executor import Executor, get_executor
from dynaflow_serving.session.agreement import agree, problem_of
from dynaflow_serving.session.check import CHECKING, Check, Comparison, describe_step
from dynaflow_serving.session.clock import BothPasses, clock_of
from dynaflow_serving.session.difference import difference, tensors
from dynaflow_serving.session.metrics import Metrics
from dynaflow_serving.session.observers import Observer, StepCounts, overridden
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.report import StepReport, WorkerReport, program_reports
from dynaflow_serving.session.step import Step, Trial
from dynaflow_serving.session.trace import TraceWriter
from dynaflow_serving.session.vote import Vote
from dynaflow_serving.strategy.selector import Selector
from dynaflow_serving.strategy.splitting import whole


class LiveStep(Step):
    """This step is a context manager: `with session.step(batch) as step:`. Entering it decides its split."""

    session: Session
    comparing = False  # whether this is the un-split run that a split one is compared with
    started: Any  # a reading of the session's clock
    both_passes: BothPasses | None = None

    def __enter__(self) -> LiveStep:
        self.session.begin(self)
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.session.end(self)

    def checked(self, result: Any, run_whole: Callable[[], Any], inputs: Any = ()) -> Any:
        """Compare the step with an un-split one, if it is split and this is a step to compare.

        Engines call this. The un-split run writes to the engine's state (a KV cache) what the split one wrote there.

        Args:
            result: The outputs of the split step, a pytree of tensors.
            run_whole: This runs the same step un-split; it finds `micro_batches` empty.
            inputs: The tensors for the reproducer.

        Returns:
            `result`, or, where the outputs differ, those of `run_whole`.
        """
        check, split, session = self.session.check, self.split, self.session
        if check is None or not (self.micro_batches or self.planned):
            return result
        if not check.wants(self, self.plan_caches, split.signature):
            return result
        self.to_compare = True
        with check.timed(session.clock):
            kept = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, result)
            with torch.no_grad(), self._unsplit():
                expected = run_whole()
            found = difference(tensors(kept), tensors(expected), check.options.tolerance)
            facts = functools.partial(describe_step, session.selector, self, split, self.plan_caches, inputs)
            comparison = Comparison(kept, expected, str(found or ""), facts)
            equal = session.conclude(self, self.plan_caches, split, comparison)
        return result if equal else expected

    def time_backward(self, given: torch.Tensor, output: torch.Tensor) -> None:
        """Count the backward pass from `output` to `given` as part of the step's time, if there will be one."""
        if self.trial is None and given.requires_grad and output.requires_grad:
            self.both_passes = BothPasses(self.session.clock, given, output, functools.partial(self.session.took, self))

    @contextmanager
    def _unsplit(self) -> Iterator[None]:
        """Let this block run the step un-split."""
        split, planned = self.split, self.planned
        self.split, self.planned, self.comparing = whole(self.batch, CHECKING), False, True
        try:
            yield
        finally:
            self.split, self.planned, self.comparing = split, planned, False

    def withdraw(self, reason: str) -> None:
        """Count the step as un-split: it could not follow its plan."""
        split, self.split = self.split, whole(self.batch, reason)
        self.to_trace = self.planned = False
        if len(split.micro_batches) > 1 and self.trial is None:
            for withdrew in self.session._on_withdrew:
                withdrew(self, reason)


class Session:
    """The session decides, runs, counts and reports the steps of one worker.

    Attributes:
        selector: It splits the batches, and names the strategies.
        plan_caches: There is one per captured graph.
        eager: The recorder of a model without a graph, or None.
        in_flight: The step that runs now, or None.
        timelines: The timelines of the latest traced step, with their programs.
        check: It compares split steps with un-split ones, or is None (`check: never`).
        vote: It decides over splits where the integration says that ranks have a batch each; else it is None.
        counts: The numbers of split and un-split steps.
    """

    _on_decided: list[Callable[[Step], None]]
    _on_withdrew: list[Callable[[Step, str], None]]
    _on_compared: list[Callable[[Step, bool], None]]
    _on_traced: list[Callable[[Step, list[Timeline]], None]]
    _on_timed: list[Callable[[Step, float], None]]
    _on_left: list[Callable[[], None]]

    def __init__(
        self,
        selector: Selector,
        config: Config,
        device_type: str | None = "cpu",
        *,
        mode: str = "",
        logger: logging.Logger | None = None,
        rank: int = 0,
    ) -> None:
        """Start without programs.

        Args:
            selector: It says which strategy splits and orders a step.
            config: The settings of executors, traces and the check.
            device_type: The worker's device, or None where only a graph says on which device it runs.
            mode: The way in which the engine compiles, for reports.
            logger: The engine's logger.
            rank: The rank of this worker, for the names of files. Only rank 0 counts in metrics.

        Raises:
            ConfigError: The trace folder cannot be made.
            InactiveError: The executor cannot run here, or cannot honour its options.
        """
        self.selector, self.config, self.mode, self.rank = selector, config, mode, rank
        row_wise(*selector.row_wise, *config.row_wise)
        self.logger = logger or logging.getLogger("dynaflow_serving")
        self.plan_caches: list[PlanCache] = []
        self.eager: EagerCapture | None = None
        self.in_flight: LiveStep | None = None
        self.retired = ""  # why all steps run whole (`retire`)
        self.timelines: list[tuple[PlanCache, Timeline]] = []
        self.clock = clock_of(device_type or "cpu")
        self._device_type = device_type
        self._executors: dict[str, Executor] = {}  # one per type of device
        if device_type is not None:
            self._executor(device_type)  # options that it cannot honour are an error now, not in the first step
        self._group: Any = None  # the process group, once its ranks have compared plans
        self._trial: Trial | None = None
        self._planned_steps = 0
        self._most_micro_batches = selector.max_micro_batches
        self.counts = StepCounts()
        self.metrics = Metrics(selector.name, rank == 0, selector.candidates)
        self.check = Check(config.check, rank) if config.check else None
        self.vote: Vote | None = None
        self._observers: list[Observer] = []
        trace_writer = TraceWriter(config.trace, rank) if config.trace else None
        for observer in filter(None, (self.counts, trace_writer, self.metrics)):
            self.observe_with(observer)

    # -- set-up by an integration ---------------------------------------------------------------------
    def observe_with(self, observer: Observer, first: bool = False) -> None:
        """Tell `observer` of steps from now on, before the other observers if `first`."""
        self._observers.insert(0 if first else len(self._observers), observer)
        for name in ("decided", "withdrew", "compared", "traced", "timed", "left"):
            setattr(self, f"_on_{name}", overridden(self._observers, name))

    def add(self, captured: CapturedProgram, device_type: str | None = None) -> PlanCache:
        """Run the steps of `captured` from now on, and return the cache of its plans.

        Args:
            captured: The program and the code of its operators.
            device_type: The device of the graph; by default, the worker's.

        Raises:
            InactiveError: The ranks serve already, and have different plans for the program.
        """
        plan_cache = PlanCache(captured, self.selector, self._executor(device_type or self._device_type or "cpu"))
        self.plan_caches.append(plan_cache)
        if self._group is not None:  # all ranks have recorded the model anew, in the same step
            agree([plan_cache.texts()], self._group)
        return plan_cache

    def _executor(self, device_type: str) -> Executor:
        """Return the executor of a device, whose graphs share streams, events and memory."""
        if device_type not in self._executors:
            self._executors[device_type] = get_executor(self.config.executor, device_type, self.config)
            self.clock = clock_of(device_type)
        return self._executors[device_type]

    def confirm(self, group: Any) -> None:
        """Check that there are programs, that they can be split, and that all ranks of `group` have the same plans.

        Raises:
            DynaflowError: One of these does not hold, and the config does not let the engine fall back.
        """
        self._group = group
        if (problem := problem_of(self.plan_caches, self._most_micro_batches, group, self.retired)) is not None:
            self.retire(problem)
        if not self.retired:
            programs = [c.captured.program for c in self.plan_caches]
            self.logger.info("DynaFlow: programs %s", ", ".join(p.digest for p in programs))
            for missing in self.selector.missing_tags(programs):
                self.logger.warning("DynaFlow: %s", missing)

    def retire(self, error: DynaflowError) -> None:
        """Run all steps whole from now on, because of `error`; raise it where `fallback: true` does not allow that."""
        if not self.config.fallback:
            raise error
        self.retired = f"fallback: {error}"
        self.logger.warning("DynaFlow is NOT active, the engine runs as it is (fallback: true): %s", error)
        for plan_cache, candidate in itertools.product(self.plan_caches, self.selector.candidates):
            plan_cache.refuse(candidate, self.retired)

    @property
    def ranks(self) -> Ranks:
        """These ranks have confirmed their plans; before that, it is this rank alone."""
        return Ranks(self._group)

    def agree_over(self, ranks: Ranks) -> None:
        """From now on, a split is refused on all `ranks` if values differ on any of them."""
        if self.check is not None:
            self.check.ranks = ranks

    # -- a step ------------------------------------------------------------------------------------------
    @property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """They belong to the step in flight; they are empty if it runs whole, or if there is no step."""
        return () if self.in_flight is None else self.in_flight.micro_batches

    def step(self, batch: Batch, plan_caches: Sequence[PlanCache] | None = None) -> LiveStep:
        """Return the step of `batch`, a context manager.

        Args:
            batch: The requests of the step.
            plan_caches: The plans of the programs that the step runs; by default, all.

        Raises:
            ScheduleError: On entry, if the strategy makes too many micro-batches.
            InactiveError: On entry, if the engine has compiled no graph.
        """
        step = LiveStep(batch, self.plan_caches if plan_caches is None else plan_caches, self._trial)
        step.session = self
        return step

    def count_unsplit(self, batch: Batch, reason: str) -> None:
        """Count a step that ran whole for `reason`, without asking the strategy."""
        step = Step(batch, ())
        step.split = whole(batch, reason)
        self.counts.decided(step)
        self.metrics.timed(step, 0.0)

    def begin(self, step: LiveStep) -> None:
        """Decide the split of `step`, and start it; `LiveStep.__enter__` calls this."""
        self.clock.poll()
        step.split = self._decide(step)
        if self.vote is not None:
            step.split, self._planned_steps = self.vote.cast(step.batch, step.split, self._planned_steps)
        if len(step.split.micro_batches) > 1:
            step.planned = True
            step.to_trace = step.trial is not None and step.trial.profiled
        elif step.plan_caches or self._device_type is None:  # else the step runs as the engine's own
            step.planned = not self.retired and self.selector.plans_unsplit(step.split.candidate)
        if step.trial is None:
            if step.planned:
                self._number(step)
            for decided in self._on_decided:
                decided(step)
        self.in_flight = step
        step.started = self.clock.start()

    def _decide(self, step: Step) -> Split:
        batch, selector = step.batch, self.selector
        if self.retired:
            return whole(batch, self.retired)
        if not step.plan_caches and self.eager is not None:
            return whole(batch, self.eager.waiting)
        if not step.plan_caches and self._device_type is not None:  # else the step itself captures its graphs
            raise InactiveError("the engine has served a step without compiling a graph through DynaFlow")
        split = selector.split(batch) if step.trial is None else selector.cut(batch, step.trial.candidate)
        count = len(split.micro_batches)
        if count > self._most_micro_batches:
            raise ScheduleError(
                f"strategy {selector.name!r} made {count} micro-batches, more than its max_micro_batches "
                f"({self._most_micro_batches})"
            )
        if count > 1 or split.candidate:
            for plan_cache in step.plan_caches:
                split = plan_cache.allowed_split(batch, split)
        return split

    def _number(self, step: Step) -> None:
        """Number `step` among those that run under a chosen plan."""
        self._planned_steps += 1
        step.number = self._planned_steps
        if self._planned_steps == 1 and step.micro_batches:
            sizes = [p.tokens[1] - p.tokens[0] for p in step.split.micro_batches]
            self.logger.info("DynaFlow: first split step, %d micro-batches of %s tokens", len(sizes), sizes)

    def end(self, step: LiveStep) -> None:
        """Time the `step`, which has ended or failed, and tell the observers; `LiveStep.__exit__` calls this."""
        self.in_flight = None
        both = step.both_passes
        self.clock.stop(step.started, both.forward_took if both else functools.partial(self.took, step))
        if step.to_trace:
            self._read_timelines(step)
        for left in self._on_left:
            left()

    def took(self, step: Step, seconds: float) -> None:
        """Tell the observers how long `step` took; a clock calls this."""
        if step.trial is not None:
            step.trial.seconds += seconds
        else:
            for timed in self._on_timed:
                timed(step, seconds)

    def _read_timelines(self, step: Step) -> None:
        found = [(c, t) for c in step.plan_caches if (t := c.timeline(step.split.signature))]
        if step.trial is not None:
            step.trial.timelines += found
        else:
            self.timelines = found
            for traced in self._on_traced:
                traced(step, [timeline for _, timeline in found])

    def conclude(
        self, step: Step, plan_caches: Sequence[PlanCache], split: Split, found: Comparison, groups: Sequence[Any] = ()
    ) -> bool:
        """Return whether a step's values equal the un-split ones on all ranks; refuse the split if they do not.

        The arguments are those of `Check.conclude`, besides the step and the cut of its batch.
        """
        assert self.check is not None
        equal = self.check.conclude(plan_caches, split.signature, found, groups)
        for compared in self._on_compared:
            compared(step, equal)
        return equal

    @contextmanager
    def trial(self, candidate: str, profiled: bool = False) -> Iterator[Trial]:
        """Run the steps in this block as `candidate` of the selector splits them; trace split ones if `profiled`."""
        outer, self._trial = self._trial, Trial(candidate, profiled)
        try:
            yield self._trial
        finally:
            self._trial = outer

    def reset(self) -> None:
        """Count from zero."""
        self.counts.reset()

    def report(self) -> WorkerReport:
        """Return the report that `dynaflow bench` and `dynaflow explain` show."""
        plans = [p for c in self.plan_caches for p in c.plans if p.micro_batches > 1]
        return WorkerReport(
            strategy=self.selector.name,
            mode=self.mode,
            steps=StepReport(split=self.counts.split, unsplit=dict(self.counts.unsplit)),
            check=self.check.report() if self.check else None,
            plan_hash=plans[-1].digest if plans else "",
            executors=[e.report() for e in dict.fromkeys(c.executor for c in self.plan_caches)],
            programs=[report for c in self.plan_caches for report in program_reports(c)],
            policy=self.selector.decisions(),
            timelines=[t.as_dict() for _, t in self.timelines],
        )

    def close(self) -> None:
        """Log the counts, and release the executors' streams and graphs."""
        unsplit = dict(self.counts.unsplit) or "none"
        self.logger.info("DynaFlow: %d steps split, un-split: %s", self.counts.split, unsplit)
        for executor in self._executors.values():
            executor.close()
