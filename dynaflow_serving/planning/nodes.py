"""The actions of a plan while it is being made: nodes that know which others they must follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from dynaflow_serving.core.plan import COMPUTE_STREAM, Action, ActionKind, Instance


@dataclass(eq=False, slots=True)
class Node:
    """An action before events are placed."""

    kind: ActionKind
    stream: str
    after: set[Node] = field(default_factory=set)
    """What must have finished before this starts."""
    operators: tuple[str, ...] = ()
    start: int = 0
    stop: int = 0
    kernel: str = ""
    into: list[str] = field(default_factory=list)
    instances: tuple[Instance, ...] = ()
    allocations: list[Node] = field(default_factory=list)
    """ALLOC nodes, issued right before this one."""
    freed: list[Instance] = field(default_factory=list)
    """Instances that are dropped right after this one."""
    index: int = 0
    """Place in the order of recording."""

    @property
    def does_nothing(self) -> bool:
        """Whether it only marks a point in time: the entry, or a join with nothing to free."""
        return self.kind is ActionKind.RECORD or (self.kind is ActionKind.FREE and not self.instances)

    def action(self) -> Action:
        return Action(
            self.kind, self.stream, self.operators, self.start, self.stop, self.kernel, tuple(self.into), self.instances
        )


class NodeList:
    """All nodes so far. The first is the entry, where the caller hands over; it is no action of the plan."""

    def __init__(self) -> None:
        self.entry = Node(ActionKind.RECORD, COMPUTE_STREAM)
        self._nodes = [self.entry]

    def append(self, node: Node) -> None:
        node.index = len(self._nodes)
        self._nodes.append(node)

    def last_of_each_stream(self) -> set[Node]:
        return set({n.stream: n for n in self._nodes}.values())

    def in_issue_order(self) -> Iterator[Node]:
        for node in self._nodes:
            yield from node.allocations
            yield node
