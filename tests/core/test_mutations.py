"""Every small mutation of every golden plan: rejected by the verifier, or shown to compute the same.

A mutant that `verify` accepts is one of
- harmless: the same work actions with the same happens-before closure as the golden plan, where work actions
  are all but RECORD and WAIT, and the closure includes the entry and the return of the plan;
- another valid schedule: the same work actions, and every two of them that *conflict* (both touch one
  instance, buffer or collective group, at least one of them changes it) are in the same order as in the
  golden plan. Such plans compute the same values in any interleaving. As a second opinion, some of them are
  run on real threads with random delays and compared bitwise.
Anything else fails the test. Nothing here uses the verifier's own order or bookkeeping.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from golden_plans import CASES, golden_file
from plan_order import END, ENTRY, EVENTS, Closure, closure, identities
from support import arguments, example, replaced

from dynaflow_serving.capture.examples import HIDDEN
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.parse import parse_plan, parse_program
from dynaflow_serving.core.plan import Action, ActionKind, Plan
from dynaflow_serving.core.program import Program
from dynaflow_serving.errors import PlanError
from dynaflow_serving.executor import Executor
from dynaflow_serving.executor.cpu import CPUExecutor
from dynaflow_serving.executor.sequential import SequentialExecutor
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.session.plan_cache import no_context


def mutants(plan: Plan) -> Iterator[tuple[str, Plan]]:
    actions = list(plan.actions)
    for i, action in enumerate(actions):
        yield f"omit {action.kind}", replaced(plan, actions[:i] + actions[i + 1 :])
        yield f"duplicate {action.kind}", replaced(plan, [*actions[: i + 1], *actions[i:]])
        for stream in {*plan.streams, "other"} - {action.stream}:
            moved = dataclasses.replace(action, stream=stream)
            yield f"move {action.kind} to another stream", replaced(plan, [*actions[:i], moved, *actions[i + 1 :]])
        if action.kind is ActionKind.FREE:
            for j in range(i):
                yield "free earlier", replaced(plan, [*actions[:j], action, *actions[j:i], *actions[i + 1 :]])
        if i and actions[i - 1].kind is not action.kind:
            yield "swap neighbours", replaced(plan, [*actions[: i - 1], action, actions[i - 1], *actions[i + 1 :]])


def touches(program: Program, action: Action) -> tuple[set[object], set[object]]:
    """(read, changed): instances, merge buffers and collective groups."""
    if action.kind in (ActionKind.RUN, ActionKind.REPLACE):
        (op,) = (program.by_name[n] for n in action.operators)
        assert not op.writes and not op.reads, "the examples write nothing in place"
        reads = {(v, action.start, action.stop) for v in op.inputs}
        changes: set[object] = {(v, action.start, action.stop) for v in op.outputs}
        if op.group:
            changes.add(("group", op.group))
        return {*reads, *(("buffer", v) for v in action.into)}, changes
    ids = [(i.value, i.start, i.stop) for i in action.instances]
    if action.kind is ActionKind.SPLIT:
        return {ids[0]}, {ids[1]}
    if action.kind is ActionKind.MERGE:
        return {*ids[1:]}, {ids[0], ("buffer", ids[0][0])}
    if action.kind is ActionKind.ALLOC:
        return set(), {*ids, *(("buffer", v) for v, _, _ in ids)}
    return set(), set(ids)


def conflicts(program: Program, golden: Plan) -> Closure:
    """Ordered pairs of the golden plan that every equivalent plan must keep."""
    ids = identities(golden)
    parts = {me: touches(program, s) for s, me in zip(golden.actions, ids, strict=True) if me is not None}
    kept: Closure = set()
    for a, b in closure(golden):
        if a is ENTRY or b is END:
            kept.add((a, b))  # nothing starts before the caller or ends after the return
        else:
            (ra, wa), (rb, wb) = parts[a], parts[b]
            if wa & wb or wa & rb or ra & wb:
                kept.add((a, b))
    return kept


def same_memory_order(golden: Plan, mutant: Plan, order: Closure) -> bool:
    """A FREE that changed streams: what the allocating stream issues later must come after it."""
    where = {me: s.stream for s, me in zip(golden.actions, identities(golden), strict=True) if me is not None}
    ids = identities(mutant)
    for i, (action, me) in enumerate(zip(mutant.actions, ids, strict=True)):
        if action.kind is ActionKind.FREE and action.stream != where[me]:
            for later, other in zip(mutant.actions[i + 1 :], ids[i + 1 :], strict=True):
                if other is not None and later.stream == where[me] and (me, other) not in order:
                    return False
    return True


def delayed(capture: CapturedProgram, rng: random.Random) -> CapturedProgram:
    """The operators of `capture`, each after a random pause, so that a missing wait shows."""

    def slow(fn: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            time.sleep(rng.choice((0, 0, 2e-4, 1e-3)))
            return fn(*args)

        return call

    functions = {name: slow(fn) for name, fn in capture.functions.items()}
    into = {name: slow(fn) for name, fn in capture.into.items()}
    return dataclasses.replace(capture, functions=functions, into=into)


def run(executor: Executor, capture: CapturedProgram, plan: Plan) -> list[torch.Tensor]:
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1))
    inputs = {"x": x}
    names = capture.program.inputs[: len(capture.program.inputs) - len(capture.constants)]
    bounds = {1: [0, 9], 2: [0, 2, 9], 3: [0, 2, 5, 9]}[plan.micro_batches]
    with torch.no_grad():
        return executor.bind(capture, plan, {})(arguments(names, inputs, 9), bounds, no_context)


@pytest.mark.parametrize(("model", "strategy", "micro_batches"), CASES)
def test_mutants(model: str, strategy: str, micro_batches: int, report: Callable[[str], None]) -> None:
    text = golden_file(model, strategy, micro_batches).read_text()
    program, plan = parse_program(text), parse_plan(text)
    assert len(set(identities(plan)) - {None}) == sum(s.kind not in EVENTS for s in plan.actions)
    verify(program, plan)  # the plan itself is never rejected
    golden_closure, must = closure(plan), conflicts(program, plan)
    work = Counter(identities(plan))
    count: Counter[str] = Counter()
    valid: list[Plan] = []
    for what, mutant in mutants(plan):
        count["all"] += 1
        try:
            verify(program, mutant)
        except PlanError:
            count["rejected"] += 1
            continue
        ids = identities(mutant)
        assert Counter(i for i in ids if i) == Counter({i: n for i, n in work.items() if i}), what
        order = closure(mutant)
        if order == golden_closure and same_memory_order(plan, mutant, order):
            count["harmless"] += 1
            continue
        lost = must - order
        assert not lost, f"{what} is accepted, but loses {next(iter(lost))}:\n{mutant.to_text()}"
        assert same_memory_order(plan, mutant, order), f"{what} is accepted, but frees on the wrong stream"
        count["another valid order"] += 1
        valid.append(mutant)
    rng = random.Random(0)
    chosen = rng.sample(valid, min(8, len(valid)))
    capture = example(model)
    executor = CPUExecutor()
    expected = run(SequentialExecutor(), capture, plan)
    try:
        for mutant in chosen:
            for _ in range(2):
                found = run(executor, delayed(capture, rng), mutant)
                assert all(map(torch.equal, found, expected))
    finally:
        executor.close()
    report(
        f"mutants of {model}.{strategy} x{micro_batches}: {count['all']}: rejected {count['rejected']}, harmless "
        f"{count['harmless']}, another valid order {count['another valid order']} ({len(chosen)} run on threads)"
    )


def test_the_proof_can_fail() -> None:
    """Without a wait the closure loses a conflict: the classes above are not empty talk."""
    text = golden_file("llama", "nanoflow", 2).read_text()
    program, plan = parse_program(text), parse_plan(text)
    i = next(i for i, s in enumerate(plan.actions) if s.kind is ActionKind.WAIT)
    assert conflicts(program, plan) - closure(replaced(plan, [*plan.actions[:i], *plan.actions[i + 1 :]]))
