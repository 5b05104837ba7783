"""`agree` checks that all ranks of a process group hold the same plans, before the first collective of a plan.

Contract
- Ranks with different plans would wait for each other's collectives for ever, or mix up their data.
- Plans are compared as text. If they differ, every rank raises, with the difference between rank 0's plans and the
  first other rank's.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from torch import fx

from dynaflow_serving.capture.fx.matching import calls
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.kernels.collectives import process_group
from dynaflow_serving.session.ranks import Ranks

SHOWN_LINES = 40


def agree(texts: list[str], group: Any) -> None:
    """Compare `texts` over all ranks of `group`, a `ProcessGroup` for CPU objects, or None for one rank.

    Raises:
        InactiveError: The texts differ.
    """
    if found := differences(Ranks(group).gather("\n".join(texts))):
        raise InactiveError("the ranks would run different plans:\n" + found)


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
