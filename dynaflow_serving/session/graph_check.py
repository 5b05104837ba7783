"""`run_checked` runs a captured graph under a plan and whole, and returns the whole's result where they differ.

Contract
- The comparison leaves nothing behind. Inputs that the graph writes in place and gradients are as after the run under
  the plan alone. A graph that draws random numbers is never split.
- The other run is the program in its own order, without replacement kernels, without gradients, and on copies of what
  is written in place.
- If the runs differ, the graph runs once more, whole, from the inputs as they were before the step. That is the result
  for the caller, with gradients.
- A difference is rounding, and no error, if no operator differs on the same inputs, and if the plan's actions give the
  same outputs one after the other, without buffers that are written in place.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from dynaflow_serving.core.batch import Split
from dynaflow_serving.session.check import Check, Comparison, Found, describe_step
from dynaflow_serving.session.difference import difference, tensors
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.session.replay import NO_OPERATOR, copied, find_operator
from dynaflow_serving.session.session import LiveStep

ROUNDING = (
    "but all operators are right by themselves, and one after the other they give what the plan gave: rounding is "
    "carried on, as by a choice between near ties"
)

logger = logging.getLogger("dynaflow_serving")


class _Before:
    """The inputs that a graph finds before it runs."""

    def __init__(self, plan_cache: PlanCache, args: Sequence[Any]) -> None:
        program = plan_cache.captured.program
        self.args = args
        self.written = {
            i: name
            for i, name in enumerate(program.inputs[: len(args)])
            if isinstance(args[i], torch.Tensor) and program.values[name].storage in program.written_storages
        }
        self._copies = copied([args[i] for i in self.written])

    def inputs(self) -> list[Any]:
        """Return the inputs, with new copies of those that are written."""
        found = list(self.args)
        for i, copy in zip(self.written, copied(self._copies), strict=True):
            found[i] = copy
        return found

    def restore(self) -> None:
        """Make the inputs what they were before the run."""
        for i, copy in zip(self.written, self._copies, strict=True):
            self.args[i].data.copy_(copy)  # autograd does not see it: what it would go through is dropped


def run_checked(
    step: LiveStep,
    check: Check,
    plan_cache: PlanCache,
    split: Split,
    args: Sequence[Any],
    zero_copy: bool,
    groups: Sequence[Any],
) -> Any:
    """Run a graph in both ways.

    Args:
        step: The step in flight.
        check: It judges the runs.
        plan_cache: The plans of the graph.
        split: The cut of the batch.
        args: The graph's inputs without constants.
        zero_copy: Whether operators may write into given buffers.
        groups: The process groups of the graph's collectives.

    Returns:
        The graph's result.
    """
    session, tokens = step.session, split.bounds[-1]
    step.to_compare = True
    before = _Before(plan_cache, args)
    result = plan_cache.run(args, split, zero_copy=zero_copy, traced=step.to_trace)
    with check.timed(session.clock):
        kept = [t.detach().clone() for t in tensors(result)]
        inputs = before.inputs()
        with torch.no_grad():
            expected = tensors(plan_cache.run_plain(inputs, tokens))
        names = [f"input {name}, which is written in place," for name in before.written.values()]
        written = [args[i].detach() for i in before.written], [inputs[i] for i in before.written]
        found = difference([*kept, *written[0]], [*expected, *written[1]], check.options.tolerance, names)

        @torch.no_grad()
        def find() -> Found:
            plan = plan_cache.prepare(split.signature, zero_copy).plan
            kernels = plan_cache.kernels(split.signature)
            tolerance = check.options.tolerance
            found = find_operator(plan_cache.captured, plan, kernels, before.inputs(), split.bounds, tolerance)
            alone = plan_cache.run_in_turn(before.inputs(), split)
            same = difference(tensors(alone), kept, tolerance) is None
            return Found("", ROUNDING, rounding=True) if found.text == NO_OPERATOR and same else found

        def facts() -> dict[str, Any]:
            return describe_step(session.selector, step, split, [plan_cache], before.inputs())

        comparison = Comparison(kept, expected, str(found or ""), facts, find)
        equal = session.conclude(step, [plan_cache], split, comparison, groups)
        if equal:
            return result
    before.restore()
    return plan_cache.run_plain(args, tokens, zero_copy)
