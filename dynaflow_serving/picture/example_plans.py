"""The plans that a config's strategy makes of the embedded examples, for `dynaflow check`.

Contract
- Each plan is recorded, lowered and verified as in an engine, for each number of micro-batches that the strategy can be
  asked for.
- A strategy that fails ends nothing: its entry holds the error, and the next entry follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dynaflow_serving.capture.examples import EXAMPLES, example_capture
from dynaflow_serving.config import Config
from dynaflow_serving.core.plan import ActionKind, Plan
from dynaflow_serving.core.program import Program
from dynaflow_serving.errors import ConfigError, DynaflowError
from dynaflow_serving.kernels import kernels_of
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.strategies import build_strategy
from dynaflow_serving.strategy.base import OpScheduler, SplitOptions
from dynaflow_serving.strategy.probes import PROBES
from dynaflow_serving.strategy.selector import Selector

MICRO_BATCHES = (2, 3, 4)


@dataclass(frozen=True)
class ExamplePlan:
    """The result of a strategy on one example: a verified plan, or the error that kept it from one."""

    example: str
    strategy: str
    micro_batches: int
    plan: Plan | None
    error: DynaflowError | None
    missing: str
    """What the strategy looks for and the example lacks, as a sentence; "" if nothing."""


def plans_of_examples(config: Config) -> Iterator[ExamplePlan]:
    """Yield an entry for each example, and in it for each variant of the config's strategy."""
    selector = build_selector(config)
    variants = _variants(selector, config)
    for example in EXAMPLES:
        program = example_capture(example, selector.annotations).program
        for strategy, micro_batches in variants:
            plan, error = None, None
            try:
                plan = _verified_plan(strategy, program, micro_batches)
            except DynaflowError as e:
                error = e
            yield ExamplePlan(
                example=example,
                strategy=strategy.name,
                micro_batches=micro_batches,
                plan=plan,
                error=error,
                missing=strategy.missing_tags([program]),
            )


def _verified_plan(strategy: OpScheduler, program: Program, micro_batches: int) -> Plan:
    schedule = strategy.record(program, micro_batches)
    plan = lower(schedule, strategy.name)
    verify(program, plan)
    kernels_of(plan, schedule.kernels)  # raises for a kernel that there is not
    return plan


def _variants(selector: Selector, config: Config) -> list[tuple[OpScheduler, int]]:
    """Return the strategies to try, each with its number of micro-batches.

    These are the candidates of a strategy that chooses among several. Else they are the strategy with each number of
    `MICRO_BATCHES`. Without such an option, the number is the one that the strategy splits a large batch into.
    """
    each = [selector.strategy(candidate) for candidate in selector.candidates]
    if len(each) > 1:
        return [(strategy, strategy.max_micro_batches) for strategy in each]
    found: dict[int, OpScheduler] = {}
    numbers = MICRO_BATCHES if isinstance(selector.options, SplitOptions) else (0,)
    for n in numbers:
        options = config.options | ({"micro_batches": n} if n else {})
        try:
            strategy = build_strategy(config.strategy, options)
            split = strategy.split(PROBES["huge"])
        except ConfigError:  # a number that its options do not allow
            continue
        found.setdefault(len(split.micro_batches), strategy)
    return [(strategy, n) for n, strategy in found.items()]


def describe(program: Program, plan: Plan) -> str:
    """Return `strategy nanoflow, 13 operators x 2 micro-batches, 61 actions on compute, network, 8 waits, hash 01`."""
    return (
        f"strategy {plan.strategy}, {len(program.operators)} operators x {plan.micro_batches} micro-batches, "
        f"{len(plan.actions)} actions on {', '.join(plan.streams)}, {waits(plan)} waits, hash {plan.digest}"
    )


def waits(plan: Plan) -> int:
    """Return how often a stream of the plan waits for another."""
    return sum(action.kind is ActionKind.WAIT for action in plan.actions)
