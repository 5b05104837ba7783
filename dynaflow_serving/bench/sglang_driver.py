"""SGLang through its own `Engine` class.

Contract
- The stock engine keeps SGLang's defaults, graphs included; DynaFlow is asked for through `json_model_override_args`
  only.
- On a CPU both engines get the same KV capacity and one thread per rank. Their schedulers sleep when idle, since one
  engine rests while the other is timed.
- A plugin that SGLang failed to load (it logs such errors and goes on) is an `InactiveError` here.
- `Engine.collective_rpc` brings back no results: reports come in a file per rank.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from dynaflow_serving.bench.drivers import EngineInfo
from dynaflow_serving.bench.environment import device_name, has_gpu
from dynaflow_serving.bench.settings import EngineSettings, Request
from dynaflow_serving.errors import InactiveError

CPU_TOKENS = 32768  # of the KV cache


class SGLangDriver:
    """An `EngineDriver` of SGLang."""

    def __init__(self) -> None:
        self.engine: Any = None

    def start(self, settings: EngineSettings) -> EngineInfo:
        import sglang

        self.engine = sglang.Engine(**engine_arguments(settings, gpu=has_gpu()))
        if settings.dynaflow is not None and not self.engine.get_server_info().get("dynaflow"):
            raise InactiveError(
                "DynaFlow was requested, but this SGLang runs without it. SGLang logs errors of plugins and goes on: "
                "look for 'plugin dynaflow' in the engine's log, and check that dynaflow-serving is installed in "
                "SGLang's environment and that SGLANG_PLUGINS does not leave it out."
            )
        vocabulary = self.engine.tokenizer_manager.model_config.vocab_size
        return EngineInfo(sglang.__version__, vocabulary, device_name())

    def generate(self, requests: list[Request]) -> list[list[int]]:
        outputs = self.engine.generate(
            input_ids=[r.prompt for r in requests],
            sampling_params=[{"temperature": 0, "max_new_tokens": r.output_len, "ignore_eos": True} for r in requests],
        )
        return [list(o["output_ids"]) for o in outputs]

    def report(self) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            self.engine.collective_rpc("dynaflow_report", folder=folder)
            return [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]

    def reset(self) -> None:
        self.engine.collective_rpc("dynaflow_reset")

    def close(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()
            self.engine = None


def engine_arguments(settings: EngineSettings, *, gpu: bool) -> dict[str, Any]:
    """Return the keyword arguments of `sglang.Engine`."""
    arguments: dict[str, Any] = {
        "model_path": settings.model,
        "dtype": settings.dtype,
        "tp_size": settings.tensor_parallel,
        "random_seed": settings.seed,
        "log_level": "info",
    }
    if settings.memory_share is not None:
        arguments["mem_fraction_static"] = settings.memory_share
    if not gpu:
        arguments |= {"device": "cpu", "max_total_tokens": CPU_TOKENS, "sleep_on_idle": True}
    if settings.max_model_len is not None:
        arguments["context_length"] = settings.max_model_len
    if settings.max_batched_tokens is not None:
        arguments["chunked_prefill_size"] = settings.max_batched_tokens
    if settings.dynaflow is not None:
        arguments["json_model_override_args"] = json.dumps({"dynaflow": settings.dynaflow})
    return arguments
