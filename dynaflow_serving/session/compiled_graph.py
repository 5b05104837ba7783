"""`CompiledGraph` is the forward of one graph in PyTorch and Transformers, where no engine begins the steps.

Contract
- Each call is a step, unless the caller has begun one: then a whole forward of several graphs is one step.
- Before the first call, the ranks of each process group of the graph compare plans.
- The first calls under a plan also run whole, and are compared (`graph_check`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dynaflow_serving.capture.fx.views import ViewResults
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.errors import DynaflowError
from dynaflow_serving.session.agreement import agree
from dynaflow_serving.session.forward import SplitForward
from dynaflow_serving.session.graph_check import run_checked
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.session.session import LiveStep, Session


class CompiledGraph(SplitForward):
    """This callable runs one graph that Dynamo has captured."""

    def __init__(
        self,
        session: Session,
        plan_cache: PlanCache,
        groups: list[Any],
        whole: Callable[..., Any] | None,
        views: ViewResults | None,
        width: Callable[[], int],
    ) -> None:
        """Prepare the graph's first call.

        Args:
            session: Its step in flight decides what runs.
            plan_cache: The plans of the graph.
            groups: The process groups whose ranks have to compare plans before the first call.
            whole: The graph's own code, for un-split steps; None if plans run these, too.
            views: The results that are views, which no plan makes; None if there are none.
            width: This returns the positions per row of the batch, which may be others in each call.
        """
        super().__init__(session)
        self.plan_cache, self._groups = plan_cache, groups
        self._whole, self._views, self._width = whole, views, width
        self._unagreed = list(groups)
        self._count = plan_cache.captured.token_counter()

    def __call__(self, *args: Any) -> Any:
        while self._unagreed:
            agree([self.plan_cache.texts()], self._unagreed[0])
            del self._unagreed[0]
        if self.session.in_flight is not None:  # the caller that began the step ends it, too
            return super().__call__(*args)
        batch = Batch((1,) * self._count(args), width=self._width())
        with self.session.step(batch, [self.plan_cache]) as step:
            try:
                return super().__call__(*args)
            except DynaflowError as error:  # there is no plan: nothing has run
                step.withdraw(str(error))
                raise

    def run_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._whole is not None:
            return self._whole(*args)
        step = self.session.in_flight
        assert step is not None
        return self._run(step, step.split, args)

    def run_split(self, step: LiveStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._run(step, self.plan_cache.allowed_split(step.batch, step.split), args)

    def _run(self, step: LiveStep, split: Split, args: tuple[Any, ...]) -> Any:
        results = self._run_plan(step, split, args)
        return results if self._views is None else self._views.put(args, results)

    def _run_plan(self, step: LiveStep, split: Split, args: tuple[Any, ...]) -> Any:
        zero_copy = not torch.is_grad_enabled()  # autograd has no `out=`
        signature, check = split.signature, self.session.check
        planned = signature.micro_batches > 1 or self.plan_cache.orders_unsplit(signature.candidate)
        if check is not None and planned and check.wants(step, [self.plan_cache], signature):
            return run_checked(step, check, self.plan_cache, split, args, zero_copy, self._groups)
        return self.plan_cache.run(args, split, zero_copy=zero_copy, traced=step.to_trace)
