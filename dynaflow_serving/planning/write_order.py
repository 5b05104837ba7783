"""The part of the proof that is about writes in place: their order, and that every access sees them.

Contract
- Within a micro-batch, each access to a storage comes after the writes before it in the program, and a write after
  all accesses before it. Between micro-batches in `Plan.depends` that holds for engine state.
- A merge copies: a write to one copy of a storage is not in the others. Each access, each output and each argument
  holds all that was written before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from dynaflow_serving.core.plan import Instance, Plan
from dynaflow_serving.core.program import Operator, Program, Scope
from dynaflow_serving.errors import PlanError
from dynaflow_serving.planning.happens_before import NO_ACTIONS, ActionSet, difference, latest, only, set_of

NOWHERE = -1  # the "action" of a mistake that is no single action's


def reject(action_index: int, mistake: str) -> NoReturn:
    """Raise `PlanError` for a mistake, of one action or (NOWHERE) of the whole plan."""
    raise PlanError(f"action {action_index}: {mistake}" if action_index != NOWHERE else mistake, action_index)


def per_micro_batch(program: Program, storage: str) -> bool:
    """Whether each micro-batch has its own part of `storage`, which an engine state and a weight have not."""
    return storage in program.values and program.values[storage].scope is not Scope.SHARED


@dataclass(frozen=True, slots=True)
class Access:
    """An operator touches a storage in one action, through the copy `root`."""

    op: Operator
    action_index: int
    root: Instance

    def writes(self, storage: str) -> bool:
        return storage in self.op.writes


@dataclass(frozen=True, slots=True)
class Merge:
    """How a copy was made."""

    action_index: int
    parts: tuple[Instance, ...]


class WriteOrder:
    """Checks the accesses that a plan makes to storages that are written in place.

    Args:
        before: for each action, those that happen before it.
        root: instance -> the instance whose memory it has.
        merged: the roots that a merge made.
        accesses: (storage, micro-batch) -> accesses, in any order.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        before: list[ActionSet],
        root: Mapping[Instance, Instance],
        merged: Mapping[Instance, Merge],
        accesses: Mapping[tuple[str, int], list[Access]],
    ) -> None:
        self.program, self.plan, self.before = program, plan, before
        self.root, self.merged = root, merged
        position = {o.name: i for i, o in enumerate(program.operators)}
        self.accesses = {key: sorted(found, key=lambda a: position[a.op.name]) for key, found in accesses.items()}

    def check(self) -> None:
        """Raises `PlanError`."""
        for (storage, mb), accesses in self.accesses.items():
            self._check_storage(storage, mb, accesses)
        for (storage, mb), accesses in self.accesses.items():
            if not per_micro_batch(self.program, storage):
                self._check_dependent(storage, mb, accesses)

    def _check_storage(self, storage: str, mb: int, accesses: list[Access]) -> None:
        private = per_micro_batch(self.program, storage)
        touching = writing = NO_ACTIONS  # the actions of earlier accesses, and of earlier writes
        writing_copy: dict[Instance, ActionSet] = defaultdict(int)  # root -> the actions that wrote that copy
        for a in accesses:
            here = only(a.action_index)
            needed = touching if a.writes(storage) else writing
            if missing := difference(needed, self.before[a.action_index] | here):
                mistake = f"{a.op.name}@{mb} does not wait for action {latest(missing)}: both access {storage}"
                reject(a.action_index, mistake)
            if private and (unseen := difference(writing, self._visible(a.root, mb, writing_copy) | here)):
                mistake = f"{a.op.name}@{mb} does not see what action {latest(unseen)} wrote to {storage}"
                reject(a.action_index, mistake)
            touching |= here
            if a.writes(storage):
                writing |= here
                writing_copy[a.root] |= here
        if private:
            self._check_final_contents(storage, mb, writing, writing_copy)

    def _visible(self, root: Instance, mb: int, writing_copy: dict[Instance, ActionSet]) -> ActionSet:
        """The actions whose writes are in the copy `root`: its own, and those in its parts when it was merged."""
        visible = writing_copy[root]
        if root in self.merged:
            merge = self.merged[root]
            part = next((p for p in merge.parts if p.start <= mb < p.stop), None)
            if part is not None:
                visible |= self._visible(self.root[part], mb, writing_copy) & self.before[merge.action_index]
        return visible

    def _check_final_contents(
        self, storage: str, mb: int, writing: ActionSet, writing_copy: dict[Instance, ActionSet]
    ) -> None:
        """Outputs, and arguments that the caller sees changed, hold all that was written."""
        for v in dict.fromkeys((*self.program.inputs, *self.program.outputs)):
            instance = Instance(v, 0, self.plan.micro_batches)
            if self.program.values[v].storage != storage or instance not in self.root:
                continue
            if unseen := difference(writing, self._visible(self.root[instance], mb, writing_copy)):
                reject(latest(unseen), f"this write to {storage} is not in {instance}")

    def _check_dependent(self, state: str, mb: int, accesses: list[Access]) -> None:
        """The accesses of a micro-batch come after the writes of those that it depends on."""
        for earlier in (a for a, later in self.plan.depends if later == mb):
            earlier_accesses = self.accesses.get((state, earlier), [])
            writing = set_of(a.action_index for a in earlier_accesses if a.writes(state))
            for a in accesses:
                if missing := difference(writing, self.before[a.action_index] | only(a.action_index)):
                    mistake = f"{a.op.name}@{mb} does not wait for action {latest(missing)}, which writes {state}"
                    reject(a.action_index, mistake)
