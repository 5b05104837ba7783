"""The rule that makes per-stream allocation safe without `record_stream`, tested with a model of the caching allocator.

The model knows nothing of the verifier: blocks are per stream, a freed block goes to the next allocation on its stream
at once, in issue order, as in torch's caching allocator. A reuse is a race unless all that used the block before
happens before the action that gets it.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_order import closure
from random_programs import random_plan
from support import TWO_NETWORK, fixed_examples, program_of

from dynaflow_serving.core.order import external_ports, tracked_values
from dynaflow_serving.core.parse import parse_plan
from dynaflow_serving.core.plan import Action, ActionKind, Instance, Plan
from dynaflow_serving.core.program import Program
from dynaflow_serving.errors import PlanError
from dynaflow_serving.executor.lanes import reorder
from dynaflow_serving.planning.verify import verify

SEEN: Counter[str] = Counter()


@dataclasses.dataclass(eq=False)
class Block:
    stream: str
    live: set[Instance] = dataclasses.field(default_factory=set)  # instances that hold a reference
    users: list[Action] = dataclasses.field(default_factory=list)
    before: list[Action] = dataclasses.field(default_factory=list)  # who used the memory in its earlier lives


class MemoryModel:
    """The allocator while a plan is issued, with all blocks of one size (the worst case)."""

    def __init__(self, program: Program, plan: Plan) -> None:
        self.program, self.order, self.tracked = program, closure(plan), tracked_values(program)
        self.block: dict[Instance, Block] = {}
        self.parts: dict[tuple[str, int], Instance] = {}  # (value, micro-batch) -> merge buffer
        self.free: dict[str, list[Block]] = defaultdict(list)
        self.races: list[str] = []

    def allocate(self, instance: Instance, action: Action) -> None:
        free = self.free[action.stream]
        old = free.pop() if free else None
        block = Block(action.stream, {instance}, [action], old.before + old.users if old else [])
        self.block[instance] = block
        for user in block.before:
            SEEN["reused"] += 1
            if user.stream != action.stream and (identity(user), identity(action)) not in self.order:
                self.races.append(f"{instance} in {action} while {user} may run")

    def use(self, instance: Instance, action: Action) -> None:
        if instance in self.block:  # arguments belong to the caller
            self.block[instance].users.append(action)

    def share(self, instance: Instance, owner: Instance, action: Action) -> None:
        if owner in self.block:
            self.block[owner].live.add(instance)
            self.block[instance] = self.block[owner]
            self.use(instance, action)

    def release(self, instance: Instance) -> None:
        if instance in self.block:
            block = self.block.pop(instance)
            block.live.discard(instance)
            if not block.live:
                self.free[block.stream].append(block)

    def issue(self, action: Action) -> None:
        if action.kind is ActionKind.SPLIT:
            self.share(action.instances[1], action.instances[0], action)
        elif action.kind is ActionKind.ALLOC:
            for whole in action.instances:
                self.allocate(whole, action)
                self.parts.update({(whole.value, mb): whole for mb in range(whole.start, whole.stop)})
        elif action.kind is ActionKind.MERGE:
            self.merge(action)
        elif action.kind in (ActionKind.RUN, ActionKind.REPLACE):
            self.run(action)
        elif action.kind is ActionKind.FREE:
            for instance in action.instances:
                self.release(instance)

    def merge(self, action: Action) -> None:
        whole, *used = action.instances
        for part in used:
            self.use(part, action)
        if whole in self.block:
            self.use(whole, action)
        else:
            self.allocate(whole, action)

    def run(self, action: Action) -> None:
        inputs, outputs = external_ports(self.program, action.operators)
        given = [Instance(v, action.start, action.stop) for v in inputs if v in self.tracked]
        for instance in given:
            self.use(instance, action)
        values = self.program.values
        for v in (v for v in outputs if v in self.tracked):
            made, storage = Instance(v, action.start, action.stop), values[v].storage
            owner = next((i for i in given if values[i.value].storage == storage), None)
            if v in action.into:
                self.share(made, self.parts[v, action.start], action)
            elif owner is not None:
                self.share(made, owner, action)
            elif storage == v:
                self.allocate(made, action)


def races(program: Program, plan: Plan) -> list[str]:
    """Every reuse of memory that may come too early."""
    model = MemoryModel(program, plan)
    for action in plan.actions:
        model.issue(action)
    return model.races


def identity(action: Action) -> Action:
    return dataclasses.replace(action, stream="")


@fixed_examples(60, size=(2, 16), micro_batches=(1, 4))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), size=st.integers(2, 16), micro_batches=st.integers(1, 4))
def test_no_verified_plan_reuses_memory_too_early(seed: int, size: int, micro_batches: int) -> None:
    """In the order of eager issue and in that of graph capture."""
    rng = random.Random(seed)
    if (planned := random_plan(rng, size, micro_batches)) is None:
        return
    program, plan = planned
    for candidate in (plan, reorder(plan)):
        verify(program, candidate)
        assert races(program, candidate) == []
        SEEN["plans"] += 1


def mentioned(program: Program, action: Action) -> set[Instance]:
    if not action.operators:
        return set(action.instances)
    ports = external_ports(program, action.operators)
    return {Instance(v, action.start, action.stop) for side in ports for v in side}


@fixed_examples(300, size=(2, 8), micro_batches=(2, 3))
@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), size=st.integers(2, 8), micro_batches=st.integers(2, 3))
def test_a_free_moved_up_to_the_last_reader_is_rejected_wherever_the_model_sees_a_race(
    seed: int, size: int, micro_batches: int
) -> None:
    rng = random.Random(seed)
    if (planned := random_plan(rng, size, micro_batches)) is None:
        return
    program, plan = planned
    frees = [i for i, s in enumerate(plan.actions) if s.kind is ActionKind.FREE]
    if not frees:
        return
    i = frees[-1]  # the join, if anything crosses streams
    action, actions = plan.actions[i], list(plan.actions)
    instance = rng.choice(action.instances)
    last = max(j for j, s in enumerate(plan.actions[:i]) if instance in mentioned(program, s))
    early = dataclasses.replace(
        action, instances=(instance,), stream=rng.choice((plan.actions[last].stream, action.stream))
    )
    rest = tuple(x for x in action.instances if x != instance)
    actions[i : i + 1] = [dataclasses.replace(action, instances=rest)] if rest else []
    actions.insert(rng.randint(last + 1, i), early)
    moved = dataclasses.replace(plan, actions=tuple(actions))
    try:
        verify(program, moved)
    except PlanError:
        SEEN["rejected"] += 1
        SEEN["races caught"] += bool(races(program, moved))
    else:
        SEEN["accepted"] += 1
        assert races(program, moved) == []


def test_the_cases_reach_what_they_are_for(report: pytest.FixtureRequest) -> None:
    report("memory reuse: " + ", ".join(f"{k} {v}" for k, v in sorted(SEEN.items())))
    if SEEN["plans"] > 100:
        assert all(SEEN[k] > 5 for k in ("reused", "rejected", "accepted", "races caught"))


def test_the_model_sees_a_race() -> None:
    program = program_of(TWO_NETWORK)
    text = """
        compute | record e0
        network | wait e0
        network | run make @0
        network | record e1
        compute | wait e1
        compute | run read @0
        compute | free y@0
        network | run other @0
        network | record e2
        compute | wait e2
    """
    plan = parse_plan(f"plan hand program={program.digest} micro_batches=1 depends=-\n{text}")
    assert len(races(program, plan)) == 1
    with pytest.raises(PlanError, match="may reuse its memory too early"):
        verify(program, plan)
