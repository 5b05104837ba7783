"""Recorded launches -> Plan: views, merges, buffers, waits and lifetimes are inserted here.

Contract
- Whatever a strategy recorded, the lowered Plan has no race: when a value, an in-place write, an engine
  state or a collective order crosses streams, an event does too.
- Waits are minimal: none is inserted for what earlier waits already order (vector clocks per stream).
- Micro-batch inputs are views. A merge whose parts were produced by operators that can write into a
  given buffer gets that buffer first (ALLOC) and copies nothing.
- A value used by one stream only is freed after its last reader; one that crosses streams at the join.
- A merge copies, so an in-place write reaches the copy or the parts, never both. What it does not reach
  is *stale*: reading it later is a `ScheduleError`.

Actions
    for each launch: bring its inputs to its range (SPLIT, MERGE), collect what it must follow
    bring the outputs to the whole range on the compute stream
    place FREEs, then RECORD / WAIT, then the join
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from dynaflow_serving.core.order import external_ports, is_state, order_edges, state_edges, tracked_values
from dynaflow_serving.core.plan import COMPUTE_STREAM, Action, ActionKind, Instance, Plan
from dynaflow_serving.core.program import Program, Scope
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.strategy.schedule import Launch, Schedule


def lower(schedule: Schedule, strategy: str, zero_copy: bool = True) -> Plan:
    """The Plan of a finished recording. Raises `ScheduleError` where values cannot be cut or merged.

    zero_copy=False keeps operators from writing into given buffers (autograd has no `out=`).
    """
    program = schedule.program
    builder = _Builder(program, schedule.micro_batches, zero_copy)
    for launch in schedule.launches:
        builder.launch(launch, schedule.depends)
    actions = _synchronise(builder.finish())
    return Plan(strategy, program.digest, schedule.micro_batches, schedule.depends, tuple(actions))


@dataclass(eq=False, slots=True)
class _Node:
    """An action before events are placed, with the nodes that must have finished before it starts."""

    kind: ActionKind
    stream: str
    after: set[_Node] = field(default_factory=set)
    operators: tuple[str, ...] = ()
    start: int = 0
    stop: int = 0
    kernel: str = ""
    into: list[str] = field(default_factory=list)
    instances: tuple[Instance, ...] = ()
    free: list[Instance] = field(default_factory=list)  # dropped right after this action
    index: int = 0  # in the order of recording
    position: int = 0  # in its stream, filled by _synchronise
    clock: dict[str, int] = field(default_factory=dict)  # stream -> last position known to be finished

    def action(self) -> Action:
        return Action(
            self.kind, self.stream, self.operators, self.start, self.stop, self.kernel, tuple(self.into), self.instances
        )


class _Builder:
    def __init__(self, program: Program, micro_batches: int, zero_copy: bool) -> None:
        self.program, self.n = program, micro_batches
        self.entry = _Node(ActionKind.RECORD, COMPUTE_STREAM)  # where the caller hands over
        self.nodes: list[_Node] = [self.entry]
        self.allocs: dict[_Node, list[_Node]] = defaultdict(list)  # node -> buffers made right before it
        self.made: dict[Instance, _Node] = {}
        self.readers: dict[Instance, list[_Node]] = defaultdict(list)
        self.current: dict[tuple[str, int], Instance] = {}  # what holds value @ micro-batch now
        self.ran: dict[tuple[str, int], _Node] = {}
        self.writers: dict[tuple[str, int], list[_Node]] = defaultdict(list)  # (storage, micro-batch) -> in place
        self.root: dict[Instance, Instance] = {}  # the instance whose memory this one is a view of
        self.roots: dict[str, set[Instance]] = defaultdict(set)  # storage -> its copies
        self.stale: dict[tuple[Instance, int], str] = {}  # (root, micro-batch) -> who wrote another copy
        self.buffered: set[tuple[str, int]] = set()  # value @ micro-batch that have a merge buffer
        self.last_of_group: dict[str, _Node] = {}
        self.before = order_edges(program)
        self.state_writers: dict[str, list[str]] = defaultdict(list)
        for writer, toucher in state_edges(program):
            self.state_writers[toucher].append(writer)
        self.tracked = tracked_values(program)
        for name in program.inputs:
            if name in self.tracked:
                whole = Instance(name, 0, micro_batches)
                first = next(v for v in program.inputs if self._storage(v) == self._storage(name))
                self._produce(whole, self.entry, Instance(first, 0, micro_batches))
        self.written = {s for o in program.operators for s in o.writes}
        aliases = Counter(v.storage for v in program.values.values())
        self.own_storage = {s for s, n in aliases.items() if n == 1 and s not in self.written} if zero_copy else set()

    def launch(self, launch: Launch, depends: tuple[tuple[int, int], ...]) -> None:
        ops = [self.program.by_name[n] for n in launch.operators]
        inputs, outputs = external_ports(self.program, launch.operators)
        kind = ActionKind.REPLACE if launch.kernel else ActionKind.RUN
        node = _Node(kind, launch.stream, set(), launch.operators, launch.start, launch.stop, launch.kernel)
        used = [self._bring(v, launch.start, launch.stop, node) for v in inputs if v in self.tracked]
        span = range(launch.start, launch.stop)
        group = {(o.name, mb) for o in ops for mb in span}
        for op in ops:
            must = {(e, mb) for e in self.before[op.name] for mb in span}
            must |= {(w, a) for a, later in depends if later in span for w in self.state_writers[op.name]}
            node.after |= {self.ran[key] for key in must - group}
            if op.group:
                if op.group in self.last_of_group:
                    node.after.add(self.last_of_group[op.group])
                self.last_of_group[op.group] = node
        node.after.discard(node)
        self._add(node)
        self.ran.update(dict.fromkeys(group, node))
        roots: dict[str, set[Instance]] = defaultdict(set)  # storage -> the copies of it that the node sees
        for instance in used:
            roots[self._storage(instance.value)].add(self.root[instance])
        for op in ops:
            for storage in op.writes:
                if not is_state(self.program, storage):
                    self._written(op.name, storage, span, node, roots[storage], used)
        for v in outputs:
            if v in self.tracked:
                seen = roots[self._storage(v)]
                if len(seen) > 1 and self._storage(v) in self.written:
                    raise ScheduleError(f"{launch.operators[-1]} cannot run merged: {v} would alias two copies")
                instance = Instance(v, launch.start, launch.stop)
                self._produce(instance, node, next(iter(seen)) if len(seen) == 1 else instance)
                seen.add(self.root[instance])

    def finish(self) -> list[_Node]:
        """Bring the outputs together on the compute stream, join the streams, and free the rest there."""
        join = _Node(ActionKind.FREE, COMPUTE_STREAM)
        keep: set[Instance] = set()
        for name in self.program.outputs:
            if name in self.tracked:
                first = self.current[name, 0]  # of a shared value any micro-batch's will do
                batched = self.program.values[name].scope is Scope.BATCH
                keep.add(self._bring(name, 0, self.n, join) if batched else self._bring(*_fields(first), join))
        for name in self.program.inputs:
            if name in self.tracked:
                self._check_fresh(Instance(name, 0, self.n))  # the caller sees what is written to an argument
        join.after |= set({n.stream: n for n in self.nodes}.values())
        self._add(join)
        crossing: list[Instance] = []
        for instance, maker in self.made.items():
            if maker is self.entry or instance in keep:
                continue
            users = {maker, *self.readers[instance]}
            if len({u.stream for u in users}) == 1:
                max(users, key=lambda u: u.index).free.append(instance)
            else:
                crossing.append(instance)
        join.instances = tuple(sorted(crossing))
        return [n for node in self.nodes for n in (*self.allocs[node], node)]

    def _add(self, node: _Node) -> None:
        node.index = len(self.nodes)
        self.nodes.append(node)

    def _storage(self, value: str) -> str:
        return self.program.values[value].storage

    def _produce(self, instance: Instance, node: _Node, root: Instance) -> None:
        self._make(instance, node, root)
        self.current.update({(instance.value, mb): instance for mb in range(instance.start, instance.stop)})

    def _make(self, instance: Instance, node: _Node, root: Instance) -> None:
        self.made[instance] = node
        self.root[instance] = root
        self.roots[self._storage(instance.value)].add(root)

    def _bring(self, value: str, start: int, stop: int, reader: _Node) -> Instance:
        """The instance of `value` for exactly [start, stop), made by a view or a merge if need be."""
        want = Instance(value, start, stop)
        parts = list(dict.fromkeys(self.current[value, mb] for mb in range(start, stop)))
        if parts != [want]:
            if self.program.values[value].scope is not Scope.BATCH:
                raise ScheduleError(f"{value} has no token axis: it can be neither cut nor merged")
            if want not in self.made and len(parts) == 1:
                self._view(parts[0], want, reader)
            elif want not in self.made:
                self._merge(parts, want, reader)
        self._check_fresh(want)
        self.readers[want].append(reader)
        reader.after.add(self.made[want])
        return want

    def _view(self, whole: Instance, view: Instance, reader: _Node) -> None:
        node = _Node(ActionKind.SPLIT, reader.stream, {self.made[whole]}, instances=(whole, view))
        self._add(node)
        self.readers[whole].append(node)
        self._make(view, node, self.root[whole])

    def _merge(self, parts: list[Instance], whole: Instance, reader: _Node) -> None:
        parts = [self._clip(p, whole, reader) for p in parts]
        node = _Node(ActionKind.MERGE, reader.stream, instances=(whole, *parts))
        storage = self._storage(whole.value)
        for p in parts:
            self._check_fresh(p)
            node.after.add(self.made[p])
            self.readers[p].append(node)
            for mb in range(p.start, p.stop):
                node.after |= set(self.writers[storage, mb])
        keys = {(whole.value, mb) for mb in range(whole.start, whole.stop)}
        if storage in self.own_storage and not keys & self.buffered:
            fit = [m for p in parts if self._can_write_into(m := self.made[p], whole.value)]
            if fit:
                self.buffered |= keys
                self._give_buffer(whole, fit, node)
        self._add(node)
        self._make(whole, node, whole)

    def _give_buffer(self, whole: Instance, makers: list[_Node], merge: _Node) -> None:
        first = min(makers, key=lambda m: m.index)
        alloc = _Node(ActionKind.ALLOC, first.stream, instances=(whole,), index=first.index)
        self.allocs[first].append(alloc)
        merge.after.add(alloc)
        self.readers[whole] += [alloc, *makers]  # its memory is in use from here
        for m in makers:
            m.into.append(whole.value)
            m.after.add(alloc)

    def _clip(self, part: Instance, whole: Instance, reader: _Node) -> Instance:
        clipped = Instance(part.value, max(part.start, whole.start), min(part.stop, whole.stop))
        if clipped not in self.made:
            self._view(part, clipped, reader)
        return clipped

    def _can_write_into(self, maker: _Node, value: str) -> bool:
        return maker.kind is ActionKind.RUN and value in self.program.by_name[maker.operators[0]].into

    def _written(
        self, op: str, storage: str, span: range, node: _Node, seen: set[Instance], used: list[Instance]
    ) -> None:
        """`node` writes `storage` in place, through its copy in `seen`: all other copies are stale now."""
        if len(seen) > 1:
            raise ScheduleError(f"{op} writes {storage} in place and cannot run merged: it would see two copies")
        for mb in span:
            self.writers[storage, mb].append(node)
            self.stale.update({(root, mb): op for root in self.roots[storage] - seen})
            for instance in used:
                key = (instance.value, mb)
                if self.root[instance] in seen and (self.root[self.current[key]], mb) in self.stale:
                    self.current[key] = instance

    def _check_fresh(self, instance: Instance) -> None:
        for mb in range(instance.start, instance.stop):
            if writer := self.stale.get((self.root[instance], mb)):
                raise ScheduleError(
                    f"{instance.value}@{mb} is out of date: {writer} wrote another copy of it in place. Run "
                    f"{writer} and the operators after it that use {instance.value} merged alike"
                )


def _fields(i: Instance) -> tuple[str, int, int]:
    return i.value, i.start, i.stop


def _synchronise(nodes: list[_Node]) -> list[Action]:
    """Insert RECORD and WAIT where a node follows one of another stream that is not yet known finished."""
    clocks: dict[str, dict[str, int]] = {}
    waits: dict[_Node, list[_Node]] = {}
    length: dict[str, int] = {}
    entry = nodes[0]
    for node in nodes:
        clock = clocks.setdefault(node.stream, {})
        if not clock and node.stream != COMPUTE_STREAM:
            node.after.add(entry)
        latest: dict[str, _Node] = {}
        for dep in node.after:
            known = max(clock.get(dep.stream, -1), latest[dep.stream].position if dep.stream in latest else -1)
            if dep.stream != node.stream and dep.position > known:
                latest[dep.stream] = dep
        need = [
            d
            for d in latest.values()
            if not any(o is not d and o.clock.get(d.stream, -1) >= d.position for o in latest.values())
        ]
        waits[node] = sorted(need, key=lambda d: d.stream)
        for dep in need:
            for stream, position in dep.clock.items():
                clock[stream] = max(clock.get(stream, -1), position)
        node.position = length[node.stream] = length.get(node.stream, -1) + 1
        clock[node.stream] = node.position
        node.clock = dict(clock)
    recorded = {d for deps in waits.values() for d in deps}
    events: dict[_Node, int] = {}
    actions: list[Action] = []
    for node in nodes:
        actions += [Action(ActionKind.WAIT, node.stream, event=events[d]) for d in waits[node]]
        if node is not entry and (node.kind is not ActionKind.FREE or node.instances):
            actions.append(node.action())
        if node.free:  # before the event, so that joining the stream covers it
            actions.append(Action(ActionKind.FREE, node.stream, instances=tuple(sorted(node.free))))
        if node in recorded:
            events[node] = len(events)
            actions.append(Action(ActionKind.RECORD, node.stream, event=events[node]))
    return actions
