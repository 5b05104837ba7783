"""`agree` checks that all ranks of a process group hold the same plans, before the first collective of a plan.

Contract
- Ranks with different plans would wait for each other's collectives for ever, or mix up their data.
- Plans are compared as text. If they differ, every rank raises, with the difference between rank 0's plans and the
  first other rank's.
- `problem_of` also finds what keeps a rank from having plans at all, and no rank waits for one that has none.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from torch import fx

from dynaflow_serving.capture.fx.matching import calls
from dynaflow_serving.errors import DynaflowError, InactiveError
from dynaflow_serving.kernels.collectives import process_group
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.session.ranks import Ranks

SHOWN_LINES = 40


def agree(texts: list[str], group: Any) -> None:
    """Compare `texts` over all ranks of `group`, a `ProcessGroup` for CPU objects, or None for one rank.

    Raises:
        InactiveError: The texts differ.
    """
    if found := differences(Ranks(group).gather("\n".join(texts))):
        raise InactiveError("the ranks would run different plans:\n" + found)


def problem_of(
    plan_caches: Sequence[PlanCache], micro_batches: int, group: Any, known: str = ""
) -> DynaflowError | None:
    """Return what keeps an engine's programs from being run by plans, on this rank or between the ranks, if anything.

    All ranks hear of a problem of any, so they decide alike.

    Args:
        plan_caches: The plans of each program.
        micro_batches: A step has so many at most.
        group: As for `agree`.
        known: What this rank knows already to keep it from running plans.
    """
    problem: DynaflowError | None = None
    try:
        texts = [known] if known else _texts(plan_caches, micro_batches)
    except DynaflowError as error:
        problem, texts = error, [f"no plan: {error}"]
    try:
        agree(texts, group)
    except InactiveError as error:
        return problem or error
    return problem


def _texts(plan_caches: Sequence[PlanCache], micro_batches: int) -> list[str]:
    """Return the plans of each program as text.

    Raises:
        InactiveError: There is no program, or one cannot be split.
        PlanError, ScheduleError: The strategy makes no correct plan.
    """
    if not plan_caches:
        raise InactiveError(
            "DynaFlow was requested, but the engine compiled no graph of this model: it has no torch.compile support "
            "in the engine, or warm-up was skipped; remove the dynaflow option for this model"
        )
    texts = [plan_cache.texts() for plan_cache in plan_caches]
    for plan_cache in plan_caches:
        if (reason := plan_cache.captured.program.unsplittable) and micro_batches > 1:
            raise InactiveError(f"this model cannot be split: {reason}")
    return texts


def differences(texts: Sequence[str]) -> str:
    """Return the diff between rank 0's text and the first text that differs, or "" if all are equal."""
    for rank, other in enumerate(texts):
        if other != texts[0]:
            lines = difflib.unified_diff(texts[0].splitlines(), other.splitlines(), "rank 0", f"rank {rank}", n=2)
            return "\n".join(list(lines)[:SHOWN_LINES])
    return ""


def groups_of(gm: fx.GraphModule) -> list[Any]:
    """Return the process groups of the functional collectives in `gm`, in order of first use."""
    names: dict[str, None] = {}
    for n in calls(gm):
        schema = getattr(n.target, "_schema", None)
        if schema is None or not schema.name.startswith("_c10d_functional::"):
            continue
        for i, argument in enumerate(schema.arguments):
            if argument.name == "group_name":
                names[str(n.kwargs.get("group_name", n.args[i] if i < len(n.args) else ""))] = None
    return [process_group(name) for name in names]
