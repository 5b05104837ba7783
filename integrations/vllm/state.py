"""What DynaFlow has in the vLLM worker of this process.

Contract
- `current()` is how vLLM's compile backends, which it calls by name, reach it. A new engine in the same process
  replaces it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from dynaflow_serving.config import load
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations.base import KEY
from dynaflow_serving.integrations.vllm import metrics
from dynaflow_serving.integrations.vllm.contexts import ForwardContexts
from dynaflow_serving.integrations.vllm.engine_args import PIECE_COMPILER
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.session.forward import GraphForward
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.session.report import WorkerReport
from dynaflow_serving.session.session import Session

_current: WorkerState | None = None


class WorkerState:
    """The session of one worker, and what its runner and its compile backends share."""

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
        self.contexts = ForwardContexts(self.session, vllm_config)
        self._metrics_file = metrics.writer(rank)
        if self._metrics_file is not None:
            self.session.observe_with(self._metrics_file)
        _current = self

    def forward(self, plan_cache: PlanCache, whole: Callable[..., Any] | None) -> GraphForward:
        """What vLLM calls in place of its compiled graph: `whole` is its own stitching, or its un-compiled graph."""
        return GraphForward(self.session, plan_cache, whole, self.contexts.entering)

    def report(self) -> WorkerReport:
        if self._metrics_file is not None:
            self._metrics_file.write()
        return self.session.report()


def current() -> WorkerState:
    if _current is None:
        raise InactiveError("no DynaFlow worker in this process: the worker class was replaced by another plugin")
    return _current
