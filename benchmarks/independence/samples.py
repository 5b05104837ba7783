"""PyTorch's own samples of its operators (OpInfo) as cases.

Contract
- `operator_names` lists all operators that take float32 on a CPU, in a fixed order.
- `cases_of` gives the samples of one operator whose input has at least four rows, the same ones each time.
- Each sample becomes a function whose arguments are the sample's tensors. All else is a constant of the function.
- OpInfo needs the package `expecttest`.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.independence.judge import Case

LEAST_ROWS = 4
# What these return is whatever was in memory.
UNDEFINED = frozenset(
    {
        "empty",
        "empty_like",
        "empty_permuted",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "resize_",
        "resize_as_",
    }
)


@functools.cache
def operators() -> dict[str, Any]:
    """Return the OpInfo of each operator by its name, variants as `name.variant`."""
    from torch.testing._internal.common_methods_invocations import op_db

    return {_name(op): op for op in op_db if torch.float32 in op.dtypes}


def _name(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


def cases_of(name: str, most: int = 0) -> list[Case]:
    """Return the samples of an operator.

    Args:
        name: A key of `operators()`.
        most: The most samples to return, spread evenly over all; 0 for all.
    """
    op = operators()[name]
    torch.manual_seed(0)
    random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            samples = list(op.sample_inputs("cpu", torch.float32, requires_grad=op.supports_autograd))
        except Exception:  # the samples of some operators need a library or a device that is not here
            return []
    samples = [s for s in samples if _rows(s.input) >= LEAST_ROWS]
    if most and len(samples) > most:
        samples = [samples[i * len(samples) // most] for i in range(most)]
    return [_case(op, sample) for sample in samples]


def _rows(value: Any) -> int:
    if isinstance(value, Sequence) and value and not isinstance(value, str):
        value = value[0]
    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else 0


def _case(op: Any, sample: Any) -> Case:
    writer = _Writer()
    words = [writer.write(a) for a in (sample.input, *sample.args)]
    words += [f"{key}={writer.write(value)}" for key, value in sample.kwargs.items()]
    names = ", ".join(f"t{i}" for i in range(len(writer.tensors)))
    source = f"def sample({names}):\n    return operator({', '.join(words)})\n"
    space = {"operator": op.op, **writer.constants}
    exec(compile(source, "operator_sample.py", "exec"), space)
    model: Callable[..., Any] = space["sample"]
    return Case(model, [tuple(writer.tensors)])


class _Writer:
    """Writes the arguments of a sample as an expression, so that Dynamo traces one plain call."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.constants: dict[str, Any] = {}

    def write(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
            return f"t{len(self.tensors) - 1}"
        if type(value) in (list, tuple):
            inner = "".join(self.write(v) + ", " for v in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name
