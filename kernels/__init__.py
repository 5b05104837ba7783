"""Replacement kernels: callables that stand in for one or more adjacent operators.

Contract
- A kernel is registered under a name, so that a Plan's text can name it; `s.execute(ops, replace=NAME)`.
- It is called with the group's external inputs in order of first use and returns the external outputs
  in order of production (one bare, several as a tuple). Sizes among the inputs, which a captured graph passes
  beside its tensors, are left out: a kernel reads them off its tensors.
- Every kernel has a plain PyTorch reference with the same signature that tests compare it with.
- What no operator passes (an epsilon, the name of a process group) is a keyword, fixed where it is asked for:
  `s.execute(ops, replace=get_kernel("add_rms_norm", eps=1e-5))`.
- A `Composed` kernel is made for each of its steps when a Plan is bound, of the replaced operators' own callables.
- The modules of the shipped kernels, and triton with them, are imported when one is asked for.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar

from dynaflow_serving.errors import ScheduleError, unknown_name

if TYPE_CHECKING:
    from dynaflow_serving.capture.program import CapturedProgram
    from dynaflow_serving.core.plan import Action, Plan

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Kernel:
    name: str
    function: Callable[..., Any]  # as a Plan calls it
    reference: Callable[..., Any]


class Composed(abc.ABC):
    """What stands in for operators in another way than one after the other, but computes with their own callables.
    `__name__` is what a Plan's text calls it."""

    __name__: str

    @abc.abstractmethod
    def __call__(self, capture: CapturedProgram, plan: Plan, step: Action) -> Callable[..., Any]:
        """The kernel of `step`, a REPLACE of `plan`."""


KERNELS: dict[str, Kernel] = {}
SHIPPED: dict[str, str] = {  # kernel -> its module in this package
    "add_rms_norm": "rms_norm",
    "silu_mul": "silu_mul",
    "moe_permute": "moe_permute",
    "moe_unpermute": "moe_permute",
    "reduce_add_rms_norm": "reduce_rms_norm",
    "all_reduce_add_rms_norm": "all_reduce_rms_norm",
}


def register_kernel(name: str, reference: Callable[..., Any]) -> Callable[[F], F]:
    """Decorator. Raises `ScheduleError` if another kernel has the name."""

    def register(fn: F) -> F:
        @wraps(fn)
        def function(*inputs: Any, **constants: Any) -> Any:
            return fn(*(i for i in inputs if not isinstance(i, int)), **constants)

        function.__name__ = name
        if name in KERNELS:
            raise ScheduleError(f"a kernel called {name!r} is registered already")
        KERNELS[name] = Kernel(name, function, reference)
        return fn

    return register


def kernel_names() -> list[str]:
    return sorted({*KERNELS, *SHIPPED})


def get_kernel(name: str, **constants: Any) -> Callable[..., Any]:
    """The kernel registered as `name`, with keyword arguments fixed: `add_rms_norm[eps=1e-05]` in a Plan's text.

    Raises `ScheduleError` for an unknown name, where triton is missing, and for a constant whose text has a space.
    """
    if name not in KERNELS and name in SHIPPED:
        try:
            importlib.import_module(f"{__name__}.{SHIPPED[name]}")
        except ModuleNotFoundError as e:
            if e.name is None or e.name.partition(".")[0] != "triton":
                raise
            raise ScheduleError(
                f"kernel {name!r} needs triton, which is not installed: pip install 'dynaflow-serving[kernels]' "
                "(Linux), or use a strategy without replace="
            ) from None
    if name not in KERNELS:
        raise ScheduleError(unknown_name("kernel", name, kernel_names()))
    function = KERNELS[name].function
    return _bound(name, function, tuple(sorted(constants.items()))) if constants else function


@cache  # one object for one name: a recording refuses two kernels that are called alike
def _bound(name: str, function: Callable[..., Any], constants: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    text = f"{name}[{','.join(f'{k}={v!r}' for k, v in constants)}]"
    if text.split() != [text]:
        raise ScheduleError(f"a kernel's name must be one word, not {text!r}: fix plain values (a group by its name)")
    bound = partial(function, **dict(constants))
    bound.__name__ = text  # type: ignore[attr-defined]
    return bound


def kernels_of(plan: Plan, given: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Every kernel that `plan` names: one of `given`, else the registered one. Raises `ScheduleError`."""
    names = dict.fromkeys(action.kernel for action in plan.actions if action.kernel)
    return {name: given[name] if name in given else get_kernel(name) for name in names}
