"""These are vLLM's workers with DynaFlow; `engine_args` names one of them as `worker_cls`.

Contract
- The model runner that vLLM selected, V1 or V2, becomes a DynaFlow runner before the model is loaded.
- A model without a graph is put under DynaFlow when it is loaded (`eager`).
- After warm-up the worker refuses to serve if DynaFlow has no program of the model, or if the ranks would run
  different plans. Then the policy decides, if the strategy is `auto`, and splits are compared (`trials`).
- Ranks of tensor parallelism have one batch. Data-parallel ranks that share experts have one each, and vote.
- `dynaflow_report` and `dynaflow_reset` are for `collective_rpc`.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from dynaflow_serving.integrations.vllm import eager, experts, mode3
from dynaflow_serving.integrations.vllm.runner_v1 import V1RunnerMixin
from dynaflow_serving.integrations.vllm.runner_v2 import V2RunnerMixin
from dynaflow_serving.integrations.vllm.state import WorkerState
from dynaflow_serving.integrations.vllm.trials import WorkerTrials, facts
from dynaflow_serving.policy.start import start_policy


class DynaflowWorkerMixin:
    """This goes over one of vLLM's workers."""

    dynaflow: WorkerState

    def init_device(self, *args: Any, **kwargs: Any) -> None:
        super().init_device(*args, **kwargs)  # type: ignore[misc]
        parallel = self.vllm_config.parallel_config  # type: ignore[attr-defined]
        rank = parallel.data_parallel_index * parallel.world_size + self.rank  # type: ignore[attr-defined]
        self.dynaflow = WorkerState(self.vllm_config, current_platform.device_type, rank)  # type: ignore[attr-defined]
        mode3.attach()
        runner = self.model_runner  # type: ignore[attr-defined]
        mixin = V2RunnerMixin if self.use_v2_model_runner else V1RunnerMixin  # type: ignore[attr-defined]
        runner.dynaflow = self.dynaflow
        # The mixin overrides methods that the runner calls on itself, and a wrapper would not see these calls. vLLM has
        # made the runner by now, so its class can only be extended afterwards. The mixin has no `__init__` to miss.
        runner.__class__ = type(f"Dynaflow{type(runner).__name__}", (mixin, type(runner)), {})

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_model(*args, **kwargs)  # type: ignore[misc]
        self.eager_forward = eager.attach(self.dynaflow, self.model_runner)  # type: ignore[attr-defined]
        return result

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        from vllm.distributed.parallel_state import get_tp_group

        if self.eager_forward is not None:
            eager.record(self.eager_forward, self.model_runner)  # type: ignore[attr-defined]
        result = super().compile_or_warm_up_model(*args, **kwargs)  # type: ignore[misc]
        session = self.dynaflow.session
        if experts.exchanges_tokens(self.vllm_config):  # type: ignore[attr-defined]
            experts.confirm(session)
        else:
            session.confirm(get_tp_group().cpu_group)
        self.dynaflow.serving = True
        start_policy(session, WorkerTrials(self), lambda: facts(self, session))
        self.dynaflow.write_metrics()
        return result

    def dynaflow_report(self) -> dict[str, Any]:
        """Return the worker's report as plain data."""
        return self.dynaflow.report().model_dump(mode="json")

    def dynaflow_reset(self) -> None:
        """Count steps from zero."""
        self.dynaflow.session.reset()

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        if hasattr(self, "dynaflow"):
            self.dynaflow.session.close()
        super().shutdown(*args, **kwargs)  # type: ignore[misc]


class GPUDynaflowWorker(DynaflowWorkerMixin, Worker):
    """This is vLLM's GPU worker with DynaFlow."""


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker

    class CPUDynaflowWorker(DynaflowWorkerMixin, CPUWorker):
        """This is vLLM's CPU worker with DynaFlow."""
