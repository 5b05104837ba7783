"""A `PlanCache` holds the plans of one captured program.

Contract
- A Plan is recorded, lowered, verified and bound once per Split signature, on first use. From then on a step looks it
  up in a dictionary.
- An un-split step runs in the program's own order on the compute stream, unless the strategy schedules un-split steps
  too (`OpScheduler.schedules_unsplit`).
- `run_plain` runs the program in its own order, whatever the strategy does with un-split steps.
- Where autograd runs a plan backwards, that plan is made and verified with it.
- A candidate that is refused splits nothing any more, and orders no un-split steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.batch import Batch, Signature, Split
from dynaflow_serving.core.plan import Plan
from dynaflow_serving.core.program import Program
from dynaflow_serving.core.timeline import Timeline
from dynaflow_serving.errors import PlanError, ScheduleError
from dynaflow_serving.executor.base import BoundPlan, Executor
from dynaflow_serving.executor.sequential import SequentialExecutor
from dynaflow_serving.executor.tracing import measured
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.mirror import backward_of
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.strategies.sequential import Sequential
from dynaflow_serving.strategy.selector import Selector
from dynaflow_serving.strategy.splitting import whole


def no_context(micro_batch: int) -> None:
    """This is the `enter` of programs whose operators read no context."""


class PlanCache:
    """This cache makes the plans of one program, and keeps them.

    Attributes:
        made: The number of plans that were made.
        hits: The number of look-ups that found a plan.
        checked: Steps of these signatures have been compared with un-split ones.
        refused: The candidates whose steps differed from un-split ones, with the reason.
        backward: The backward passes of the plans that were made, by signature: Program and Plan.
    """

    def __init__(
        self, captured: CapturedProgram, selector: Selector, executor: Executor, zero_copy: bool = True
    ) -> None:
        """Start without plans.

        Args:
            captured: The program and the code of its operators.
            selector: Its strategies record the plans.
            executor: It binds the plans.
            zero_copy: Whether operators may write into given buffers. Autograd forbids that.
        """
        self.captured, self.selector, self.executor = captured, selector, executor
        self.zero_copy = zero_copy
        self.made = self.hits = 0
        self._prepared: dict[tuple[Signature, bool, bool], BoundPlan] = {}
        self._plain: dict[bool, BoundPlan] = {}  # by zero_copy
        self._traced: dict[Signature, BoundPlan] = {}  # bound with a tracer, the latest of each
        self._vetoed: dict[Signature, str] = {}
        self._kernels: dict[Signature, Mapping[str, Callable[..., Any]]] = {}  # that strategies gave themselves
        self.checked: set[Signature] = set()
        self.refused: dict[str, str] = {}
        self.backward: dict[Signature, tuple[Program, Plan]] = {}

    def runs_in(self, micro_batches: int) -> bool:
        """Return whether steps of so many micro-batches can run this program; those of one row cannot be split."""
        return micro_batches == 1 or not self.captured.one_row

    def decide(self, batch: Batch) -> Split:
        """Return the selector's split, or the whole batch with the reason why it cannot be split."""
        return self.allowed_split(batch, self.selector.split(batch))

    def allowed_split(self, batch: Batch, split: Split) -> Split:
        """Return `split` if it can be run, else the whole batch with the reason.

        A program may be unsplittable, or dependences between micro-batches may leave no valid order.

        Raises:
            PlanError, ScheduleError: The strategy makes no correct plan even without the dependences.
        """
        if not self.runs_in(len(split.micro_batches)):
            return split
        if self.captured.program.unsplittable and len(split.micro_batches) > 1:
            return whole(batch, f"program: {self.captured.program.unsplittable}")
        if split.candidate in self.refused and (split.candidate or len(split.micro_batches) > 1):
            return whole(batch, self.refused[split.candidate])
        if not split.depends or split.signature in self._vetoed:
            reason = self._vetoed.get(split.signature)
            return whole(batch, reason) if reason else split
        try:
            self.prepare(split.signature)
        except ScheduleError as e:
            self.prepare(split.signature._replace(depends=()))  # this raises an error of the strategy itself
            self._vetoed[split.signature] = f"micro-batches depend on each other: {e}"
            return whole(batch, self._vetoed[split.signature])
        return split

    def prepare(self, signature: Signature, zero_copy: bool | None = None, traced: bool = False) -> BoundPlan:
        """Return the verified, bound Plan of a signature.

        Args:
            signature: The number of micro-batches, their dependences and the candidate.
            zero_copy: Whether operators may write into given buffers; by default, as the cache was told.
            traced: Whether the plan is bound with a tracer.

        Raises:
            ScheduleError: The strategy asked for something that is not possible.
            PlanError: The plan is not a correct schedule of the program.
        """
        zero_copy = self.zero_copy if zero_copy is None else zero_copy
        key = (signature, zero_copy, traced)
        if key not in self._prepared:
            ordered = signature.micro_batches > 1 or self.orders_unsplit(signature.candidate)
            strategy = self.selector.strategy(signature.candidate) if ordered else Sequential()
            recorded = strategy.record(self.captured.program, signature.micro_batches, signature.depends)
            plan = lower(recorded, strategy.name, zero_copy)
            verify(self.captured.program, plan)
            if self.captured.mirrored and ordered:
                self.backward[signature] = backward_of(recorded, strategy.name)
            tracer = self.executor.tracer() if traced else None
            self._prepared[key] = self.executor.bind(self.captured, plan, recorded.kernels, tracer)
            self._kernels[signature] = recorded.kernels
            self.made += 1
        else:
            self.hits += 1
        prepared = self._prepared[key]
        if traced:
            self._traced[signature] = prepared
        return prepared

    def orders_unsplit(self, candidate: str) -> bool:
        """Return whether un-split steps of `candidate` run in an order of its own."""
        return self.selector.strategy(candidate).schedules_unsplit and candidate not in self.refused

    def kernels(self, signature: Signature) -> Mapping[str, Callable[..., Any]]:
        """Return the kernels that the strategy gave itself for the plan of `signature`, by name."""
        return self._kernels[signature]

    def refuse(self, candidate: str, reason: str) -> None:
        """Let `candidate` split no step from now on, and order no un-split one."""
        self.refused[candidate] = reason
        own = [key for key in self._prepared if key[0].candidate == candidate and key[0].micro_batches == 1]
        for key in own:
            del self._prepared[key]

    def timeline(self, signature: Signature) -> Timeline | None:
        """Return the timeline of the traced run of `signature` since the last call, or None if there was none."""
        prepared = self._traced.get(signature)
        if prepared is None or prepared.tracer is None:
            return None
        timeline = measured(self.captured.program, prepared.plan, prepared.tracer)
        return timeline if timeline.spans else None

    @property
    def plans(self) -> list[Plan]:
        """These plans have been made so far; the un-split ones come first."""
        made = {key[:2]: p.plan for key, p in sorted(self._prepared.items(), key=lambda item: item[0])}
        return list(made.values())

    def texts(self) -> str:
        """Return the text of all plans without dependences, which the ranks compare before the first step."""
        program = self.captured.program
        signatures = []
        for candidate in self.selector.candidates:
            strategy = self.selector.strategy(candidate)
            most = 1 if program.unsplittable else strategy.max_micro_batches
            signatures += [Signature(n, (), candidate) for n in range(1 if strategy.schedules_unsplit else 2, most + 1)]
        return "\n".join(map(self._text, signatures)) or program.to_text()

    def _text(self, signature: Signature) -> str:
        try:
            return self.prepare(signature).plan.to_text()
        except (PlanError, ScheduleError) as error:
            if not signature.candidate:
                raise
            return f"{signature.candidate}: {error}"  # the policy will not choose this candidate

    def run(
        self,
        args: Sequence[Any],
        split: Split,
        enter: Callable[[int], Any] = no_context,
        zero_copy: bool | None = None,
        traced: bool = False,
    ) -> Any:
        """Run one step under the plan of `split`.

        Args:
            args: The program's inputs, without constants.
            split: The cut of the batch.
            enter: This switches to the context of the i-th micro-batch.
            zero_copy: Whether operators may write into given buffers; by default, as the cache was told.
            traced: Whether the run is traced.

        Returns:
            The outputs in the model's own structure.
        """
        prepared = self.prepare(split.signature, zero_copy, traced)
        return self.captured.rebuild(prepared.run(args, split.bounds, enter))

    def run_whole(self, args: Sequence[Any], tokens: int, enter: Callable[[int], Any] = no_context) -> Any:
        """Run the un-split plan on a batch of `tokens` tokens; the arguments and the result are those of `run`."""
        return self.captured.rebuild(self.prepare(Signature(1)).run(args, (0, tokens), enter))

    def run_plain(self, args: Sequence[Any], tokens: int, zero_copy: bool = False) -> Any:
        """Run the program in its own order, without the strategy's kernels; the result is that of `run`.

        Args:
            args: The program's inputs, without constants.
            tokens: The number of tokens of the batch.
            zero_copy: Whether operators may write into given buffers.
        """
        if zero_copy not in self._plain:
            recorded = Sequential().record(self.captured.program, 1)
            plan = lower(recorded, Sequential.name, zero_copy)
            self._plain[zero_copy] = self.executor.bind(self.captured, plan, recorded.kernels)
        return self.captured.rebuild(self._plain[zero_copy].run(args, (0, tokens), no_context))

    def run_in_turn(self, args: Sequence[Any], split: Split) -> Any:
        """Run the plan of `split` on one stream, with buffers of its own; arguments and result are those of `run`."""
        plan = self.prepare(split.signature, zero_copy=False).plan
        bound = SequentialExecutor().bind(self.captured, plan, self._kernels[split.signature])
        return self.captured.rebuild(bound.run(args, split.bounds, no_context))
