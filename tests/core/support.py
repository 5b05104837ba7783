"""What several test modules share."""

from __future__ import annotations

import dataclasses
import random
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from hypothesis import example as hypothesis_example
from torch import fx, nn

from dynaflow_serving.capture.examples import example_capture, loss_capture
from dynaflow_serving.capture.fx import partition
from dynaflow_serving.capture.fx.symbols import batch_symbols
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.config import load
from dynaflow_serving.core.parse import parse_program
from dynaflow_serving.core.plan import Action, ActionKind, Plan
from dynaflow_serving.core.program import Program
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.rules import Rule
from dynaflow_serving.strategy.schedule import Schedule

# make -> bump (in place, on the network stream, slowly) -> read
IN_PLACE = """
value x batch:0
value y batch:0
value z batch:0
inputs x
op make compute
  inputs x
  outputs y
op bump network
  inputs y
  writes y
op read compute
  inputs y
  outputs z
outputs z
"""
TWO_STREAMS = (("make", 0, "compute"), ("bump", 0, "network"), ("read", 0, "compute"))

# make, then read of its result, and another network operator that neither needs
TWO_NETWORK = """
value x batch:0
value y batch:0
value z batch:0
value a batch:0
inputs x
op make network
  inputs x
  outputs y
op read compute
  inputs y
  outputs z
op other network
  inputs x
  outputs a
outputs z a
"""


@cache
def example(name: str, rules: tuple[Rule, ...] = ()) -> CapturedProgram:
    """An embedded example, captured once for all tests: nothing may be changed in it."""
    return loss_capture() if name == "loss" else example_capture(name, rules)


def fixed_examples(count: int, **ranges: tuple[int, int]) -> Callable[[Any], Any]:
    """Decorate a Hypothesis test with `count` examples that never change: a seed, and a number of each of `ranges`.

    Hypothesis draws from the constants of all loaded modules, so even a derandomized test has other cases after an
    edit anywhere. Where a test counts what its cases reach, these cases alone reach it.
    """

    def decorate(test: Any) -> Any:
        draw = random.Random(0)
        for _ in range(count):
            numbers = {name: draw.randint(*ends) for name, ends in ranges.items()}
            test = hypothesis_example(seed=draw.getrandbits(32), **numbers)(test)
        return test

    return decorate


class AddNorm(nn.Module):
    """Residual add and a scale, element by element: `(x, residual) -> (normed, residual)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = residual + x
        return residual * self.weight, residual


def trace(fn: Callable[..., Any], *examples: torch.Tensor, dim: int = 0) -> fx.GraphModule:
    """The Dynamo graph of `fn`, with dimension `dim` of every example symbolic."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> fx.GraphModule:
        graphs.append(gm)
        return gm

    for example in examples:
        if example.dim() > dim:
            torch._dynamo.mark_dynamic(example, dim)
    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True)(*examples)
    assert len(graphs) == 1
    return graphs[0]


def capture(fn: Callable[..., Any], *examples: torch.Tensor, dim: int = 0, **options: Any) -> CapturedProgram:
    """`fn` as a Program; its inputs are sizes, then tensors, in the graph's order (see `arguments`)."""
    gm = trace(fn, *examples, dim=dim)
    return partition(gm, tokens=batch_symbols(gm, dim), **options)


def arguments(program_inputs: tuple[str, ...], tensors: dict[str, torch.Tensor], tokens: int) -> list[Any]:
    """The values of `program_inputs`: tensors by name, the number of tokens for every other."""
    return [tensors.get(name, tokens) for name in program_inputs]


def program_of(text: str) -> Program:
    """A Program from its text, without the leading line."""
    return parse_program("program\n" + textwrap.dedent(text).strip("\n"))


def manual(program: Program, **functions: Callable[..., Any]) -> CapturedProgram:
    """A CapturedProgram of hand-written operators."""
    return CapturedProgram(program, functions, rebuild=tuple)


def lowered(program: Program, micro_batches: int, *launches: tuple[str, int, str], depends: Any = ()) -> Plan:
    """The verified plan that executes (operator, micro-batch, stream) in this order."""
    schedule = Schedule(program, micro_batches, depends)
    for name, micro_batch, stream in launches:
        (task,) = (t for t in schedule.get_ready_ops(micro_batch) if t.name == name)
        schedule.execute(task, stream)
    assert not schedule.unfinished
    plan = lower(schedule, "manual")
    verify(program, plan)
    return plan


def without(plan: Plan, kind: ActionKind, stream: str) -> Plan:
    """`plan` without the first `kind` action of `stream`: not verified."""
    i = next(i for i, s in enumerate(plan.actions) if s.kind is kind and s.stream == stream)
    return replaced(plan, [*plan.actions[:i], *plan.actions[i + 1 :]])


def replaced(plan: Plan, actions: list[Action]) -> Plan:
    return dataclasses.replace(plan, actions=tuple(actions))


def names(capture: CapturedProgram) -> list[str]:
    return [o.name for o in capture.program.operators]


def built(source: Any) -> OpScheduler:
    """The strategy of a config, or of whatever `load` takes."""
    return build_selector(load(source)).strategy("")
