"""Executors by name: `sequential` (debug), `cpu` (worker threads), `cuda` (streams)."""

from __future__ import annotations

from dynaflow_serving.config import ExecutorOptions, StreamOptions
from dynaflow_serving.errors import ConfigError, unknown_name
from dynaflow_serving.executor.base import Executor
from dynaflow_serving.executor.cpu import CPUExecutor
from dynaflow_serving.executor.cuda import CUDAExecutor
from dynaflow_serving.executor.sequential import SequentialExecutor

EXECUTORS: dict[str, type[Executor]] = {e.name: e for e in (SequentialExecutor, CPUExecutor, CUDAExecutor)}


def get_executor(name: str, device_type: str = "cpu", options: ExecutorOptions | None = None) -> Executor:
    """A new executor; `auto` picks the one for `device_type`. Raises `ConfigError`, and `InactiveError` where it cannot
    run here or cannot honour `options`."""
    if name == "auto":
        name = "cuda" if device_type == "cuda" else "cpu"
    if name not in EXECUTORS:
        raise ConfigError(unknown_name("executor", name, [*EXECUTORS, "auto"]))
    return EXECUTORS[name](options)


__all__ = ["EXECUTORS", "Executor", "ExecutorOptions", "StreamOptions", "get_executor"]
