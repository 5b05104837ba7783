"""The computation: the operators of one captured graph, and the values between them.

Contract
- These classes are data only: no torch, no engine, no behaviour beyond validation and look-up.
- `Program.to_text` and `parse.parse_program` round-trip exactly.
- Two ranks have the same Program if and only if its `digest` is the same.
"""

from __future__ import annotations

import abc
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple


class Textual(abc.ABC):
    """Data with a text form, and a digest of that which ranks can compare."""

    @abc.abstractmethod
    def lines(self) -> Iterator[str]:
        """The text form, line by line."""

    def to_text(self) -> str:
        return "\n".join(self.lines()) + "\n"

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.to_text().encode()).hexdigest()[:16]


class Resource(StrEnum):
    """What bounds the time of an operator (paper, section 3)."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"


class Gradient(NamedTuple):
    """What bounds the gradient of an operator, and the group of its collective.

    A collective may be an identity forward (Megatron's `copy_to_tensor_model_parallel_region`), or backward.
    """

    resource: Resource
    group: str = ""

    def __str__(self) -> str:
        """Such as `network:tp`."""
        return f"{self.resource.value}:{self.group}"


def communicates(resource: Resource, gradient: Gradient | None) -> bool:
    """Return whether an operator is bound by the network, forward or backward."""
    return Resource.NETWORK in (resource, gradient and gradient.resource)


class Scope(StrEnum):
    """How a value relates to the batch."""

    BATCH = "batch"  # one axis is the token axis: the value can be cut into views and merged
    TOKENS = "tokens"  # an integer: the number of tokens, or rows, of the (micro-)batch
    SHARED = "shared"  # the same for all micro-batches: weights, constants
    PARTIAL = "partial"  # a sum or mean over the tokens (a loss, a weight gradient): merged by addition, never cut
    LOCAL = "local"  # one per micro-batch, neither cut nor merged (a size)


PER_MICRO_BATCH = frozenset({Scope.BATCH, Scope.PARTIAL, Scope.LOCAL})
"""The scopes whose values every micro-batch has in memory of its own."""


@dataclass(frozen=True, slots=True)
class Value:
    name: str
    scope: Scope
    axis: int | None = None
    """The token axis, for BATCH only."""
    rows: int = 1
    """How many adjacent rows one token has, for BATCH and TOKENS."""
    storage: str = ""
    """Values with one storage alias one another. An empty one becomes the value's name: it has no alias."""
    mean: bool = False
    """For PARTIAL only: a mean over the tokens, merged with the token counts as weights, instead of a sum."""

    def __post_init__(self) -> None:
        if self.mean and self.scope is not Scope.PARTIAL:
            raise ValueError(f"value {self.name}: a mean over the tokens has scope partial, not {self.scope}")
        if (self.scope is Scope.BATCH) != (self.axis is not None):
            raise ValueError(f"value {self.name}: axis={self.axis} does not fit scope {self.scope}")
        object.__setattr__(self, "storage", self.storage or self.name)


@dataclass(frozen=True, slots=True)
class Operator:
    """A named, schedulable piece of the model, such as `layers.3.attention`."""

    name: str
    resource: Resource
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tags: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    """Storages and engine states that it writes in place."""
    reads: tuple[str, ...] = ()
    """Engine states that it reads and that are not among the inputs (a KV cache)."""
    group: str = ""
    """Collectives of one group keep one order on all ranks."""
    context: bool = False
    """Whether it reads the engine's per-micro-batch context: it runs for one micro-batch at a time."""
    into: tuple[str, ...] = ()
    """Outputs that it can write straight into a given buffer."""
    gradient: Gradient | None = None
    """What bounds its gradient, where that is something else."""


@dataclass(frozen=True)
class Program(Textual):
    """The operators of one captured graph, in a valid order, with their dataflow."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: dict[str, Value]
    operators: tuple[Operator, ...]
    unsplittable: str = ""
    """Why this graph cannot be cut into micro-batches; "" if it can."""

    @cached_property
    def by_name(self) -> dict[str, Operator]:
        return {o.name: o for o in self.operators}

    @cached_property
    def written_storages(self) -> frozenset[str]:
        """The storages and engine states that an operator writes in place."""
        return frozenset(s for o in self.operators for s in o.writes)

    @cached_property
    def own_storages(self) -> frozenset[str]:
        """The storages that one value has for itself, and that nothing writes in place."""
        values = Counter(v.storage for v in self.values.values())
        return frozenset(s for s, n in values.items() if n == 1) - self.written_storages

    @cached_property
    def unmergeable(self) -> str:
        """Why the PARTIAL values of several micro-batches cannot be merged by addition; "" if they can."""
        partial = [v for v in self.values.values() if v.scope is Scope.PARTIAL]
        for value in partial:
            if value.name in self.inputs:
                return f"input {value.name} is a sum over all tokens, of which no micro-batch has a share"
            owner = self.values.get(value.storage)
            if value.storage in self.written_storages and (owner is None or owner.scope is Scope.SHARED):
                return f"{value.name} is a sum in {value.storage}, which all micro-batches share and write in place"
        return ""

    def lines(self) -> Iterator[str]:
        yield "program" + (f" unsplittable: {self.unsplittable}" if self.unsplittable else "")
        yield from map(_value_line, self.values.values())
        yield f"inputs {' '.join(self.inputs)}"
        for operator in self.operators:
            yield from _operator_lines(operator)
        yield f"outputs {' '.join(self.outputs)}"


def _value_line(value: Value) -> str:
    """Such as `value hidden batch:0x2 storage=x` and `value loss partial:mean`."""
    words = ["value", value.name, value.scope.value]
    rows = f"x{value.rows}" if value.rows > 1 else ""
    if value.axis is not None:
        words[-1] += f":{value.axis}{rows}"
    elif rows:
        words[-1] += f":{rows}"
    elif value.mean:
        words[-1] += ":mean"
    if value.storage != value.name:
        words.append(f"storage={value.storage}")
    return " ".join(words)


def _operator_lines(operator: Operator) -> Iterator[str]:
    words = ["op", operator.name, operator.resource.value]
    if operator.group:
        words.append(f"group={operator.group}")
    if operator.context:
        words.append("context")
    if operator.gradient:
        words.append(f"gradient={operator.gradient}")
    yield " ".join(words)
    for field in ("tags", "inputs", "outputs", "writes", "reads", "into"):
        if names := getattr(operator, field):
            yield f"  {field} {' '.join(names)}"
