"""Where values are: which instance holds which micro-batches of a value, and the views, merges and buffers between.

Contract
- `read` gives an operator the instance it asks for. If none has these micro-batches, it adds a SPLIT (a view of a
  wider instance) or a MERGE (a copy of several), on the reader's stream.
- The MERGE of a PARTIAL value adds its parts, out of place and in the order of micro-batches. Such a value has no SPLIT
  and no buffer.
- A merge whose parts come from operators that can write into a given buffer gets its buffer before they run (ALLOC).
  It then copies nothing for these parts.
- The nodes that are added know what they must follow. Nothing is said about streams or events.
"""

from __future__ import annotations

from collections import defaultdict

from dynaflow_serving.core.order import is_state, tracked_values
from dynaflow_serving.core.plan import ActionKind, Instance
from dynaflow_serving.core.program import Operator, Program, Scope
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.planning.copies import Copies
from dynaflow_serving.planning.nodes import Node, NodeList


class Dataflow:
    def __init__(self, program: Program, micro_batches: int, nodes: NodeList, zero_copy: bool) -> None:
        """`zero_copy`: whether operators may write into merge buffers."""
        self.program, self.micro_batches, self.nodes = program, micro_batches, nodes
        self.tracked = tracked_values(program)
        self._may_have_buffer = program.own_storages if zero_copy else frozenset()
        self._has_buffer: set[tuple[str, int]] = set()  # value @ micro-batch
        self._made: dict[Instance, Node] = {}
        self._readers: dict[Instance, list[Node]] = defaultdict(list)
        self._holder: dict[tuple[str, int], Instance] = {}  # value @ micro-batch -> what has its newest contents
        self._copies = Copies(program)
        for value in self._tracked_inputs():
            first = next(v for v in program.inputs if program.values[v].storage == program.values[value].storage)
            self._hold(self.whole(value), nodes.entry, self.whole(first))

    def whole(self, value: str) -> Instance:
        return Instance(value, 0, self.micro_batches)

    # -- what operators do -----------------------------------------------------------------------------
    def read(self, value: str, start: int, stop: int, reader: Node) -> Instance:
        """The instance of `value` for exactly these micro-batches, made here if need be; `reader` follows it.

        Raises:
            ScheduleError: the value can be neither cut nor merged, or is out of date.
        """
        wanted = Instance(value, start, stop)
        scope = self.program.values[value].scope
        holders = list(dict.fromkeys(self._holder[value, mb] for mb in range(start, stop)))
        if holders != [wanted]:
            if scope is Scope.PARTIAL:
                _check_covered(wanted, holders)
            elif scope is not Scope.BATCH:
                raise ScheduleError(f"{value} has no token axis: it can be neither cut nor merged")
            if wanted not in self._made:
                if len(holders) == 1:
                    self._view(holders[0], wanted, reader)
                else:
                    self._merge(holders, wanted, reader)
        self._copies.check_fresh(wanted)
        self._readers[wanted].append(reader)
        reader.after.add(self._made[wanted])
        return wanted

    def write_and_produce(self, node: Node, ops: list[Operator], inputs: list[Instance], outputs: list[str]) -> None:
        """Note what `node` changes: the storages that `ops` write in place, and its `outputs`.

        An output with the storage of an input is an alias of it.

        Raises:
            ScheduleError: `node` sees two copies of what it writes or returns.
        """
        seen: dict[str, set[Instance]] = defaultdict(set)  # storage -> the copies of it that the node sees
        for instance in inputs:
            seen[self._copies.storage(instance)].add(self._copies.root[instance])
        for op in ops:
            for storage in op.writes:
                if not is_state(self.program, storage):
                    self._write_in_place(op.name, storage, node, seen[storage], inputs)
        for value in outputs:
            storage = self.program.values[value].storage
            roots = seen[storage]
            if len(roots) > 1 and storage in self.program.written_storages:
                raise ScheduleError(f"{node.operators[-1]} cannot run merged: {value} would alias two copies")
            instance = Instance(value, node.start, node.stop)
            root = next(iter(roots)) if len(roots) == 1 else instance
            self._hold(instance, node, root)
            roots.add(root)

    def read_outputs(self, reader: Node) -> set[Instance]:
        """The instances that are the program's outputs, each whole on the stream of `reader`.

        Raises:
            ScheduleError: an output, or an argument that the caller would see changed, is out of date.
        """
        outputs = set()
        for value in self.program.outputs:
            if value in self.tracked:
                merged = self.program.values[value].scope in (Scope.BATCH, Scope.PARTIAL)
                # of any other value any micro-batch's will do
                instance = self.whole(value) if merged else self._holder[value, 0]
                outputs.add(self.read(value, instance.start, instance.stop, reader))
        for value in self._tracked_inputs():
            self._copies.check_fresh(self.whole(value))
        return outputs

    def users_of_temporaries(self, outputs: set[Instance]) -> dict[Instance, set[Node]]:
        """For each instance that the plan made and does not return, its maker and its readers."""
        return {
            instance: {maker, *self._readers[instance]}
            for instance, maker in self._made.items()
            if maker is not self.nodes.entry and instance not in outputs
        }

    # -- instances ---------------------------------------------------------------------------------------
    def _tracked_inputs(self) -> list[str]:
        return [v for v in self.program.inputs if v in self.tracked]

    def _make(self, instance: Instance, maker: Node, root: Instance) -> None:
        self._made[instance] = maker
        self._copies.add(instance, root)

    def _hold(self, instance: Instance, maker: Node, root: Instance) -> None:
        self._make(instance, maker, root)
        for mb in range(instance.start, instance.stop):
            self._holder[instance.value, mb] = instance

    def _write_in_place(self, op: str, storage: str, node: Node, seen: set[Instance], inputs: list[Instance]) -> None:
        """`node` writes the one copy in `seen`; what it read from that copy is now the newest of its value."""
        if len(seen) > 1:
            raise ScheduleError(f"{op} writes {storage} in place and cannot run merged: it would see two copies")
        written = [i for i in inputs if self._copies.root[i] in seen]
        for mb in range(node.start, node.stop):
            self._copies.note_write(op, storage, mb, node, seen)
            for instance in written:
                if self._copies.is_stale(self._holder[instance.value, mb], mb):
                    self._holder[instance.value, mb] = instance

    # -- views, merges and buffers -----------------------------------------------------------------------
    def _view(self, whole: Instance, view: Instance, reader: Node) -> None:
        node = Node(ActionKind.SPLIT, reader.stream, {self._made[whole]}, instances=(whole, view))
        self.nodes.append(node)
        self._readers[whole].append(node)
        self._make(view, node, self._copies.root[whole])

    def _merge(self, holders: list[Instance], whole: Instance, reader: Node) -> None:
        parts = [self._clip(h, whole, reader) for h in holders]
        node = Node(ActionKind.MERGE, reader.stream, instances=(whole, *parts))
        for part in parts:
            self._copies.check_fresh(part)
            node.after |= {self._made[part], *self._copies.writers(part)}
            self._readers[part].append(node)
        self._give_buffer(whole, parts, node)
        self.nodes.append(node)
        self._make(whole, node, whole)

    def _clip(self, part: Instance, whole: Instance, reader: Node) -> Instance:
        """What of `part` lies in `whole`."""
        clipped = Instance(part.value, max(part.start, whole.start), min(part.stop, whole.stop))
        if clipped not in self._made:
            self._view(part, clipped, reader)
        return clipped

    def _give_buffer(self, whole: Instance, parts: list[Instance], merge: Node) -> None:
        """Let the makers of `parts` write into the memory of `whole`, if one of them can and none has a buffer."""
        keys = {(whole.value, mb) for mb in range(whole.start, whole.stop)}
        makers = [m for p in parts if self._can_write_into(m := self._made[p], whole.value)]
        if self.program.values[whole.value].scope is Scope.PARTIAL or not makers:
            return
        if self._copies.storage(whole) not in self._may_have_buffer or keys & self._has_buffer:
            return
        self._has_buffer |= keys
        first = min(makers, key=lambda m: m.index)
        allocation = Node(ActionKind.ALLOC, first.stream, instances=(whole,), index=first.index)
        first.allocations.append(allocation)
        merge.after.add(allocation)
        self._readers[whole] += [allocation, *makers]  # its memory is in use from here
        for maker in makers:
            maker.into.append(whole.value)
            maker.after.add(allocation)

    def _can_write_into(self, maker: Node, value: str) -> bool:
        return maker.kind is ActionKind.RUN and value in self.program.by_name[maker.operators[0]].into


def _check_covered(wanted: Instance, holders: list[Instance]) -> None:
    """Raise `ScheduleError` if a sum among `holders` has shares of micro-batches that `wanted` has not."""
    for holder in holders:
        if holder.start < wanted.start or holder.stop > wanted.stop:
            raise ScheduleError(
                f"{holder} is one sum over these micro-batches and cannot be cut for {wanted}: execute what makes it "
                "for one micro-batch at a time, or what reads it for all of them together"
            )
