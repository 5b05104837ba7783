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
    """A new executor.

    Args:
        name: one of `EXECUTORS`, or `auto` for the one that fits `device_type`.
        device_type: such as "cpu" or "cuda".
        options: the executor's part of the config.

    Raises:
        ConfigError: there is no such executor.
        InactiveError: it cannot run here, or cannot honour `options`.
    """
    if name == "auto":
        name = "cuda" if device_type == "cuda" else "cpu"
    if name not in EXECUTORS:
        raise ConfigError(unknown_name("executor", name, [*EXECUTORS, "auto"]))
    return EXECUTORS[name](options)


__all__ = ["EXECUTORS", "Executor", "ExecutorOptions", "StreamOptions", "get_executor"]
