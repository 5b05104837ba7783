"""vLLM through its own `LLM` class.

Contract
- The stock engine keeps vLLM's defaults; DynaFlow is asked for through `additional_config` only.
- `compiled=False` means the same on both sides: Dynamo captures the graph, nothing compiles it, and there are no CUDA
  graphs.
- A plugin that vLLM failed to load (it logs such errors and goes on) is an `InactiveError` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynaflow_serving.bench.drivers import EngineInfo
from dynaflow_serving.bench.environment import device_name
from dynaflow_serving.bench.settings import EngineSettings, Request
from dynaflow_serving.errors import InactiveError


class VLLMDriver:
    """An `EngineDriver` of vLLM."""

    def __init__(self) -> None:
        self.llm: Any = None

    def start(self, settings: EngineSettings) -> EngineInfo:
        import vllm

        arguments = engine_arguments(settings)
        if settings.as_server:
            arguments |= server_limits(arguments)
        self.llm = vllm.LLM(**arguments)
        if settings.dynaflow is not None:
            self._assert_active()
        return EngineInfo(vllm.__version__, self.llm.llm_engine.model_config.get_vocab_size(), device_name())

    def generate(self, requests: list[Request]) -> list[list[int]]:
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": r.prompt} for r in requests],
            [SamplingParams(temperature=0, max_tokens=r.output_len, ignore_eos=True) for r in requests],
            use_tqdm=False,
        )
        return [list(o.outputs[0].token_ids) for o in outputs]

    def report(self) -> list[dict[str, Any]]:
        reports: list[dict[str, Any]] = self.llm.collective_rpc("dynaflow_report")
        return reports

    def reset(self) -> None:
        self.llm.collective_rpc("dynaflow_reset")

    def close(self) -> None:
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None

    def _assert_active(self) -> None:
        try:
            self.report()
        except Exception as e:
            raise InactiveError(
                f"DynaFlow was requested, but this vLLM runs without it ({type(e).__name__}: {e}). vLLM logs errors of "
                "plugins and goes on: look for 'Failed to load plugin dynaflow' in the engine's log, and check that "
                "dynaflow-serving is installed in vLLM's environment and that VLLM_PLUGINS does not leave it out."
            ) from None


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Return the keyword arguments of `vllm.LLM`."""
    arguments: dict[str, Any] = {
        "model": settings.model,
        "dtype": settings.dtype,
        "tensor_parallel_size": settings.tensor_parallel,
        "seed": settings.seed,
    }
    if settings.memory_share is not None:
        arguments["gpu_memory_utilization"] = settings.memory_share
    if settings.max_model_len is not None:
        arguments["max_model_len"] = settings.max_model_len
    if settings.max_batched_tokens is not None:
        arguments["max_num_batched_tokens"] = settings.max_batched_tokens
    if not settings.compiled:
        # mode 2: Dynamo once; its graph then runs as captured
        arguments["compilation_config"] = {"mode": 2, "backend": "eager", "cudagraph_mode": "NONE"}
    if settings.dynaflow is not None:
        arguments["additional_config"] = {"dynaflow": settings.dynaflow}
    return arguments


def server_limits(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Return the limits that `vllm serve` would set with `arguments`; vLLM's own defaults are higher for `LLM`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    stock = {name: value for name, value in arguments.items() if name != "additional_config"}
    config = EngineArgs(**stock).create_engine_config(UsageContext.OPENAI_API_SERVER).scheduler_config
    return {"max_num_batched_tokens": config.max_num_batched_tokens, "max_num_seqs": config.max_num_seqs}
