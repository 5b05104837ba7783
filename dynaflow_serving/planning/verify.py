"""Proof that a Plan is a correct, race-free schedule of its Program. Independent of lowering.

Contract: `verify` returns silently, or raises `PlanError` with the offending action marked in a grid.
What is proved, with happens-before (HB) being the transitive order of streams and events:
- every operator of every micro-batch runs exactly once;
- every instance is produced exactly once, HB each reader, and the parts of a merge tile it exactly;
- in-place writes keep program order with every other access to the storage, and each access sees all the
  writes before it: a merge copies, and a write to one copy is not in the others;
- micro-batches in `Plan.depends` see engine state written before they read it;
- collectives of one group have one order; operators with context run for one micro-batch at a time;
- operators write into buffers that are theirs: allocated before, of one merge, and of no other storage;
- every instance but the outputs is freed once, after all its readers, and not used afterwards; memory goes
  back to the stream that allocated it, so what that stream issues after the last FREE comes after all users;
- events are recorded once, before they are waited for; all streams are forked and joined by the compute stream.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import NoReturn

from dynaflow_serving.core.grid import grid
from dynaflow_serving.core.order import external_ports, tracked_values
from dynaflow_serving.core.plan import COMPUTE_STREAM, Action, ActionKind, Instance, Plan
from dynaflow_serving.core.program import Operator, Program, Scope
from dynaflow_serving.errors import PlanError


def verify(program: Program, plan: Plan) -> None:
    """Raise `PlanError` unless `plan` is a correct schedule of `program`."""
    try:
        _Verifier(program, plan).run()
    except PlanError as e:
        raise PlanError(f"{e}\n{grid(plan, e.action, around=8)}", e.action) from None


def happens_before(plan: Plan) -> list[int]:
    """For each action the set of actions that are finished when it starts, as a bit mask (closure)."""
    before: list[int] = []
    last: dict[str, int] = {}
    recorded: dict[int, int] = {}
    for i, action in enumerate(plan.actions):
        mask = 0
        if action.stream in last:
            mask |= before[last[action.stream]] | 1 << last[action.stream]
        if action.kind is ActionKind.WAIT:
            if action.event not in recorded:
                raise PlanError(f"event e{action.event} is waited for before it is recorded", i)
            mask |= before[recorded[action.event]] | 1 << recorded[action.event]
        if action.kind is ActionKind.RECORD:
            if action.event in recorded:
                raise PlanError(f"event e{action.event} is recorded twice", i)
            recorded[action.event] = i
        before.append(mask)
        last[action.stream] = i
    return before


@dataclass(frozen=True, slots=True)
class _Access:
    """`op` touches a storage in `action`, through the copy `root`."""

    op: Operator
    action: int
    root: Instance


class _Verifier:
    def __init__(self, program: Program, plan: Plan) -> None:
        self.program, self.plan = program, plan
        if plan.program != program.digest:
            raise PlanError(f"the plan is for program {plan.program}, not for this one ({program.digest})")
        if plan.micro_batches > 1 and program.unsplittable:
            raise PlanError(f"the program cannot be split: {program.unsplittable}")
        self.before = happens_before(plan)
        self.compute_actions = sum(1 << i for i, s in enumerate(plan.actions) if s.stream == COMPUTE_STREAM)
        self.issued: dict[str, list[int]] = defaultdict(list)
        for i, action in enumerate(plan.actions):
            if action.event < 0:
                self.issued[action.stream].append(i)
        self.order = {o.name: i for i, o in enumerate(program.operators)}
        self.aliases = Counter(v.storage for v in program.values.values())
        self.written = {s for o in program.operators for s in o.writes}
        self.made: dict[Instance, int] = {}  # -1: at entry
        self.allocated: dict[Instance, int] = {}
        self.reads: dict[Instance, list[int]] = defaultdict(list)
        self.freed: dict[Instance, int] = {}
        self.ran: dict[tuple[str, int], int] = {}
        self.root: dict[Instance, Instance] = {}  # the instance that owns the memory
        self.copied: dict[Instance, tuple[int, tuple[Instance, ...]]] = {}  # merged root -> (action, parts)
        self.accesses: dict[tuple[str, int], list[_Access]] = defaultdict(list)  # (storage, micro-batch) ->
        self.buffer: dict[tuple[str, int], Instance] = {}  # value @ micro-batch -> its merge buffer
        self.tracked = tracked_values(program)
        for v in program.inputs:
            if v in self.tracked:
                whole = Instance(v, 0, plan.micro_batches)
                self.made[whole] = -1
                first = next(u for u in program.inputs if self._storage(u) == self._storage(v))
                self.root[whole] = Instance(first, 0, plan.micro_batches)

    def run(self) -> None:
        for i, action in enumerate(self.plan.actions):
            if action.kind in (ActionKind.RUN, ActionKind.REPLACE):
                self._run_step(i, action)
            elif action.kind is ActionKind.SPLIT:
                self._split(i, *action.instances)
            elif action.kind is ActionKind.ALLOC:
                for instance in action.instances:
                    self._alloc(i, instance)
            elif action.kind is ActionKind.MERGE:
                self._merge(i, action.instances[0], action.instances[1:])
            elif action.kind is ActionKind.FREE:
                for instance in action.instances:
                    self._once(i, instance, self.freed, "freed")
                    if instance not in self.made or self.made[instance] < 0:
                        self._fail(i, f"{instance} is freed, but the plan did not make it")
        self._every_operator_ran()
        self._storages_in_order()
        self._states_in_order()
        self._groups_in_order()
        self._outputs_and_lifetimes()

    # -- one action ------------------------------------------------------------------------------------
    def _run_step(self, i: int, action: Action) -> None:
        if not 0 <= action.start < action.stop <= self.plan.micro_batches:
            self._fail(i, f"there are {self.plan.micro_batches} micro-batches only")
        if not action.operators or (action.kind is ActionKind.RUN) != (
            not action.kernel and len(action.operators) == 1
        ):
            self._fail(i, "a run action has one operator and no kernel, a replace action a kernel")
        for name in action.operators:
            if name not in self.program.by_name:
                self._fail(i, f"the program has no operator {name!r}")
            op = self.program.by_name[name]
            if op.context and action.stop - action.start > 1:
                self._fail(i, f"{name} reads per-micro-batch context: one micro-batch at a time")
            for mb in range(action.start, action.stop):
                if (name, mb) in self.ran:
                    self._fail(i, f"{name}@{mb} runs twice (first in action {self.ran[name, mb]})")
                self.ran[name, mb] = i
        inputs, outputs = external_ports(self.program, action.operators)
        roots: dict[str, set[Instance]] = defaultdict(set)
        for v in inputs:
            if v in self.tracked:
                instance = Instance(v, action.start, action.stop)
                self._read(i, instance)
                roots[self._storage(v)].add(self.root[instance])
        if not set(action.into) <= {v for n in action.operators for v in self.program.by_name[n].into}:
            self._fail(i, f"{action.operators[0]} cannot write {', '.join(action.into)} into a given buffer")
        for v in outputs:
            if v in self.tracked:
                instance, seen = Instance(v, action.start, action.stop), roots[self._storage(v)]
                self._once(i, instance, self.made, "produced")
                if len(seen) > 1 and self._storage(v) in self.written:
                    self._fail(i, f"{instance} would alias two copies of {self._storage(v)}")
                self.root[instance] = next(iter(seen)) if len(seen) == 1 else instance
                seen.add(self.root[instance])
                if v in action.into:
                    self._write_into(i, instance)
        self._note_accesses(i, action, roots)

    def _note_accesses(self, i: int, action: Action, roots: dict[str, set[Instance]]) -> None:
        for op in (self.program.by_name[n] for n in action.operators):
            for storage in self._touches(op) & self.written:
                seen = roots[storage] if self._per_micro_batch(storage) else {Instance(storage, 0, 0)}
                if storage in op.writes and len(seen) > 1:
                    self._fail(i, f"{op.name} writes {storage} in place, but sees two copies of it")
                for mb in range(action.start, action.stop):
                    self.accesses[storage, mb] += [_Access(op, i, root) for root in seen]

    def _alloc(self, i: int, whole: Instance) -> None:
        self._once(i, whole, self.allocated, "allocated")
        if self.aliases[self._storage(whole.value)] > 1 or self._storage(whole.value) in self.written:
            self._fail(i, f"{whole.value} has aliases or is written in place: it cannot have a merge buffer")
        for mb in range(whole.start, whole.stop):
            if (other := self.buffer.setdefault((whole.value, mb), whole)) != whole:
                self._fail(i, f"{whole} and {other} are two buffers for {whole.value}@{mb}")

    def _write_into(self, i: int, part: Instance) -> None:
        whole = self.buffer.get((part.value, part.start))
        if whole is None or part.stop > whole.stop or not self._hb(self.allocated[whole], i):
            self._fail(i, f"the buffer for {part} is not allocated before it is written")
        self.reads[whole].append(i)  # its memory is in use
        self.root[part] = whole

    def _split(self, i: int, whole: Instance, view: Instance) -> None:
        inside = whole.value == view.value and whole.start <= view.start < view.stop <= whole.stop
        if not inside or self._axis(view) is None:
            self._fail(i, f"{view} is not a part of {whole}")
        self._read(i, whole)
        self._once(i, view, self.made, "produced")
        self.root[view] = self.root[whole]

    def _merge(self, i: int, whole: Instance, parts: tuple[Instance, ...]) -> None:
        at = whole.start
        for part in parts:
            if part.value != whole.value or part.start != at or part.stop <= part.start or self._axis(part) is None:
                self._fail(i, f"the parts do not tile {whole}")
            at = part.stop
            self._read(i, part)
        if at != whole.stop:
            self._fail(i, f"the parts do not tile {whole}")
        if whole in self.allocated and not self._hb(self.allocated[whole], i):
            self._fail(i, f"the buffer of {whole} is not allocated before the merge")
        self._once(i, whole, self.made, "produced")
        self.root[whole] = whole
        self.copied[whole] = (i, parts)

    def _read(self, i: int, instance: Instance) -> None:
        if instance not in self.made:
            self._fail(i, f"{instance} is read before it is produced")
        if not self._hb(self.made[instance], i):
            self._fail(i, f"{instance} is read without waiting for action {self.made[instance]}")
        if instance in self.freed:
            self._fail(i, f"{instance} is read after it is freed in action {self.freed[instance]}")
        self.reads[instance].append(i)

    # -- the whole plan ------------------------------------------------------------------------------
    def _every_operator_ran(self) -> None:
        for op in self.program.operators:
            for mb in range(self.plan.micro_batches):
                if (op.name, mb) not in self.ran:
                    self._fail(-1, f"{op.name}@{mb} never runs")

    def _storages_in_order(self) -> None:
        """Each access comes after the writes before it (a write: after all accesses before it) and sees them."""
        for (storage, mb), accesses in self.accesses.items():
            accesses.sort(key=lambda a: self.order[a.op.name])
            private = self._per_micro_batch(storage)
            touched = written = 0  # masks of actions
            wrote: dict[Instance, int] = defaultdict(int)  # copy -> mask of the actions that wrote it
            for a in accesses:
                me = 1 << a.action
                missing = (touched if storage in a.op.writes else written) & ~(self.before[a.action] | me)
                if missing:
                    late = missing.bit_length() - 1
                    self._fail(a.action, f"{a.op.name}@{mb} does not wait for action {late}: both access {storage}")
                if private and (unseen := written & ~(self._visible(a.root, mb, wrote) | me)):
                    late = unseen.bit_length() - 1
                    self._fail(a.action, f"{a.op.name}@{mb} does not see what action {late} wrote to {storage}")
                touched |= me
                if storage in a.op.writes:
                    written |= me
                    wrote[a.root] |= me
            if private:
                self._final_contents(storage, mb, written, wrote)

    def _visible(self, root: Instance, mb: int, wrote: dict[Instance, int]) -> int:
        """The actions whose writes are in the copy `root`: its own, and those in its parts when it was merged."""
        mask = wrote[root]
        if root in self.copied:
            action, parts = self.copied[root]
            part = next((p for p in parts if p.start <= mb < p.stop), None)
            if part is not None:
                mask |= self._visible(self.root[part], mb, wrote) & self.before[action]
        return mask

    def _final_contents(self, storage: str, mb: int, written: int, wrote: dict[Instance, int]) -> None:
        """Outputs, and arguments that the caller sees changed, hold all that was written."""
        for v in dict.fromkeys((*self.program.inputs, *self.program.outputs)):
            instance = Instance(v, 0, self.plan.micro_batches)
            if self._storage(v) != storage or instance not in self.root:
                continue
            if unseen := written & ~self._visible(self.root[instance], mb, wrote):
                self._fail(unseen.bit_length() - 1, f"this write to {storage} is not in {instance}")

    def _states_in_order(self) -> None:
        """Between micro-batches in `depends`: the later one's accesses come after the earlier one's writes."""
        for (state, mb), accesses in self.accesses.items():
            if self._per_micro_batch(state):
                continue
            for earlier in (a for a, later in self.plan.depends if later == mb):
                writes = sum({1 << a.action for a in self.accesses[state, earlier] if state in a.op.writes})
                for a in accesses:
                    if missing := writes & ~(self.before[a.action] | 1 << a.action):
                        late = missing.bit_length() - 1
                        self._fail(a.action, f"{a.op.name}@{mb} does not wait for action {late}, which writes {state}")

    def _groups_in_order(self) -> None:
        last: dict[str, int] = {}
        for i, action in enumerate(self.plan.actions):
            for group in {self.program.by_name[n].group for n in action.operators} - {""}:
                if group in last and not self._hb(last[group], i):
                    self._fail(i, f"collectives of group {group!r} are not ordered (after action {last[group]})")
                last[group] = i

    def _outputs_and_lifetimes(self) -> None:
        actions = self.plan.actions
        end = max((i for i, s in enumerate(actions) if s.stream == COMPUTE_STREAM), default=-1)
        joined = self.before[end] | 1 << end if end >= 0 else 0
        for i, action in enumerate(actions):
            if action.kind in (ActionKind.RECORD, ActionKind.WAIT):
                continue
            if not joined >> i & 1:
                self._fail(i, f"stream {action.stream!r} is not joined: this action may run after the plan returns")
            if not self._hb(-1, i):
                self._fail(i, f"stream {action.stream!r} is not forked: this action may run before the plan starts")
        keep = set()
        for v in self.program.outputs:
            if v in self.tracked:
                whole = Instance(v, 0, self.plan.micro_batches)
                if self._axis(whole) is None:
                    whole = next((i for i in self.made if i.value == v and i.start == 0), whole)
                if whole not in self.made or whole in self.freed:
                    self._fail(self.freed.get(whole, -1), f"output {v} is not there when the plan returns")
                keep.add(whole)
        memory: dict[Instance, list[Instance]] = defaultdict(list)  # root -> what shares its memory
        for instance, made in self.made.items():
            if instance in self.freed:
                self._check_free(self.freed[instance], instance)
            elif made >= 0 and instance not in keep:
                self._fail(made, f"{instance} is never freed")
            memory[self.root[instance]].append(instance)
        for root, sharers in memory.items():
            if all(instance in self.freed for instance in sharers):
                self._check_reuse(root, sharers)
        for instance, at in self.allocated.items():
            if instance not in self.made:
                self._fail(at, f"the buffer {instance} is never merged")

    def _check_free(self, free: int, instance: Instance) -> None:
        for user in (*self.reads[instance], self.made[instance]):
            if not self._hb(user, free):
                self._fail(free, f"{instance} is freed while action {user} may still use it")

    def _check_reuse(self, root: Instance, sharers: list[Instance]) -> None:
        free = max(self.freed[i] for i in sharers)
        for instance in sharers:
            self._check_free(free, instance)
        stream = self.plan.actions[self.allocated.get(root, self.made[root])].stream
        k = bisect_right(self.issued[stream], free)
        if k < len(self.issued[stream]) and not self._hb(free, self.issued[stream][k]):
            self._fail(free, f"{root} is freed, but stream {stream!r} may reuse its memory too early")

    # -- small predicates ----------------------------------------------------------------------------
    def _hb(self, a: int, b: int) -> bool:
        """Action a is finished when action b starts. Entry (-1) is on the compute stream, before its first action."""
        if a >= 0:
            return bool(self.before[b] >> a & 1)
        return self.plan.actions[b].stream == COMPUTE_STREAM or bool(self.before[b] & self.compute_actions)

    def _per_micro_batch(self, storage: str) -> bool:
        return storage in self.program.values and self.program.values[storage].scope is not Scope.SHARED

    def _touches(self, op: Operator) -> set[str]:
        return {self.program.values[v].storage for v in op.inputs} | {*op.reads, *op.writes}

    def _storage(self, value: str) -> str:
        return self.program.values[value].storage

    def _axis(self, instance: Instance) -> int | None:
        return self.program.values[instance.value].axis

    def _once(self, i: int, instance: Instance, book: dict[Instance, int], verb: str) -> None:
        if instance in book:
            self._fail(i, f"{instance} is {verb} twice (first in action {book[instance]})")
        book[instance] = i

    def _fail(self, action: int, why: str) -> NoReturn:
        raise PlanError(f"action {action}: {why}" if action >= 0 else why, action)
