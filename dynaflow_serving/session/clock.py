"""A clock tells how long a step took, on the device that ran it.

Contract
- `CPUClock` answers at once.
- `CUDAClock` records events on the current stream, and answers in the first `poll` after the device has passed them. It
  never waits.
- `BothPasses` adds the time of a backward pass, which autograd runs after the step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

Told = Callable[[float], None]


class Clock(Protocol):
    """A clock times steps, several of which may be under way on a device."""

    def start(self) -> Any:
        """Return the time of now, for `stop`."""

    def stop(self, started: Any, told: Told) -> None:
        """Call `told` with the seconds since `started`, now or in a later `poll`."""

    def poll(self) -> None:
        """Tell the times of the steps that have ended since the last call."""

    def synchronize(self) -> None:
        """Wait for the device."""


class CPUClock:
    """This clock is for steps that have ended when their call returns."""

    def start(self) -> float:
        return time.perf_counter()

    def stop(self, started: float, told: Told) -> None:
        told(time.perf_counter() - started)

    def poll(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class CUDAClock:
    """This clock measures with CUDA events on the current stream."""

    def __init__(self, cuda: Any) -> None:
        """Make a clock over `cuda`, which is `torch.cuda` or a stand-in."""
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


class BothPasses:
    """This is told the seconds of a forward pass, and tells those of the forward and the backward pass.

    The backward pass begins where the gradient of the output is there, and ends where that of the input is. Nothing is
    told of a step whose backward pass is never run.
    """

    def __init__(self, clock: Clock, given: torch.Tensor, output: torch.Tensor, told: Told) -> None:
        """Watch the backward pass from `output` to `given`; both require a gradient."""
        self._clock, self._told = clock, told
        self._forward = 0.0
        self._started: Any = None
        self._hooks = [
            output.register_hook(self._begin),  # type: ignore[no-untyped-call]
            given.register_hook(self._end),  # type: ignore[no-untyped-call]
        ]

    def forward_took(self, seconds: float) -> None:
        self._forward = seconds

    def _begin(self, _: torch.Tensor) -> None:
        self._started = self._clock.start()

    def _end(self, _: torch.Tensor) -> None:
        if self._started is not None:  # else another path than through the output has led here
            self._clock.stop(self._started, self._backward_took)
        for hook in self._hooks:  # the input may be one that lives on
            hook.remove()

    def _backward_took(self, seconds: float) -> None:
        self._told(self._forward + seconds)


def clock_of(device_type: str) -> Clock:
    """Return a new clock for devices of that type."""
    if device_type != "cuda":
        return CPUClock()
    return CUDAClock(torch.cuda)
