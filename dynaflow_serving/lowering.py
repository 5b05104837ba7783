"""Recorded launches -> Plan: views, merges, buffers, waits and lifetimes are inserted here.

Contract
- Whatever a strategy recorded, the lowered Plan has no race: when a value, an in-place write, an engine
  state or a collective order crosses streams, an event does too.
- Waits are minimal: none is inserted for what earlier waits already order (vector clocks per stream).
- Micro-batch inputs are views. A merge whose parts were produced by operators that can write into a
  given buffer gets that buffer first (ALLOC) and copies nothing.
- A value used by one stream only is freed after its last reader; one that crosses streams at the join.

Steps
    for each launch: bring its inputs to its range (SPLIT, MERGE), collect what it must follow
    bring the outputs to the whole range on the compute stream
    place FREEs, then RECORD / WAIT, then the join
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dynaflow_serving.dependencies import external_ports, is_state, order_edges, state_edges
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.ir import COMPUTE_STREAM, Instance, Plan, Program, Scope, Step, StepKind
from dynaflow_serving.scheduler import Launch, Schedule


def lower(schedule: Schedule, strategy: str, zero_copy: bool = True) -> Plan:
    """The Plan of a finished recording. Raises `ScheduleError` where values cannot be cut or merged.

    zero_copy=False keeps operators from writing into given buffers (autograd has no `out=`).
    """
    program = schedule.program
    builder = _Builder(program, schedule.micro_batches, zero_copy)
    states = state_edges(program)
    for launch in schedule.launches:
        builder.launch(launch, schedule.depends, states)
    builder.finish()
    steps = _synchronise(builder.nodes)
    return Plan(strategy, program.digest, schedule.micro_batches, schedule.depends, tuple(steps))


@dataclass(eq=False, slots=True)
class _Node:
    """A step before events are placed, with the nodes that must have finished before it starts."""

    kind: StepKind
    stream: str
    after: set[_Node] = field(default_factory=set)
    operators: tuple[str, ...] = ()
    start: int = 0
    stop: int = 0
    kernel: str = ""
    into: list[str] = field(default_factory=list)
    instances: tuple[Instance, ...] = ()
    position: int = 0  # in its stream, filled by _synchronise
    clock: dict[str, int] = field(default_factory=dict)  # stream -> last position known to be finished

    def step(self) -> Step:
        return Step(
            self.kind, self.stream, self.operators, self.start, self.stop, self.kernel, tuple(self.into), self.instances
        )


class _Builder:
    def __init__(self, program: Program, micro_batches: int, zero_copy: bool) -> None:
        self.program, self.n, self.zero_copy = program, micro_batches, zero_copy
        self.entry = _Node(StepKind.RECORD, COMPUTE_STREAM)  # where the caller hands over
        self.nodes: list[_Node] = [self.entry]
        self.made: dict[Instance, _Node] = {}
        self.readers: dict[Instance, list[_Node]] = {}
        self.current: dict[tuple[str, int], Instance] = {}  # what holds value @ micro-batch now
        self.ran: dict[tuple[str, int], _Node] = {}
        self.writers: dict[tuple[str, int], list[_Node]] = {}  # (storage, micro-batch) -> in-place writers
        self.stale: set[Instance] = set()  # parts of what a merged operator wrote in place
        self.last_of_group: dict[str, _Node] = {}
        self.before = order_edges(program)
        produced = {v for o in program.operators for v in o.outputs}
        self.tracked = {
            v.name
            for v in program.values.values()
            if v.scope in (Scope.BATCH, Scope.LOCAL) or (v.scope is Scope.SHARED and v.name in produced)
        }
        for name in program.inputs:
            if name in self.tracked:
                whole = Instance(name, 0, micro_batches)
                self.made[whole] = self.entry
                self.current.update({(name, mb): whole for mb in range(micro_batches)})
        written = {s for o in program.operators for s in o.writes}
        shared = [v.storage for v in program.values.values()]
        self.own_storage = {s for s in shared if s not in written and shared.count(s) == 1} if zero_copy else set()

    def launch(self, launch: Launch, depends: Iterable[tuple[int, int]], states: list[tuple[str, str]]) -> None:
        ops = [self.program.by_name[n] for n in launch.operators]
        inputs, outputs = external_ports(self.program, launch.operators)
        kind = StepKind.REPLACE if launch.kernel else StepKind.RUN
        node = _Node(kind, launch.stream, set(), launch.operators, launch.start, launch.stop, launch.kernel)
        used = {v: self._bring(v, launch.start, launch.stop, node) for v in inputs if v in self.tracked}
        span = range(launch.start, launch.stop)
        for op in ops:
            for mb in span:
                node.after |= {self.ran[e, mb] for e in self.before[op.name] if e not in launch.operators}
            for earlier, later in depends:
                if later in span:
                    node.after |= {self.ran[w, earlier] for w, t in states if t == op.name}
            if op.group:
                if op.group in self.last_of_group:
                    node.after.add(self.last_of_group[op.group])
                self.last_of_group[op.group] = node
        node.after.discard(node)
        self.nodes.append(node)
        for op in ops:
            for mb in span:
                self.ran[op.name, mb] = node
            for storage in op.writes:
                if not is_state(self.program, storage):
                    self._written(storage, span, node, used)
        for v in outputs:
            if v in self.tracked:
                self._produce(Instance(v, launch.start, launch.stop), node)

    def finish(self) -> None:
        """Bring the outputs together on the compute stream, join the streams, and free the rest there."""
        join = _Node(StepKind.FREE, COMPUTE_STREAM)
        keep: set[Instance] = set()
        for name in self.program.outputs:
            if name in self.tracked:
                first = self.current[name, 0]  # of a shared value any micro-batch's will do
                batched = self.program.values[name].scope is Scope.BATCH
                keep.add(self._bring(name, 0, self.n, join) if batched else self._bring(*_fields(first), join))
        last = {n.stream: n for n in self.nodes}
        join.after |= set(last.values())
        freed_after: dict[_Node, list[Instance]] = {}
        rank = {node: i for i, node in enumerate(self.nodes)}
        for instance, maker in self.made.items():
            if maker is self.entry or instance in keep:
                continue
            users = {maker, *self.readers.get(instance, ())}
            if len({u.stream for u in users}) == 1:
                freed_after.setdefault(max(users, key=rank.__getitem__), []).append(instance)
            else:
                join.instances += (instance,)
        ordered = []
        for node in self.nodes:
            ordered.append(node)
            if node in freed_after:
                ordered.append(_Node(StepKind.FREE, node.stream, instances=tuple(sorted(freed_after[node]))))
        join.instances = tuple(sorted(join.instances))
        self.nodes = [*ordered, join]

    def _produce(self, instance: Instance, node: _Node) -> None:
        self.made[instance] = node
        self.current.update({(instance.value, mb): instance for mb in range(instance.start, instance.stop)})

    def _bring(self, value: str, start: int, stop: int, reader: _Node) -> Instance:
        """The instance of `value` for exactly [start, stop), made by a view or a merge if need be."""
        want = Instance(value, start, stop)
        parts = list(dict.fromkeys(self.current[value, mb] for mb in range(start, stop)))
        if parts != [want]:
            if self.program.values[value].scope is not Scope.BATCH:
                raise ScheduleError(f"{value} has no token axis: it can be neither cut nor merged")
            covers = len(parts) == 1 and parts[0].start <= start and stop <= parts[0].stop
            if want in self.stale:
                raise ScheduleError(
                    f"{value} was written in place for several micro-batches at once: later readers must run "
                    "merged as well"
                )
            if want not in self.made:
                node = self._view(parts[0], want, reader) if covers else self._merge(parts, want, reader)
                self.made[want] = node
        self.readers.setdefault(want, []).append(reader)
        reader.after.add(self.made[want])
        return want

    def _view(self, whole: Instance, view: Instance, reader: _Node) -> _Node:
        node = _Node(StepKind.SPLIT, reader.stream, {self.made[whole]}, instances=(whole, view))
        self.nodes.append(node)
        self.readers.setdefault(whole, []).append(node)
        return node

    def _merge(self, parts: list[Instance], whole: Instance, reader: _Node) -> _Node:
        parts = [p if whole.start <= p.start and p.stop <= whole.stop else self._clip(p, whole, reader) for p in parts]
        node = _Node(StepKind.MERGE, reader.stream, instances=(whole, *parts))
        storage = self.program.values[whole.value].storage
        for p in parts:
            node.after.add(self.made[p])
            self.readers.setdefault(p, []).append(node)
            for mb in range(p.start, p.stop):
                node.after |= set(self.writers.get((storage, mb), ()))
        makers = [self.made[p] for p in parts]
        fit = [m for m in makers if self._can_write_into(m, whole.value)] if storage in self.own_storage else []
        if fit:
            first = min(fit, key=self.nodes.index)
            alloc = _Node(StepKind.ALLOC, first.stream, instances=(whole,))
            self.nodes.insert(self.nodes.index(first), alloc)
            node.after.add(alloc)
            self.readers.setdefault(whole, []).append(alloc)  # its memory is in use from here
            for m in fit:
                m.into.append(whole.value)
                m.after.add(alloc)
                self.readers[whole].append(m)
        self.nodes.append(node)
        return node

    def _clip(self, part: Instance, whole: Instance, reader: _Node) -> Instance:
        clipped = Instance(part.value, max(part.start, whole.start), min(part.stop, whole.stop))
        if clipped not in self.made:
            self.made[clipped] = self._view(part, clipped, reader)
        return clipped

    def _can_write_into(self, maker: _Node, value: str) -> bool:
        return (
            maker.kind is StepKind.RUN
            and value in self.program.by_name[maker.operators[0]].into
            and value not in maker.into
        )

    def _written(self, storage: str, span: range, node: _Node, used: dict[str, Instance]) -> None:
        """`node` writes `storage` in place. If it wrote a merged copy, the parts hold old contents now."""
        for mb in span:
            self.writers.setdefault((storage, mb), []).append(node)
        copies = {
            v: i
            for v, i in used.items()
            if self.program.values[v].storage == storage and self.made[i].kind is StepKind.MERGE
        }
        if not copies:
            return
        for v in self.program.values.values():
            if v.storage == storage and (v.name, span[0]) in self.current and v.name not in copies:
                raise ScheduleError(
                    f"{node.operators[0]} writes {storage} in place and cannot run merged: {v.name} would "
                    "keep the old contents"
                )
        for i in copies.values():
            self.current.update({(i.value, mb): i for mb in span})
            self.stale |= {m for m in self.made if m.value == i.value and m.start < i.stop and i.start < m.stop} - {i}


def _fields(i: Instance) -> tuple[str, int, int]:
    return i.value, i.start, i.stop


def _synchronise(nodes: list[_Node]) -> list[Step]:
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
            if dep.stream != node.stream and dep.position > clock.get(dep.stream, -1):
                if dep.stream not in latest or dep.position > latest[dep.stream].position:
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
    steps: list[Step] = []
    for node in nodes:
        steps += [Step(StepKind.WAIT, node.stream, event=events[d]) for d in waits[node]]
        if node is not entry and (node.kind is not StepKind.FREE or node.instances):
            steps.append(node.step())
        if node in recorded:
            events[node] = len(events)
            steps.append(Step(StepKind.RECORD, node.stream, event=events[node]))
    return steps
