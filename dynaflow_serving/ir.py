"""The nouns: everything the rest of the package talks about, in one file.

Contract
- Only data: no torch, no engine, no behaviour beyond validation and look-up.
- A `Program` is what is computed, a `Plan` when and where; the text form of both round-trips exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from dynaflow_serving.textual import Textual

COMPUTE_STREAM = "compute"  # the stream of the caller: it forks the others and joins them


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


@dataclass(frozen=True, slots=True)
class Batch:  # what a strategy may look at when it decides a split; all counts are of this step
    tokens: tuple[int, ...]  # new tokens of each request, in batch order
    context: tuple[int, ...] = ()  # tokens already in the KV cache, per request; () if unknown
    depends: tuple[tuple[int, int], ...] = ()  # (writer request, reader request) of shared KV blocks
    width: int = 1  # positions per token, where what is cut is not tokens (sequences of that length)


@dataclass(frozen=True, slots=True)
class MicroBatch:  # half-open ranges into the step's batch; a request may straddle two micro-batches
    requests: tuple[int, int]
    tokens: tuple[int, int]


class Signature(NamedTuple):  # of a Split: what its Plan depends on, besides the Program
    micro_batches: int
    depends: tuple[tuple[int, int], ...] = ()
    candidate: str = ""


@dataclass(frozen=True, slots=True)
class Split:  # how one step's batch is cut
    micro_batches: tuple[MicroBatch, ...]
    depends: tuple[tuple[int, int], ...] = ()  # (earlier, later): later reads engine state that earlier writes
    reason: str = ""  # why there is one micro-batch only
    candidate: str = ""  # who cut it and orders it, where a policy chooses among strategies

    @property
    def signature(self) -> Signature:
        return Signature(len(self.micro_batches), self.depends, self.candidate)

    @property
    def bounds(self) -> tuple[int, ...]:  # token offsets of the cuts, first 0 and last the number of tokens
        return (0, *(m.tokens[1] for m in self.micro_batches))


@dataclass(frozen=True, slots=True, order=True)
class Instance:  # a value for the micro-batches start to stop (excluded): `hidden@1`, `hidden@0:2` in text
    value: str
    start: int
    stop: int


class StepKind(StrEnum):
    RUN = "run"  # one operator
    REPLACE = "replace"  # a kernel in place of one or more operators
    SPLIT = "split"  # a view of a wider instance
    ALLOC = "alloc"  # a buffer for an instance whose parts will be written in place
    MERGE = "merge"  # parts -> the whole instance (no copy for parts written into its buffer)
    RECORD = "record"  # an event, after all earlier steps of the stream
    WAIT = "wait"  # hold the stream until the event
    FREE = "free"  # drop the instances: their memory may be reused from here on


@dataclass(frozen=True, slots=True)
class Step:
    """RUN and REPLACE read and write what their operators do, for the micro-batches start to stop."""

    kind: StepKind
    stream: str
    operators: tuple[str, ...] = ()
    start: int = 0
    stop: int = 0
    kernel: str = ""  # of REPLACE
    into: tuple[str, ...] = ()  # of RUN: outputs written into the buffer that an ALLOC made
    instances: tuple[Instance, ...] = ()  # SPLIT: whole, view; MERGE: whole, *parts; ALLOC; FREE
    event: int = -1  # of RECORD and WAIT


@dataclass(frozen=True)
class Plan(Textual):  # the physical schedule of one Program for one Split signature
    strategy: str
    program: str  # digest of its Program
    micro_batches: int
    depends: tuple[tuple[int, int], ...]
    steps: tuple[Step, ...]

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((COMPUTE_STREAM, *(s.stream for s in self.steps))))
