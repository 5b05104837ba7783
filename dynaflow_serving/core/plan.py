"""When and where a Program runs: a flat list of actions, each on a named stream.

Contract
- These classes are data only. `Plan.to_text` and `parse.parse_plan` round-trip exactly: one line an action.
- `str(action)` is its line without the stream, `str(instance)` is what a line calls an instance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from dynaflow_serving.core.program import Textual

COMPUTE_STREAM = "compute"
"""The stream of the caller: it forks the others and joins them."""


def range_text(start: int, stop: int) -> str:
    """The micro-batches start to stop (excluded): `@0`, or `@0:2`."""
    return f"@{start}" if stop == start + 1 else f"@{start}:{stop}"


@dataclass(frozen=True, slots=True, order=True)
class Instance:
    """A value for the micro-batches start to stop (excluded): `hidden@1`, `hidden@0:2` in text."""

    value: str
    start: int
    stop: int

    def __str__(self) -> str:
        return self.value + range_text(self.start, self.stop)


class ActionKind(StrEnum):
    RUN = "run"  # one operator
    REPLACE = "replace"  # a kernel in place of one or more operators
    SPLIT = "split"  # a view of a wider instance
    ALLOC = "alloc"  # a buffer for an instance whose parts will be written in place
    MERGE = "merge"  # parts -> the whole instance: joined (no copy for parts in its buffer), or added if PARTIAL
    RECORD = "record"  # an event, after all earlier actions of the stream
    WAIT = "wait"  # hold the stream until the event
    FREE = "free"  # drop the instances: their memory may be reused from here on


@dataclass(frozen=True, slots=True)
class Action:
    """RUN and REPLACE read and write what their operators do, for the micro-batches start to stop."""

    kind: ActionKind
    stream: str
    operators: tuple[str, ...] = ()
    start: int = 0
    stop: int = 0
    kernel: str = ""
    """The kernel of a REPLACE."""
    into: tuple[str, ...] = ()
    """The outputs that a RUN writes into the buffer that an ALLOC made."""
    instances: tuple[Instance, ...] = ()
    """SPLIT has the whole, then the view; MERGE the whole, then its parts; ALLOC and FREE any number."""
    event: int = -1
    """The event of a RECORD or WAIT."""

    def __str__(self) -> str:
        """Such as `run layers.0.attention @0`."""
        names = [str(i) for i in self.instances]
        match self.kind:
            case ActionKind.RUN:
                into = f" into {' '.join(self.into)}" if self.into else ""
                return f"run {self.operators[0]} {range_text(self.start, self.stop)}{into}"
            case ActionKind.REPLACE:
                operators, where = " + ".join(self.operators), range_text(self.start, self.stop)
                return f"replace {operators} {where} with {self.kernel}"
            case ActionKind.SPLIT:
                return f"split {names[0]} -> {names[1]}"
            case ActionKind.MERGE:
                return f"merge {' '.join(names[1:])} -> {names[0]}"
            case ActionKind.ALLOC | ActionKind.FREE:
                return f"{self.kind.value} {' '.join(names)}"
        return f"{self.kind.value} e{self.event}"


@dataclass(frozen=True)
class Plan(Textual):
    """The physical schedule of one Program for one Split signature."""

    strategy: str
    program: str
    """The digest of its Program."""
    micro_batches: int
    depends: tuple[tuple[int, int], ...]
    """As in `Split.depends`."""
    actions: tuple[Action, ...]
    """In the order in which one thread may issue them."""

    @property
    def streams(self) -> tuple[str, ...]:
        """The compute stream first, the others in the order of use."""
        return tuple(dict.fromkeys((COMPUTE_STREAM, *(a.stream for a in self.actions))))

    def lines(self) -> Iterator[str]:
        depends = ",".join(f"{earlier}>{later}" for earlier, later in self.depends) or "-"
        yield f"plan {self.strategy} program={self.program} micro_batches={self.micro_batches} depends={depends}"
        width = max(len(s) for s in self.streams)
        for action in self.actions:
            yield f"{action.stream:<{width}} | {action}"
