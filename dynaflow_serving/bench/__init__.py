"""Benchmarks of an engine against itself: stock, and under DynaFlow.

The flow, left to right: `settings` (what to run) -> `compare` (who runs when) -> `process` (one child process
per engine) -> `child` -> a `Driver` (the engine's own API) -> `result` (figures, verdict) -> `report` (table).

`DRIVERS` names the engines that can be benchmarked; each value is `module:class` of a `drivers.Driver`, imported
in the child only.
"""

from __future__ import annotations

from dynaflow_serving.errors import ConfigError, unknown_name

DRIVERS: dict[str, str] = {
    "vllm": "dynaflow_serving.bench.vllm_driver:VLLMDriver",
    "sglang": "dynaflow_serving.bench.sglang_driver:SGLangDriver",
}


def driver_path(engine: str) -> str:
    """`module:class` of the engine's driver. Raises `ConfigError` that lists the engines."""
    if engine not in DRIVERS:
        raise ConfigError(unknown_name("engine", engine, DRIVERS))
    return DRIVERS[engine]
