"""Which instances share memory, and which copies of a storage are out of date.

Contract
- Every instance has a *root*, the instance that owns its memory. A root is one copy of its storage: a merge makes
  another one.
- An in-place write reaches one copy. The other copies of that storage are stale from then on, for the micro-batches
  that were written; who reads one is refused with a `ScheduleError`.
"""

from __future__ import annotations

from collections import defaultdict

from dynaflow_serving.core.plan import Instance
from dynaflow_serving.core.program import Program
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.planning.nodes import Node


class Copies:
    def __init__(self, program: Program) -> None:
        self.root: dict[Instance, Instance] = {}
        self._program = program
        self._of_storage: dict[str, set[Instance]] = defaultdict(set)  # the roots of each storage
        self._writers: dict[tuple[str, int], list[Node]] = defaultdict(list)  # of storage @ micro-batch
        self._stale: dict[tuple[Instance, int], str] = {}  # (root, micro-batch) -> the operator that wrote another copy

    def add(self, instance: Instance, root: Instance) -> None:
        """Note that `instance` has the memory of `root`, which may be itself."""
        self.root[instance] = root
        self._of_storage[self.storage(instance)].add(root)

    def storage(self, instance: Instance) -> str:
        return self._program.values[instance.value].storage

    def note_write(self, op: str, storage: str, micro_batch: int, node: Node, written: set[Instance]) -> None:
        """Operator `op` of `node` writes the copies `written`: all others are stale for this micro-batch."""
        self._writers[storage, micro_batch].append(node)
        for root in self._of_storage[storage] - written:
            self._stale[root, micro_batch] = op

    def writers(self, instance: Instance) -> set[Node]:
        """The nodes that have written the storage of `instance` in place, for its micro-batches."""
        storage = self.storage(instance)
        return {n for mb in range(instance.start, instance.stop) for n in self._writers.get((storage, mb), ())}

    def is_stale(self, instance: Instance, micro_batch: int) -> bool:
        return (self.root[instance], micro_batch) in self._stale

    def check_fresh(self, instance: Instance) -> None:
        """Raise `ScheduleError` if part of `instance` is stale."""
        for mb in range(instance.start, instance.stop):
            if writer := self._stale.get((self.root[instance], mb)):
                raise ScheduleError(
                    f"{instance.value}@{mb} is out of date: {writer} wrote another copy of it in place. Run "
                    f"{writer} and the operators after it that use {instance.value} merged alike"
                )
