"""`SplitForward` replaces a model's forward: it runs the plan where the step in flight is split, else the whole batch.

Contract
- `SplitForward` is the only place that chooses between the two. Outside a step it runs the whole batch.
- A subclass says how to run either: `GraphForward` for a captured graph, `EagerForward` for a model without a graph.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from dynaflow_serving.capture.eager import Arguments, Diverged, EagerCapture
from dynaflow_serving.capture.eager.gradients import Submit
from dynaflow_serving.capture.eager.in_turn import InTurn
from dynaflow_serving.capture.program import Enter
from dynaflow_serving.core.plan import COMPUTE_STREAM, Plan
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.planning.mirror import backward_stream
from dynaflow_serving.session.plan_cache import PlanCache, no_context
from dynaflow_serving.session.session import LiveStep, Session
from dynaflow_serving.strategy.rules import Rule
from dynaflow_serving.strategy.streams import CHUNKS


class Contexts(NamedTuple):
    """An engine has one context per micro-batch of a split step.

    Attributes:
        enter: This switches to the context of the i-th micro-batch.
        arguments: This returns the i-th micro-batch's arguments, where they hold more than tensors to cut.
    """

    enter: Enter
    arguments: Arguments | None = None


# It is called with the forward's arguments, enters the contexts of the split step in flight, and leaves them again.
Entering = Callable[..., AbstractContextManager[Contexts]]


def without_context(*args: Any, **kwargs: Any) -> AbstractContextManager[Contexts]:
    """This is the `Entering` of programs whose operators read no context."""
    return nullcontext(Contexts(no_context))


class SplitForward(abc.ABC):
    """This callable takes the place of a model's forward."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = self.session.in_flight
        if step is None or not step.micro_batches:
            return self.run_whole(args, kwargs)
        return self.run_split(step, args, kwargs)

    @abc.abstractmethod
    def run_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the whole batch at once."""

    @abc.abstractmethod
    def run_split(self, step: LiveStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the whole batch under the plan of `step`."""


class GraphForward(SplitForward):
    """This is the forward of one captured graph."""

    def __init__(
        self,
        session: Session,
        plan_cache: PlanCache,
        whole: Callable[..., Any] | None = None,
        entering: Entering = without_context,
    ) -> None:
        """Make the forward of the graph in `plan_cache`.

        Args:
            session: Its step in flight decides what runs.
            plan_cache: The plans of the graph.
            whole: The engine's own forward for un-split steps. Without one they run the un-split plan.
            entering: This enters the engine's contexts of a split step.
        """
        super().__init__(session)
        self.plan_cache, self._stock, self._entering = plan_cache, whole, entering
        self._count = plan_cache.captured.token_counter()

    def run_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._stock is not None:
            return self._stock(*args)
        step = self.session.in_flight
        if step is not None and step.comparing:  # the reference has none of the strategy's kernels
            return self.plan_cache.run_plain(args, self._count(args))
        return self.plan_cache.run_whole(args, self._count(args))

    def run_split(self, step: LiveStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan = step.plan(self.plan_cache)
        with self._entering(*args) as contexts:
            return self.plan_cache.captured.rebuild(plan.run(args, step.split.bounds, contexts.enter))


class EagerForward(SplitForward):
    """This is the forward of a model without a graph (`capture: eager`).

    Contract
    - Un-split calls run the model's own forward, unless it trains under a strategy that never splits. Until there is a
      Program, they are recorded inside `recording` and in steps that the session counts. Other dummy runs (memory
      profiling, warm-up, graph capture) are not recorded.
    - If a micro-batch takes another path than the recorded one, the step runs again without a plan, one micro-batch
      after the other. Each of them is a batch that the engine could have made.
    - Such a step is counted as un-split, and the model is recorded anew. Where ranks vote, it is an error instead: the
      ranks that follow their plan would meet other collectives.
    """

    def __init__(
        self,
        session: Session,
        forward: Callable[..., Any],
        module: torch.nn.Module,
        rules: Iterable[Rule],
        states: Mapping[str, str],
        entering: Entering = without_context,
        training: bool = False,
        token_dim: int = 0,
    ) -> None:
        """Prepare to record `forward`.

        Args:
            session: Its step in flight decides what runs.
            forward: The model's own forward.
            module: Rules for modules look here.
            rules: The integration's rules for attention and collectives. The strategy's own rules come first.
            states: The engine state that the operators of a rule read and write, by the rule's name.
            entering: This enters the engine's contexts of a split step.
            training: Whether gradients go through split steps.
            token_dim: The token axis of the first tensor argument.

        Raises:
            AnnotationError: A rule matches nothing.
        """
        super().__init__(session)
        self._entering = entering
        self.eager = EagerCapture(forward, module, (*session.selector.annotations, *rules), states, training)
        self._token_dim = token_dim
        self._apart: dict[str, Sequence[Mapping[int, Submit]]] = {}  # by the digest of a plan
        session.eager = self.eager
        self.eager.attach()
        self._recording = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the integration's two dummy runs in this block, which have different numbers of tokens.

        Raises:
            InactiveError: The runs do not give a Program.
        """
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
        if not self.session.plan_caches:
            raise InactiveError(f"DynaFlow cannot schedule this model: {self.eager.waiting}")

    def record_training(self, calls: Iterable[Mapping[str, Any]], groups: Iterable[Any]) -> None:
        """Record two calls, and compare the plans of the ranks that communicate in them.

        Args:
            calls: The keyword arguments of each, with different numbers of tokens.
            groups: The process groups of these ranks; [None] for one rank.

        Raises:
            InactiveError: They do not give a Program, it cannot be split, or the ranks have different plans.
        """
        with self.recording():
            for given in calls:
                self(**given)
        for group in groups:
            self.session.confirm(group)
        self.session.agree_over(self.session.ranks)

    def forget(self, reason: str) -> None:
        """Record the model anew from now on, because of `reason`; its plans are of no use any more."""
        self.eager.forget(reason)
        self.session.plan_caches.clear()

    def run_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.session.in_flight is None and not self._recording:
            return self.eager.forward(*args, **kwargs)
        step = self.session.in_flight
        if self.eager.training and step is not None and step.planned:  # un-split, in the strategy's order
            return self.run_split(step, args, kwargs)
        result = self.eager.record(self.count_tokens(args, kwargs), args, kwargs)
        if self.eager.captured is not None and not self.session.plan_caches:
            executor = self.session.add(self.eager.captured).executor
            self.eager.captured.in_turn = InTurn(self.eager.borders.by_target, executor.submit_to(CHUNKS))
        return result

    def run_split(self, step: LiveStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan_cache, bounds = self.session.plan_caches[0], step.split.bounds
        plan = step.plan(plan_cache)
        apart: Sequence[Mapping[int, Submit]] = ()
        if self.eager.training and torch.is_grad_enabled():
            apart = self._calls_apart(plan_cache, plan.plan)
        with self._entering(*args, **kwargs) as contexts:
            try:
                return self.eager.run(plan.run, bounds, args, kwargs, *contexts, apart=apart)
            except Diverged as error:
                if self.session.vote is not None:
                    raise InactiveError(
                        "a step left its plan, and other data-parallel ranks wait for its collectives; remove the "
                        f"dynaflow option for this model: {error}"
                    ) from error
                step.withdraw(str(error))
                self.session.plan_caches.clear()  # `eager` records the model anew
                self.session.logger.warning("DynaFlow: a step left its plan, the model is recorded anew: %s", error)
                return self.eager.run_apart(bounds, args, kwargs, *contexts)

    def _calls_apart(self, plan_cache: PlanCache, plan: Plan) -> Sequence[Mapping[int, Submit]]:
        if plan.digest not in self._apart:
            self._apart[plan.digest] = self.eager.calls_apart(plan, functools.partial(submit_gradient, plan_cache))
        return self._apart[plan.digest]

    def count_tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return the number of tokens by the first tensor argument."""
        return next(int(t.shape[self._token_dim]) for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))


def submit_gradient(plan_cache: PlanCache, operator: str, stream: str) -> Submit | None:
    """Return what submits the gradient of an operator, run by `stream`; None where the compute stream runs it."""
    backward = backward_stream(plan_cache.captured.program, [operator], stream)
    return None if backward == COMPUTE_STREAM else plan_cache.executor.submit_to(backward)
