"""What is computed: the operators of one captured graph, and the values between them.

Contract
- Only data: no torch, no engine, no behaviour beyond validation and look-up.
- `Program.to_text` and `parse.parse_program` round-trip exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from dynaflow_serving.core.textual import Textual


class Resource(StrEnum):  # what an operator is bound by (paper, section 3)
    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"


class Scope(StrEnum):  # how a value relates to the batch
    BATCH = "batch"  # one axis is the token axis: can be cut into views and merged
    TOKENS = "tokens"  # an integer: the number of tokens, or rows, of the (micro-)batch
    SHARED = "shared"  # the same for all micro-batches: weights, constants
    LOCAL = "local"  # one per micro-batch, neither cut nor merged (a size, a sum over the batch)


@dataclass(frozen=True, slots=True)
class Value:
    name: str
    scope: Scope
    axis: int | None = None  # the token axis, for BATCH only
    rows: int = 1  # how many adjacent rows one token has, for BATCH and TOKENS
    storage: str = ""  # values with one storage alias one another; "" means its own

    def __post_init__(self) -> None:
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
    writes: tuple[str, ...] = ()  # storages and engine states written in place
    reads: tuple[str, ...] = ()  # engine states read that are not among the inputs (a KV cache)
    group: str = ""  # collectives of one group keep one order on all ranks
    context: bool = False  # reads the engine's per-micro-batch context: one micro-batch at a time
    into: tuple[str, ...] = ()  # outputs that it can write straight into a given buffer


@dataclass(frozen=True)
class Program(Textual):
    """The operators of one captured graph, in a valid order, with their dataflow."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: dict[str, Value]
    operators: tuple[Operator, ...]
    unsplittable: str = ""  # why this graph cannot be cut into micro-batches; "" if it can

    @cached_property
    def by_name(self) -> dict[str, Operator]:
        return {o.name: o for o in self.operators}

    def lines(self) -> Iterator[str]:
        yield "program" + (f" unsplittable: {self.unsplittable}" if self.unsplittable else "")
        for v in self.values.values():
            where = f"batch:{v.axis}" if v.axis is not None else v.scope.value
            if v.rows > 1:
                where += f"x{v.rows}" if v.axis is not None else f":x{v.rows}"
            alias = f" storage={v.storage}" if v.storage != v.name else ""
            yield f"value {v.name} {where}{alias}"
        yield f"inputs {' '.join(self.inputs)}"
        for o in self.operators:
            group = f" group={o.group}" if o.group else ""
            context = " context" if o.context else ""
            yield f"op {o.name} {o.resource.value}{group}{context}"
            for field in ("tags", "inputs", "outputs", "writes", "reads", "into"):
                if names := getattr(o, field):
                    yield f"  {field} {' '.join(names)}"
        yield f"outputs {' '.join(self.outputs)}"
