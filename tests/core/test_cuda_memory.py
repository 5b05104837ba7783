"""The rule that makes per-stream allocation safe without `record_stream`, tested with a model of the caching allocator.

The model knows nothing of the verifier: blocks are per stream, a freed block goes to the next allocation on its stream
at once, in issue order, as in torch's caching allocator. A reuse is a race unless all that used the block before
happens before the step that gets it.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TWO_NETWORK, program_of
from test_mutations import closure
from test_programs import random_plan

from dynaflow_serving.dependencies import external_ports, tracked_values
from dynaflow_serving.errors import PlanError
from dynaflow_serving.executor.lanes import reorder
from dynaflow_serving.ir import Instance, Plan, Program, Step, StepKind
from dynaflow_serving.verify import verify

SEEN: Counter[str] = Counter()


@dataclasses.dataclass(eq=False)
class Block:
    stream: str
    live: set[Instance] = dataclasses.field(default_factory=set)  # instances that hold a reference
    users: list[Step] = dataclasses.field(default_factory=list)
    before: list[Step] = dataclasses.field(default_factory=list)  # who used the memory in its earlier lives


def races(program: Program, plan: Plan) -> list[str]:
    """Every reuse of memory that may come too early, with all blocks of one size (the worst case)."""
    order = closure(plan)
    tracked = tracked_values(program)
    block: dict[Instance, Block] = {}
    parts: dict[tuple[str, int], Instance] = {}  # value @ micro-batch -> merge buffer
    free: dict[str, list[Block]] = defaultdict(list)
    found: list[str] = []

    def new(instance: Instance, step: Step) -> None:
        old = free[step.stream].pop() if free[step.stream] else None
        block[instance] = Block(step.stream, {instance}, [step], old.before + old.users if old else [])
        for user in block[instance].before:
            SEEN["reused"] += 1
            if user.stream != step.stream and (identity(user), identity(step)) not in order:
                found.append(f"{instance} in {step} while {user} may run")

    def use(instance: Instance, step: Step) -> None:
        if instance in block:  # arguments belong to the caller
            block[instance].users.append(step)

    def share(instance: Instance, owner: Instance, step: Step) -> None:
        if owner in block:
            block[owner].live.add(instance)
            block[instance] = block[owner]
            use(instance, step)

    for step in plan.steps:
        if step.kind is StepKind.SPLIT:
            share(step.instances[1], step.instances[0], step)
        elif step.kind is StepKind.ALLOC:
            for whole in step.instances:
                new(whole, step)
                parts.update({(whole.value, mb): whole for mb in range(whole.start, whole.stop)})
        elif step.kind is StepKind.MERGE:
            whole, *used = step.instances
            for part in used:
                use(part, step)
            if whole in block:
                use(whole, step)
            else:
                new(whole, step)
        elif step.kind in (StepKind.RUN, StepKind.REPLACE):
            inputs, outputs = external_ports(program, step.operators)
            given = [Instance(v, step.start, step.stop) for v in inputs if v in tracked]
            for instance in given:
                use(instance, step)
            for v in (v for v in outputs if v in tracked):
                made, storage = Instance(v, step.start, step.stop), program.values[v].storage
                owner = next((i for i in given if program.values[i.value].storage == storage), None)
                if v in step.into:
                    share(made, parts[v, step.start], step)
                elif owner is not None:
                    share(made, owner, step)
                elif storage == v:
                    new(made, step)
        elif step.kind is StepKind.FREE:
            for instance in step.instances:
                if instance in block:
                    owner_block = block.pop(instance)
                    owner_block.live.discard(instance)
                    if not owner_block.live:
                        free[owner_block.stream].append(owner_block)
    return found


def identity(step: Step) -> Step:
    return dataclasses.replace(step, stream="")


@settings(max_examples=120, deadline=None, derandomize=True)
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


def mentioned(program: Program, step: Step) -> set[Instance]:
    if not step.operators:
        return set(step.instances)
    ports = external_ports(program, step.operators)
    return {Instance(v, step.start, step.stop) for side in ports for v in side}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), size=st.integers(2, 8), micro_batches=st.integers(2, 3))
def test_a_free_moved_up_to_the_last_reader_is_rejected_wherever_the_model_sees_a_race(
    seed: int, size: int, micro_batches: int
) -> None:
    rng = random.Random(seed)
    if (planned := random_plan(rng, size, micro_batches)) is None:
        return
    program, plan = planned
    frees = [i for i, s in enumerate(plan.steps) if s.kind is StepKind.FREE]
    if not frees:
        return
    i = frees[-1]  # the join, if anything crosses streams
    step, steps = plan.steps[i], list(plan.steps)
    instance = rng.choice(step.instances)
    last = max(j for j, s in enumerate(plan.steps[:i]) if instance in mentioned(program, s))
    early = dataclasses.replace(step, instances=(instance,), stream=rng.choice((plan.steps[last].stream, step.stream)))
    rest = tuple(x for x in step.instances if x != instance)
    steps[i : i + 1] = [dataclasses.replace(step, instances=rest)] if rest else []
    steps.insert(rng.randint(last + 1, i), early)
    moved = dataclasses.replace(plan, steps=tuple(steps))
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
    plan = Plan.from_text(f"plan hand program={program.digest} micro_batches=1 depends=-\n{text}")
    assert len(races(program, plan)) == 1
    with pytest.raises(PlanError, match="may reuse its memory too early"):
        verify(program, plan)
