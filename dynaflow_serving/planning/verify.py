"""Proof that a Plan is a correct, race-free schedule of its Program. Independent of lowering.

Contract: `verify` returns silently, or raises `PlanError` with the offending action marked in a grid.
It proves the following, with happens-before (HB) being the transitive order of streams and events:
- every operator of every micro-batch runs exactly once;
- every instance is produced exactly once, HB each reader, and the parts of a merge tile it exactly;
- a sum over tokens (PARTIAL) has each micro-batch's share once: it is never split, and its merge, which adds, has no
  buffer;
- in-place writes keep program order with every other access to the storage, and each access sees all the
  writes before it: a merge copies, and a write to one copy is not in the others;
- micro-batches in `Plan.depends` see engine state written before they read it;
- collectives of one group have one order; operators with context run for one micro-batch at a time;
- operators write into buffers that are theirs: allocated before, of one merge, and of no other storage;
- every instance but the outputs is freed once, after all its readers, and not used afterwards; memory goes
  back to the stream that allocated it, so what that stream issues after the last FREE comes after all users;
- events are recorded once, before they are waited for; all streams are forked and joined by the compute stream.

Two instances share memory if one is a view of the other, or an operator returned the one for the other. Of such
instances one is the *root*. A root is one copy of its storage: a merge makes another copy, with a root of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict

from dynaflow_serving.core.grid import grid
from dynaflow_serving.core.order import external_ports, tracked_values
from dynaflow_serving.core.plan import COMPUTE_STREAM, Action, ActionKind, Instance, Plan
from dynaflow_serving.core.program import Operator, Program, Scope
from dynaflow_serving.errors import PlanError
from dynaflow_serving.planning.happens_before import NO_ACTIONS, contains, happens_before, latest, only, set_of
from dynaflow_serving.planning.write_order import NOWHERE, Access, Merge, WriteOrder, per_micro_batch, reject

ENTRY = -1  # the "action" that makes the program's inputs: it is on the compute stream, before its first action


def verify(program: Program, plan: Plan) -> None:
    """Raise `PlanError` unless `plan` is a correct schedule of `program`."""
    try:
        _Verifier(program, plan).run()
    except PlanError as e:
        raise PlanError(f"{e}\n{grid(plan, e.action, around=8)}", e.action) from None


class _Verifier:
    """Goes through the actions once, noting what each does, then checks what concerns the whole plan.

    Actions are known by their index in the plan.
    """

    def __init__(self, program: Program, plan: Plan) -> None:
        if plan.program != program.digest:
            raise PlanError(f"the plan is for program {plan.program}, not for this one ({program.digest})")
        if plan.micro_batches > 1 and program.unsplittable:
            raise PlanError(f"the program cannot be split: {program.unsplittable}")
        if plan.micro_batches > 1 and program.unmergeable:
            raise PlanError(f"the program cannot be split: {program.unmergeable}")
        # facts of the program and of the order of actions
        self.program, self.plan = program, plan
        self.before = happens_before(plan)
        self.compute_actions = set_of(i for i, a in enumerate(plan.actions) if a.stream == COMPUTE_STREAM)
        self.issued: dict[str, list[int]] = defaultdict(list)  # stream -> its actions, without events
        for i, action in enumerate(plan.actions):
            if action.event < 0:
                self.issued[action.stream].append(i)
        self.aliases = Counter(v.storage for v in program.values.values())
        self.written = {s for o in program.operators for s in o.writes}
        self.tracked = tracked_values(program)
        # what happened to each instance, and when
        self.made: dict[Instance, int] = {}
        self.reads: dict[Instance, list[int]] = defaultdict(list)
        self.allocated: dict[Instance, int] = {}
        self.freed: dict[Instance, int] = {}
        # which memory each instance has
        self.root: dict[Instance, Instance] = {}
        self.merged: dict[Instance, Merge] = {}  # by root
        self.buffer: dict[tuple[str, int], Instance] = {}  # value @ micro-batch -> its merge buffer
        # what ran, and what it touched
        self.ran: dict[tuple[str, int], int] = {}  # operator @ micro-batch
        self.accesses: dict[tuple[str, int], list[Access]] = defaultdict(list)  # storage @ micro-batch, if written
        self._enter()

    def _enter(self) -> None:
        for v in self.program.inputs:
            if v in self.tracked:
                first = next(u for u in self.program.inputs if self._storage(u) == self._storage(v))
                self.made[self._whole(v)] = ENTRY
                self.root[self._whole(v)] = self._whole(first)

    def run(self) -> None:
        for i, action in enumerate(self.plan.actions):
            match action.kind:
                case ActionKind.RUN | ActionKind.REPLACE:
                    self._launch(i, action)
                case ActionKind.SPLIT:
                    self._split(i, *action.instances)
                case ActionKind.ALLOC:
                    for instance in action.instances:
                        self._alloc(i, instance)
                case ActionKind.MERGE:
                    self._merge(i, action.instances[0], action.instances[1:])
                case ActionKind.FREE:
                    for instance in action.instances:
                        self._free(i, instance)
        self._every_operator_ran()
        WriteOrder(self.program, self.plan, self.before, self.root, self.merged, self.accesses).check()
        self._groups_in_order()
        self._streams_forked_and_joined()
        self._lifetimes(kept=self._outputs())

    # -- one action ------------------------------------------------------------------------------------
    def _launch(self, i: int, action: Action) -> None:
        self._operators_may_run(i, action)
        inputs, outputs = external_ports(self.program, action.operators)
        roots: dict[str, set[Instance]] = defaultdict(set)  # storage -> the copies of it that the action sees
        for v in inputs:
            if v in self.tracked:
                instance = Instance(v, action.start, action.stop)
                self._read(i, instance)
                roots[self._storage(v)].add(self.root[instance])
        if not set(action.into) <= {v for n in action.operators for v in self.program.by_name[n].into}:
            reject(i, f"{action.operators[0]} cannot write {', '.join(action.into)} into a given buffer")
        for v in outputs:
            if v in self.tracked:
                instance = Instance(v, action.start, action.stop)
                self._produce_output(i, instance, roots[self._storage(v)])
                if v in action.into:
                    self._write_into_buffer(i, instance)
        self._note_accesses(i, action, roots)

    def _operators_may_run(self, i: int, action: Action) -> None:
        if not 0 <= action.start < action.stop <= self.plan.micro_batches:
            reject(i, f"there are {self.plan.micro_batches} micro-batches only")
        one_operator = len(action.operators) == 1 and not action.kernel
        if not action.operators or (action.kind is ActionKind.RUN) != one_operator:
            reject(i, "a run action has one operator and no kernel, a replace action a kernel")
        for name in action.operators:
            if name not in self.program.by_name:
                reject(i, f"the program has no operator {name!r}")
            if self.program.by_name[name].context and action.stop - action.start > 1:
                reject(i, f"{name} reads per-micro-batch context: one micro-batch at a time")
            for mb in range(action.start, action.stop):
                if (name, mb) in self.ran:
                    reject(i, f"{name}@{mb} runs twice (first in action {self.ran[name, mb]})")
                self.ran[name, mb] = i

    def _produce_output(self, i: int, instance: Instance, seen: set[Instance]) -> None:
        """An output with the storage of an input is an alias of it: of the one copy in `seen`."""
        self._once(i, instance, self.made, "produced")
        if len(seen) > 1 and self._storage(instance.value) in self.written:
            reject(i, f"{instance} would alias two copies of {self._storage(instance.value)}")
        self.root[instance] = next(iter(seen)) if len(seen) == 1 else instance
        seen.add(self.root[instance])

    def _note_accesses(self, i: int, action: Action, roots: dict[str, set[Instance]]) -> None:
        for op in (self.program.by_name[n] for n in action.operators):
            for storage in self._touched(op) & self.written:
                seen = roots[storage] if per_micro_batch(self.program, storage) else {Instance(storage, 0, 0)}
                if storage in op.writes and len(seen) > 1:
                    reject(i, f"{op.name} writes {storage} in place, but sees two copies of it")
                for mb in range(action.start, action.stop):
                    self.accesses[storage, mb] += [Access(op, i, root) for root in seen]

    def _alloc(self, i: int, whole: Instance) -> None:
        self._once(i, whole, self.allocated, "allocated")
        if self._scope(whole) is not Scope.BATCH:
            reject(i, f"{whole.value} has scope {self._scope(whole)}: only values with a token axis have merge buffers")
        if self.aliases[self._storage(whole.value)] > 1 or self._storage(whole.value) in self.written:
            reject(i, f"{whole.value} has aliases or is written in place: it cannot have a merge buffer")
        for mb in range(whole.start, whole.stop):
            if (other := self.buffer.setdefault((whole.value, mb), whole)) != whole:
                reject(i, f"{whole} and {other} are two buffers for {whole.value}@{mb}")

    def _write_into_buffer(self, i: int, part: Instance) -> None:
        whole = self.buffer.get((part.value, part.start))
        if whole is None or part.stop > whole.stop or not self._is_before(self.allocated[whole], i):
            reject(i, f"the buffer for {part} is not allocated before it is written")
        self.reads[whole].append(i)  # its memory is in use
        self.root[part] = whole

    def _split(self, i: int, whole: Instance, view: Instance) -> None:
        inside = whole.value == view.value and whole.start <= view.start < view.stop <= whole.stop
        if not inside or self._scope(view) not in (Scope.BATCH, Scope.PARTIAL):
            reject(i, f"{view} is not a part of {whole}")
        if self._scope(view) is Scope.PARTIAL:
            reject(i, f"{whole} is one sum over the tokens of its micro-batches: it cannot be split")
        self._read(i, whole)
        self._once(i, view, self.made, "produced")
        self.root[view] = self.root[whole]

    def _merge(self, i: int, whole: Instance, parts: tuple[Instance, ...]) -> None:
        reached = whole.start
        for part in parts:
            follows = part.value == whole.value and part.start == reached < part.stop
            if not follows or not self._mergeable(part):
                reject(i, f"the parts do not tile {whole}")
            reached = part.stop
            self._read(i, part)
        if reached != whole.stop:
            reject(i, f"the parts do not tile {whole}")
        if whole in self.allocated and not self._is_before(self.allocated[whole], i):
            reject(i, f"the buffer of {whole} is not allocated before the merge")
        self._once(i, whole, self.made, "produced")
        self.root[whole] = whole
        self.merged[whole] = Merge(i, parts)

    def _free(self, i: int, instance: Instance) -> None:
        self._once(i, instance, self.freed, "freed")
        if self.made.get(instance, ENTRY) == ENTRY:
            reject(i, f"{instance} is freed, but the plan did not make it")

    def _read(self, i: int, instance: Instance) -> None:
        if instance not in self.made:
            reject(i, f"{instance} is read before it is produced")
        if not self._is_before(self.made[instance], i):
            reject(i, f"{instance} is read without waiting for action {self.made[instance]}")
        if instance in self.freed:
            reject(i, f"{instance} is read after it is freed in action {self.freed[instance]}")
        self.reads[instance].append(i)

    # -- the whole plan ------------------------------------------------------------------------------
    def _every_operator_ran(self) -> None:
        for op in self.program.operators:
            for mb in range(self.plan.micro_batches):
                if (op.name, mb) not in self.ran:
                    reject(NOWHERE, f"{op.name}@{mb} never runs")

    def _groups_in_order(self) -> None:
        last: dict[str, int] = {}
        for i, action in enumerate(self.plan.actions):
            for group in {self.program.by_name[n].group for n in action.operators} - {""}:
                if group in last and not self._is_before(last[group], i):
                    reject(i, f"collectives of group {group!r} are not ordered (after action {last[group]})")
                last[group] = i

    def _streams_forked_and_joined(self) -> None:
        """Every action that does work starts after the plan starts, and ends before the plan returns."""
        joined = NO_ACTIONS
        if self.compute_actions:
            end = latest(self.compute_actions)
            joined = self.before[end] | only(end)
        for i, action in enumerate(self.plan.actions):
            if action.kind in (ActionKind.RECORD, ActionKind.WAIT):
                continue
            if not contains(joined, i):
                reject(i, f"stream {action.stream!r} is not joined: this action may run after the plan returns")
            if not self._is_before(ENTRY, i):
                reject(i, f"stream {action.stream!r} is not forked: this action may run before the plan starts")

    def _outputs(self) -> set[Instance]:
        """The instances that are the outputs; each must be there at the end."""
        outputs = set()
        for v in self.program.outputs:
            if v in self.tracked:
                instance = self._whole(v)
                if not self._mergeable(instance):  # any micro-batch's will do
                    instance = next((i for i in self.made if i.value == v and i.start == 0), instance)
                if instance not in self.made or instance in self.freed:
                    reject(self.freed.get(instance, NOWHERE), f"output {v} is not there when the plan returns")
                outputs.add(instance)
        return outputs

    def _lifetimes(self, kept: set[Instance]) -> None:
        sharers: dict[Instance, list[Instance]] = defaultdict(list)  # root -> the instances that share its memory
        for instance, made in self.made.items():
            if instance in self.freed:
                self._users_are_before(self.freed[instance], instance)
            elif made != ENTRY and instance not in kept:
                reject(made, f"{instance} is never freed")
            sharers[self.root[instance]].append(instance)
        for root, instances in sharers.items():
            if all(instance in self.freed for instance in instances):
                self._memory_is_reused_in_order(root, instances)
        for instance, allocated in self.allocated.items():
            if instance not in self.made:
                reject(allocated, f"the buffer {instance} is never merged")

    def _users_are_before(self, free: int, instance: Instance) -> None:
        for user in (*self.reads[instance], self.made[instance]):
            if not self._is_before(user, free):
                reject(free, f"{instance} is freed while action {user} may still use it")

    def _memory_is_reused_in_order(self, root: Instance, sharers: list[Instance]) -> None:
        """The last FREE returns the memory to the stream that allocated it: its next action may reuse it."""
        free = max(self.freed[i] for i in sharers)
        for instance in sharers:
            self._users_are_before(free, instance)
        stream = self.plan.actions[self.allocated.get(root, self.made[root])].stream
        issued = self.issued[stream]
        next_there = bisect_right(issued, free)
        if next_there < len(issued) and not self._is_before(free, issued[next_there]):
            reject(free, f"{root} is freed, but stream {stream!r} may reuse its memory too early")

    # -- small questions -----------------------------------------------------------------------------
    def _is_before(self, earlier: int, later: int) -> bool:
        """Whether action `earlier` has finished when action `later` starts."""
        if earlier == ENTRY:
            return self.plan.actions[later].stream == COMPUTE_STREAM or bool(self.before[later] & self.compute_actions)
        return contains(self.before[later], earlier)

    def _touched(self, op: Operator) -> set[str]:
        return {self._storage(v) for v in op.inputs} | {*op.reads, *op.writes}

    def _storage(self, value: str) -> str:
        return self.program.values[value].storage

    def _whole(self, value: str) -> Instance:
        return Instance(value, 0, self.plan.micro_batches)

    def _scope(self, instance: Instance) -> Scope:
        return self.program.values[instance.value].scope

    def _mergeable(self, instance: Instance) -> bool:
        return self._scope(instance) in (Scope.BATCH, Scope.PARTIAL)

    def _once(self, i: int, instance: Instance, when: dict[Instance, int], verb: str) -> None:
        if instance in when:
            reject(i, f"{instance} is {verb} twice (first in action {when[instance]})")
        when[instance] = i
