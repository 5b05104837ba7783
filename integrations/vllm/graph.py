"""What vLLM calls in place of its compiled graph, in both modes.

Contract
- A split step runs its plan, each micro-batch under the forward context that the session has for it.
- Any other call goes to `whole`: vLLM's own stitching in mode 3; in mode 2 its un-compiled graph, or the un-split plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dynaflow_serving.core.batch import Split
from dynaflow_serving.integrations.vllm.session import VLLMSession
from dynaflow_serving.session.plan_cache import PlanCache


class MicroBatchedGraph:
    def __init__(self, session: VLLMSession, plan_cache: PlanCache, whole: Callable[..., Any] | None = None) -> None:
        self.session, self.plan_cache = session, plan_cache
        self._whole = whole or self._run_whole
        self._count = plan_cache.captured.token_counter()

    def __call__(self, *args: Any) -> Any:
        split = self.session.split
        return self._run_split(args, split) if split and self.session.micro_batches else self._whole(*args)

    def _run_whole(self, *args: Any) -> Any:
        return self.plan_cache.run_whole(args, self._count(args))

    def _run_split(self, args: Sequence[Any], split: Split) -> Any:
        plan = self.session.plan(self.plan_cache)
        with self.session.entering() as enter:
            return self.plan_cache.captured.rebuild(plan(args, split.bounds, enter))
