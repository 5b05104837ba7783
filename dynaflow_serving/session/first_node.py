"""`first_node` looks into an operator: it names the call whose value differs for a part of the batch.

Contract
- The operator's graph runs for a part and for the whole, one node after the other, so a difference shows at its cause.
- A value of both runs may differ in one dimension's size, in proportion to the tokens: that is the token axis. Other
  values are compared as they are, or not at all where their shapes do not fit.
- The graph has no collective and writes none of its inputs, so that one rank alone can run it once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dynaflow_serving.session.difference import local, relative_difference, tolerance_of


def first_node(
    graph: fx.GraphModule, part: Sequence[Any], whole: Sequence[Any], tokens: range, total: int, tolerance: float | None
) -> str:
    """Return the name of the first node whose value differs, or "".

    Args:
        graph: The operator.
        part: Its inputs for a part of the batch.
        whole: Its inputs for the whole batch.
        tokens: The tokens of the part.
        total: The number of tokens of the batch.
        tolerance: The relative difference that is allowed; None for that of the dtype.
    """
    runs = fx.Interpreter(graph), fx.Interpreter(graph)
    for run, inputs in zip(runs, (part, whole), strict=True):
        run.args_iter = iter(inputs)
    for node in graph.graph.nodes:
        if node.op == "output":
            break
        for run in runs:
            run.env[node] = run.run_node(node)
        a, b = (local(run.env[node]) for run in runs)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            b = _same_part(a, b, tokens, total)
            if b is not None and relative_difference(a, b) > tolerance_of(b, tolerance):
                return str(node.name)
        for run in runs:
            for dead in run.user_to_last_uses.get(node, ()):
                del run.env[dead]
    return ""


def _same_part(part: torch.Tensor, whole: torch.Tensor, tokens: range, total: int) -> torch.Tensor | None:
    """Return what corresponds to `part` in `whole`, or None if the shapes do not tell."""
    if part.dim() != whole.dim():
        return None
    cut = [d for d in range(part.dim()) if part.shape[d] != whole.shape[d]]
    if not cut:
        return whole
    rows = whole.shape[cut[0]] // total
    if len(cut) > 1 or part.shape[cut[0]] != rows * len(tokens):
        return None
    return whole.narrow(cut[0], rows * tokens.start, rows * len(tokens))
