"""Random Programs, built in the IR, with random schedules and plans.

The Programs write storages in place (through aliases too), read and write engine states, and have
collective groups, operators with context, and sums over tokens. Lowering may refuse a schedule, with a `ScheduleError`.
"""

from __future__ import annotations

import random

from dynaflow_serving.core.plan import Plan
from dynaflow_serving.core.program import Operator, Program, Resource, Scope, Value
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.strategy.schedule import Schedule

MERGED = (Scope.BATCH, Scope.PARTIAL)


def random_program(rng: random.Random, size: int) -> Program:
    values = {"n": Value("n", Scope.TOKENS), "w": Value("w", Scope.SHARED)}
    for i in range(rng.randint(1, 3)):
        values[f"x{i}"] = Value(f"x{i}", Scope.BATCH, rng.choice((0, 1)))
    inputs = tuple(values)
    operators: list[Operator] = []
    for i in range(size):
        readable = [v for v in values.values() if v.scope is not Scope.TOKENS or rng.random() < 0.5]
        used = rng.sample(readable, min(len(readable), rng.randint(1, 3)))
        outputs = []
        for j in range(rng.randint(0 if i else 1, 2)):
            scope = rng.choices((Scope.BATCH, Scope.PARTIAL, Scope.LOCAL, Scope.SHARED), (16, 4, 2, 2))[0]
            sources = [v.storage for v in used if v.scope is scope and scope in MERGED and rng.random() < 0.3]
            axis = rng.choice((0, 1)) if scope is Scope.BATCH else None
            mean = scope is Scope.PARTIAL and rng.random() < 0.5
            outputs.append(Value(f"v{i}_{j}", scope, axis, storage=next(iter(sources), ""), mean=mean))
        values.update({v.name: v for v in outputs})
        writes = [v.storage for v in used if v.scope in MERGED and rng.random() < 0.25]
        states = [s for s in ("cache0", "cache1") if rng.random() < 0.15]
        own = [v.name for v in outputs if v.scope in MERGED and v.storage == v.name]
        operators.append(
            Operator(
                f"op{i}",
                rng.choice(list(Resource)),
                tuple(v.name for v in used),
                tuple(v.name for v in outputs),
                tags=("t",) * rng.randint(0, 1),
                writes=tuple(dict.fromkeys(writes + states[:1])),
                reads=tuple(states[1:]),
                group=rng.choice(("", "", "", "tp", "ep")),
                context=rng.random() < 0.1,
                into=tuple(v for v in own if rng.random() < 0.5),
            )
        )
    produced = [v for v in values.values() if v.scope in MERGED]
    outputs_of = rng.sample(produced, min(len(produced), rng.randint(1, 3)))
    return Program(inputs, tuple(v.name for v in outputs_of), values, tuple(operators))


def random_schedule(
    rng: random.Random, program: Program, micro_batches: int, depends: list[tuple[int, int]]
) -> Schedule:
    s = Schedule(program, micro_batches, depends)
    while ready := s.get_ready_ops():
        task = rng.choice(ready)
        stream = rng.choice(("compute", "network", "memory"))
        group = [task]
        while rng.random() < 0.3:
            group += [t for t in ready if t.name == task.name and t.micro_batch == group[-1].micro_batch + 1]
        try:
            s.execute(group, stream)
        except ScheduleError:
            s.execute(task, stream)
    if s.unfinished:
        raise ScheduleError("micro-batches wait for one another")
    return s


def random_plan(rng: random.Random, size: int, micro_batches: int) -> tuple[Program, Plan] | None:
    """A random program and a plan of it; None where the schedule cannot be lowered."""
    program = random_program(rng, size)
    try:
        return program, lower(random_schedule(rng, program, micro_batches, []), "random")
    except ScheduleError:
        return None
