"""`assert_valid`: what a test of a strategy should ask, in one call.

Contract
- Splits: `split` is tried on typical and on random batches. It must make at most `max_micro_batches`, tile the batch
  and name every dependence.
- Plans: the embedded examples are scheduled for every number of micro-batches that an engine can ask for. Each plan is
  lowered and verified.
- Sums over tokens: so is a Program with a loss and a weight's gradient, which are merged by addition and never cut.
- Results: each plan runs on small inputs, with the executor that fills freed memory with NaN. Its result must be close
  to the un-split one: `RTOL` and `ATOL`, since a micro-batch of another size may take another matmul kernel.
- Everything runs on a CPU. The examples have marks of their own, so the strategy's `annotations` are not applied.
"""

from __future__ import annotations

import random
from functools import cache

import torch

from dynaflow_serving.capture.examples import EXAMPLES, HIDDEN, example_capture, loss_capture
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.executor.sequential import SequentialExecutor
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.strategies import build_strategy
from dynaflow_serving.strategies.sequential import Sequential
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.probes import PROBES, split_fault
from dynaflow_serving.strategy.splitting import cut_evenly

RTOL, ATOL = 1e-4, 1e-5  # in float32
RANDOM_BATCHES = 200


def assert_valid(strategy: OpScheduler | str, examples: tuple[str, ...] = (*EXAMPLES, "loss")) -> None:
    """Check the splits, the plans and the results of a strategy.

    Args:
        strategy: a strategy, or what a config calls it: its name, or the path of the file that registers it.
        examples: the embedded examples to schedule; `loss` is the Program with sums over tokens.

    Raises:
        AssertionError: something is wrong. The message names the batch, or the example and the micro-batches.
    """
    if isinstance(strategy, str):
        strategy = build_strategy(strategy, {})
    _assert_splits(strategy)
    for example in examples:
        for micro_batches in range(1 if strategy.schedules_unsplit else 2, strategy.max_micro_batches + 1):
            _assert_plan(strategy, example, micro_batches)


def _assert_splits(strategy: OpScheduler) -> None:
    draw = random.Random(0)
    batches = [*PROBES.items(), *((f"random batch {i}", _random_batch(draw)) for i in range(RANDOM_BATCHES))]
    for kind, batch in batches:
        try:
            fault = split_fault(batch, strategy.split(batch), strategy.max_micro_batches)
        except Exception as e:
            raise AssertionError(f"split() of {strategy.name!r} failed ({kind}, {batch}): {e!r}") from e
        if fault:
            raise AssertionError(f"strategy {strategy.name!r} splits wrongly ({kind}, {batch}): {fault}")


def _random_batch(draw: random.Random) -> Batch:
    """Return a batch of decode and prefill requests, some of which share KV blocks; the context may be unknown."""
    requests = draw.randint(1, 12)
    tokens = tuple(draw.choice((1, 1, 2, 7, 100, 5000)) for _ in range(requests))
    context = tuple(draw.choice((0, 1, 300)) for _ in range(requests)) if draw.random() < 0.7 else ()
    pairs = [tuple(draw.sample(range(requests), 2)) for _ in range(draw.randint(0, 2))] if requests > 1 else []
    return Batch(tokens, context, tuple((writer, reader) for writer, reader in pairs))


def _assert_plan(strategy: OpScheduler, example: str, micro_batches: int) -> None:
    """Schedule an example, verify the plan, run it, and compare its result with the un-split one."""
    captured = _captured(example)
    batch = Batch(tuple(range(2, 2 + micro_batches)))
    split = cut_evenly(batch, micro_batches)
    where = f"strategy {strategy.name!r}, example {example!r}, {micro_batches} micro-batches"
    try:
        result = _run(strategy, captured, split)
        expected = _run(Sequential(), captured, cut_evenly(batch, 1))
    except Exception as e:
        raise AssertionError(f"{where}: {type(e).__name__}: {e}") from e
    try:
        torch.testing.assert_close(result, expected, rtol=RTOL, atol=ATOL)
    except AssertionError as e:
        raise AssertionError(f"{where}: the result differs from the un-split one: {e}") from e


def _run(strategy: OpScheduler, captured: CapturedProgram, split: Split) -> list[torch.Tensor]:
    """Run `captured` under the plan that `strategy` makes for the micro-batches of `split`."""
    schedule = strategy.record(captured.program, len(split.micro_batches), split.depends)
    plan = lower(schedule, strategy.name)
    verify(captured.program, plan)
    bound = SequentialExecutor().bind(captured, plan, schedule.kernels)
    tokens = split.bounds[-1]
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(0))
    taken = captured.program.inputs[: len(captured.program.inputs) - len(captured.constants)]
    with torch.no_grad():
        return bound([x if value == "x" else tokens for value in taken], split.bounds, lambda _: None)


@cache
def _captured(example: str) -> CapturedProgram:
    return loss_capture() if example == "loss" else example_capture(example)
