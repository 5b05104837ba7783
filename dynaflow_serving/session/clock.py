"""How long a step took, on the device that ran it.

Contract
- `CPUClock` answers at once. `CUDAClock` records events on the current stream and answers when the device has passed
  them, at the next `poll`: it never waits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

Told = Callable[[float], None]


class Clock(Protocol):
    def start(self) -> Any: ...

    def stop(self, started: Any, told: Told) -> None:
        """Tell `told` the seconds since `started`, now or in a later `poll`."""

    def poll(self) -> None: ...

    def synchronize(self) -> None:
        """Wait for the device."""


class CPUClock:
    def start(self) -> float:
        return time.perf_counter()

    def stop(self, started: float, told: Told) -> None:
        told(time.perf_counter() - started)

    def poll(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class CUDAClock:
    """`cuda`: `torch.cuda`, or a stand-in."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._running: deque[tuple[Any, Any, Told]] = deque()

    def start(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, started: Any, told: Told) -> None:
        self._running.append((started, self.start(), told))

    def poll(self) -> None:
        while self._running and self._running[0][1].query():
            started, ended, told = self._running.popleft()
            told(started.elapsed_time(ended) / 1e3)

    def synchronize(self) -> None:
        self._cuda.synchronize()


def clock_of(device_type: str) -> Clock:
    if device_type != "cuda":
        return CPUClock()
    import torch

    return CUDAClock(torch.cuda)
