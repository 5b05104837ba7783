"""`WorkerState` is DynaFlow in the vLLM worker of this process.

Contract
- vLLM calls our compile backends by name, so they reach the state by `current()`. A new engine in the same process
  replaces it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from dynaflow_serving.capture.independence import row_wise
from dynaflow_serving.config import load
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations.base import KEY
from dynaflow_serving.integrations.vllm import metrics
from dynaflow_serving.integrations.vllm.contexts import ForwardContexts
from dynaflow_serving.integrations.vllm.engine_args import PIECE_COMPILER
from dynaflow_serving.integrations.vllm.operators import ROW_WISE
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.session.forward import GraphForward
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.session.report import WorkerReport
from dynaflow_serving.session.session import Session

_current: WorkerState | None = None


class WorkerState:
    """The state of a worker holds its session, and is shared by its runner and its compile backends."""

    def __init__(self, vllm_config: Any, device_type: str, rank: int) -> None:
        global _current
        self.vllm_config = vllm_config
        self.piece_compiler: str = vllm_config.additional_config.get(PIECE_COMPILER, "")
        self.serving = False  # set once warm-up is over and the ranks have compared their plans
        config = load(vllm_config.additional_config[KEY])
        mode = getattr(vllm_config.compilation_config.mode, "name", "")
        runner = "V2" if vllm_config.use_v2_model_runner else "V1"
        self.session = Session(
            build_selector(config),
            config,
            device_type,
            mode=f"{mode} ({self.piece_compiler or 'vLLM pieces'}), Model Runner {runner}",
            logger=logging.getLogger("vllm.dynaflow"),
            rank=rank,
        )
        row_wise(*ROW_WISE)
        self.contexts = ForwardContexts(self.session, vllm_config)
        self._metrics_file = metrics.writer(rank)
        if self._metrics_file is not None:
            self.session.observe_with(self._metrics_file)
        _current = self

    def forward(self, plan_cache: PlanCache, whole: Callable[..., Any] | None) -> GraphForward:
        """Return the forward that vLLM calls in place of its compiled graph.

        Args:
            plan_cache: The plans of the graph.
            whole: vLLM's own stitching or its un-compiled graph, for un-split steps; None if plans run these, too.
        """
        return GraphForward(self.session, plan_cache, whole, self.contexts.entering)

    def write_metrics(self) -> None:
        """Write the metrics for vLLM's endpoint, if this worker does so; they are at zero before the first step."""
        if self._metrics_file is not None:
            self._metrics_file.write()

    def report(self) -> WorkerReport:
        """Write the metrics, and return the session's report."""
        self.write_metrics()
        return self.session.report()


def current() -> WorkerState:
    """Return the state of this process' worker.

    Raises:
        InactiveError: There is none.
    """
    if _current is None:
        raise InactiveError("no DynaFlow worker in this process: the worker class was replaced by another plugin")
    return _current
