"""Replacement kernels: callables that stand in for one or more adjacent operators.

Contract
- A kernel is registered under a name, so that a Plan's text can name it; `s.execute(ops, replace=NAME)`.
- It is called with the group's external inputs in order of first use and returns the external outputs
  in order of production (one bare, several as a tuple).
- Every kernel has a plain PyTorch reference that tests compare it with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from dynaflow_serving.errors import ScheduleError, unknown_name

F = TypeVar("F", bound=Callable[..., Any])
KERNELS: dict[str, Callable[..., Any]] = {}


def register_kernel(name: str) -> Callable[[F], F]:
    """Decorator. Raises `ScheduleError` if another kernel has the name."""

    def register(fn: F) -> F:
        if KERNELS.setdefault(name, fn) is not fn:
            raise ScheduleError(f"a kernel called {name!r} is registered already")
        return fn

    return register


def get_kernel(name: str) -> Callable[..., Any]:
    if name not in KERNELS:
        raise ScheduleError(unknown_name("kernel", name, KERNELS))
    return KERNELS[name]
