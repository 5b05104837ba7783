"""When actions may start, and when memory is given back: order between operators, frees, events.

Contract
- `OperatorOrder` knows what a launch must follow beyond its inputs: in-place writes, engine state, collectives.
- `place_frees` drops an instance after its last user if one stream uses it, else at the join.
- `place_events` adds a RECORD and a WAIT where a node follows one of another stream, and nowhere else: a wait that
  earlier ones imply is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from dynaflow_serving.core.order import order_edges, state_edges
from dynaflow_serving.core.plan import COMPUTE_STREAM, Action, ActionKind, Instance
from dynaflow_serving.core.program import Operator, Program
from dynaflow_serving.planning.nodes import Node


class OperatorOrder:
    """Which nodes an operator must follow, whatever it reads.

    Args:
        depends: pairs (earlier, later) of micro-batches; the later one reads engine state that the earlier one writes.
    """

    def __init__(self, program: Program, depends: tuple[tuple[int, int], ...]) -> None:
        self._depends = depends
        self._before = order_edges(program)
        self._state_writers: dict[str, list[str]] = defaultdict(list)  # operator -> the last writers of its states
        for writer, toucher in state_edges(program):
            self._state_writers[toucher].append(writer)
        self._ran: dict[tuple[str, int], Node] = {}  # operator @ micro-batch
        self._last_of_group: dict[str, Node] = {}  # group of collectives -> the latest of them

    def add(self, node: Node, ops: list[Operator]) -> None:
        """Make `node`, which runs `ops`, follow what it must, and note that it ran."""
        micro_batches = range(node.start, node.stop)
        own = {(op.name, mb) for op in ops for mb in micro_batches}
        for op in ops:
            before = {(name, mb) for name in self._before[op.name] for mb in micro_batches}
            for earlier, later in self._depends:
                if later in micro_batches:
                    before |= {(writer, earlier) for writer in self._state_writers[op.name]}
            node.after |= {self._ran[key] for key in before - own}
            if op.group:
                previous = self._last_of_group.get(op.group, node)
                if previous is not node:
                    node.after.add(previous)
                self._last_of_group[op.group] = node
        self._ran.update(dict.fromkeys(own, node))


def place_frees(users: Mapping[Instance, set[Node]], join: Node) -> None:
    """Free each instance after its `users`: after the last one if they share a stream, else at the join."""
    crossing = []
    for instance, nodes in users.items():
        if len({n.stream for n in nodes}) == 1:
            max(nodes, key=lambda n: n.index).freed.append(instance)
        else:
            crossing.append(instance)
    join.instances = tuple(sorted(crossing))


def place_events(nodes: Iterable[Node], entry: Node) -> list[Action]:
    """The actions of `nodes`, which are in issue order, with RECORD and WAIT between streams."""
    nodes = list(nodes)
    waits = _needed_waits(nodes, entry)
    recorded = {n for awaited in waits.values() for n in awaited}
    events: dict[Node, int] = {}
    actions: list[Action] = []
    for node in nodes:
        actions += [Action(ActionKind.WAIT, node.stream, event=events[n]) for n in waits[node]]
        if not node.does_nothing:
            actions.append(node.action())
        if node.freed:  # before the event, so that joining the stream covers it
            actions.append(Action(ActionKind.FREE, node.stream, instances=tuple(sorted(node.freed))))
        if node in recorded:
            events[node] = len(events)
            actions.append(Action(ActionKind.RECORD, node.stream, event=events[node]))
    return actions


def _needed_waits(nodes: list[Node], entry: Node) -> dict[Node, list[Node]]:
    """For each node the nodes of other streams that its stream must wait for right before it."""
    clocks = _VectorClocks()
    waits: dict[Node, list[Node]] = {}
    for node in nodes:
        if node.stream != COMPUTE_STREAM and clocks.is_new(node.stream):
            node.after.add(entry)
        waits[node] = clocks.unknown(node)
        clocks.advance(node, waits[node])
    return waits


class _VectorClocks:
    """What each stream knows to be finished: of every stream a position, the place of a node among its nodes."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, int]] = defaultdict(dict)  # stream -> stream -> the last position known
        self._position: dict[Node, int] = {}
        self._known_after: dict[Node, dict[str, int]] = {}  # what a stream knows that waits for this node

    def is_new(self, stream: str) -> bool:
        return not self._known[stream]

    def unknown(self, node: Node) -> list[Node]:
        """The fewest nodes whose end implies that of all in `node.after`, without what the stream knows already."""
        known = self._known[node.stream]
        latest: dict[str, Node] = {}  # one node of each other stream is enough: the last
        for earlier in node.after:
            stream, position = earlier.stream, self._position[earlier]
            if stream == node.stream or position <= known.get(stream, -1):
                continue
            if stream not in latest or position > self._position[latest[stream]]:
                latest[stream] = earlier
        needed = [n for n in latest.values() if not any(self._implies(o, n) for o in latest.values() if o is not n)]
        return sorted(needed, key=lambda n: n.stream)

    def advance(self, node: Node, awaited: list[Node]) -> None:
        """Issue `node`, whose stream has waited for the nodes `awaited`."""
        known = self._known[node.stream]
        for earlier in awaited:
            for stream, position in self._known_after[earlier].items():
                known[stream] = max(known.get(stream, -1), position)
        self._position[node] = known[node.stream] = known.get(node.stream, -1) + 1
        self._known_after[node] = dict(known)

    def _implies(self, later: Node, earlier: Node) -> bool:
        """Whether who waits for `later` knows that `earlier` has finished."""
        return self._known_after[later].get(earlier.stream, -1) >= self._position[earlier]
