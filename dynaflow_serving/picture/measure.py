"""A plan on this machine: measured, and predicted from the times of its operators.

Contract
- The plan, the micro-batches in turn and the un-split step take turns, after a round that is not counted. So a
  disturbance of the machine meets all three.
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
    """Measure a plan beside the same micro-batches in turn and beside the un-split step.

    Args:
        plan_cache: Makes the plan.
        split: The cut of the batch.
        args: The Program's inputs without its constants.
        enter: Enters the context of a micro-batch.
        runs: How often each of the three is run.

    Raises:
        ScheduleError, PlanError: As `PlanCache.prepare` raises them.
    """
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
                timeline = cache.timeline(signature)
                assert timeline is not None
                found.append(timeline)
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
    """Return the inputs of an embedded example: random numbers, [tokens, width], and the number of tokens.

    Args:
        program: The example's Program.
        constants: The number of its inputs that are constants, the last ones.
        tokens: The number of tokens.
        width: The elements of a token.
    """
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    taken = program.inputs[: len(program.inputs) - constants]
    return [tokens if program.values[name].scope is Scope.TOKENS else x for name in taken]
