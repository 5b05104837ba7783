"""What the tests of benchmarks/gpu share: a timer whose times are made up, and limits of a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.gpu.limits import Limits
from dynaflow_serving.config import ExecutorOptions
from dynaflow_serving.executor import Executor, SequentialExecutor

LIMITS = Limits(bytes_per_s=1e12, flops_per_s=1e14)


class FakeTimer:
    """Calls cost what `cost` says, on a clock of its own; every measurement is noted."""

    def __init__(self, cost: Callable[[Any], float] = lambda call: 1.0) -> None:
        self.cost, self.now, self.log = cost, 0.0, []

    def milliseconds(self, call: Callable[[], Any], calls: int) -> float:
        call()
        ms = self.cost(call)
        self.now += ms * calls / 1e3
        self.log.append((call, calls))
        return ms

    def clock(self) -> float:
        return self.now


def named(name: str) -> Callable[[], str]:
    return lambda: name


def sequential(options: ExecutorOptions) -> Executor:
    """In issue order on one thread, whatever is asked of the streams."""
    return SequentialExecutor()
