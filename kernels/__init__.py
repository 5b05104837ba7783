"""Replacement kernels: callables that stand in for one or more adjacent operators.

Contract
- A kernel is registered under a name, so that a Plan's text can name it; `s.execute(ops, replace=NAME)`.
- It is called with the group's external inputs and returns its external outputs (one bare, several as a tuple), in
  the order of `core.order.external_ports`. Sizes among the inputs, which a captured graph passes beside its tensors,
  are left out: a kernel reads them off its tensors.
- Every kernel has a plain PyTorch reference with the same signature that tests compare it with.
- A value that no operator passes (an epsilon) is a keyword, fixed where the kernel is asked for:
  `s.execute(ops, replace=get_kernel("add_rms_norm", eps=1e-5))`.
- A `Composed` kernel is made for each of its actions when a Plan is bound. It may look at the replaced operators:
  `Fused` reads arguments and constants off their graphs, `ShardTokens` calls them on a part of the tokens.
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
    """A kernel that depends on the operators it replaces. A Plan's text calls it by its `__name__`."""

    __name__: str

    @abc.abstractmethod
    def __call__(self, capture: CapturedProgram, plan: Plan, action: Action) -> Callable[..., Any]:
        """Make the kernel of `action`, a REPLACE of `plan`."""


KERNELS: dict[str, Kernel] = {}
SHIPPED: dict[str, str] = {  # kernel -> its module in this package
    "add_rms_norm": "rms_norm",
    "silu_mul": "silu_mul",
}


def register_kernel(name: str, reference: Callable[..., Any]) -> Callable[[F], F]:
    """Register the decorated kernel under `name`. Raises `ScheduleError` if another kernel has the name."""

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
    """Find the kernel that is registered as `name`, and fix keyword arguments of it.

    Args:
        constants: A Plan's text shows them: `add_rms_norm[eps=1e-05]`.

    Raises:
        ScheduleError: The name is unknown, triton is missing, or the text of a constant has a space.
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


def kernels_of(plan: Plan, given: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Find the kernels that `plan` names.

    Args:
        plan: the plan.
        given: callables that the strategy gave itself (`Schedule.kernels`); every other name is a registered one.

    Raises:
        ScheduleError: no kernel has the name, or it needs triton, which is missing.
    """
    names = dict.fromkeys(action.kernel for action in plan.actions if action.kernel)
    return {name: given[name] if name in given else get_kernel(name) for name in names}


@cache  # one object for one name: a recording refuses two kernels that are called alike
def _bound(name: str, function: Callable[..., Any], constants: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    text = f"{name}[{','.join(f'{k}={v!r}' for k, v in constants)}]"
    if text.split() != [text]:
        raise ScheduleError(f"a kernel's name must be one word, not {text!r}: fix plain values (a group by its name)")
    bound = partial(function, **dict(constants))
    bound.__name__ = text  # type: ignore[attr-defined]
    return bound
