"""A plan on this machine: measured, and predicted from the times of its operators.

Contract
- Plan, micro-batches in turn and un-split step run in turn, round after round, after a round that is not counted: what
  disturbs the machine meets all three.
- On a CPU every stream gets one thread, so that streams and not the threads of one operator share the cores.
- Embedded examples have no process group: their network operators are stand-ins, which a picture must say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dynaflow_serving.core.batch import Signature, Split
from dynaflow_serving.core.measurement import in_turn
from dynaflow_serving.core.program import Program, Scope
from dynaflow_serving.core.timeline import Timeline
from dynaflow_serving.picture.comparison import PlanComparison, compare
from dynaflow_serving.session.plan_cache import PlanCache, no_context
from dynaflow_serving.strategies.sequential import Sequential
from dynaflow_serving.strategy.selector import FixedStrategy

RUNS = 11


def measured_and_predicted(
    plan_cache: PlanCache,
    split: Split,
    args: Sequence[Any],
    enter: Callable[[int], Any] = no_context,
    runs: int = RUNS,
) -> PlanComparison:
    """Run `args` (the program's inputs without constants) under the plan of `split`, `runs` times.

    Raises `ScheduleError` and `PlanError`, as `PlanCache.prepare` does."""
    reference = PlanCache(plan_cache.captured, FixedStrategy(Sequential()), plan_cache.executor, plan_cache.zero_copy)
    planned: list[Timeline] = []
    sequential: list[Timeline] = []
    unsplit: list[Timeline] = []
    ways = [
        (plan_cache, split.signature, split.bounds, planned),
        (reference, Signature(len(split.micro_batches), split.depends), split.bounds, sequential),
        (reference, Signature(1), (0, split.bounds[-1]), unsplit),
    ]
    with torch.no_grad(), _one_thread():
        for number in range(1 + runs):
            for cache, signature, bounds, found in in_turn(ways, number):
                cache.prepare(signature, traced=True).run(args, bounds, enter)
                found.append(cache.timeline(signature))
    tokens = tuple(m.tokens[1] - m.tokens[0] for m in split.micro_batches)
    return compare(plan_cache.captured.program, tokens, planned[1:], sequential[1:], unsplit[1:])


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def example_inputs(program: Program, constants: int, tokens: int, width: int) -> list[Any]:
    """Inputs of an embedded example: random numbers, [tokens, width], and the number of tokens."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    taken = program.inputs[: len(program.inputs) - constants]
    return [tokens if program.values[name].scope is Scope.TOKENS else x for name in taken]
