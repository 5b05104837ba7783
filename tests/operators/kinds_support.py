"""What the tests of kinds of models share: a table of small models with what is expected of each, and the check.

Contract
- `SPLIT`: the model is really split, and equal.
- `REFUSED`: the model is not split. The reason names the operator: one of the words in `names` is in it. Only a model
  of which Dynamo captures no graph with a batch (graph breaks, a batch as large as a weight) has no operator to name.
- `EITHER`: one of the two. Never is a result wrong, nor does an exception come from inside a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rounding import integers

from benchmarks.independence.judge import Case, Mode, judge

SPLIT, REFUSED, EITHER = "split", "refused", "split or refused"
LEVELS = ("dynamo", "aot")
BATCH, WIDTH = 8, 4
NO_GRAPH = "no graph of this model has a dynamic dimension"
Model = Callable[..., Any]


@dataclass(frozen=True)
class Kind:
    """A small model.

    Attributes:
        model: A function or a module of the inputs.
        expected: `SPLIT`, `REFUSED` or `EITHER`.
        names: Words, separated by blanks: the message of a refusal has one of them.
        inputs: Makes the arguments of one call; by default whole numbers of shape [8, 4].
        aot: What is expected at level "aot", if that is something else: some composite operators check values there.
        gradients: The model runs forward and backward.
        batch_dim: The dimension of the batch.
    """

    model: Model
    expected: str
    names: str = ""
    inputs: Callable[[], tuple[Any, ...]] = lambda: (integers(BATCH, WIDTH),)
    aot: str = ""
    gradients: bool = False
    batch_dim: int = 0


def check(kind: Kind, level: str) -> None:
    """Run a kind at a level, and assert what is expected of it."""
    torch.manual_seed(0)
    model = kind.model() if isinstance(kind.model, type) else kind.model
    case = Case(model, [kind.inputs()], kind.batch_dim)
    outcome = judge(case, Mode(level, kind.gradients))
    assert outcome is not None, "the kind has no gradient"
    assert outcome.verdict in ("split", "refused"), f"{outcome.verdict}: {outcome.reason}"
    expected = (kind.aot or kind.expected) if level == "aot" else kind.expected
    assert outcome.verdict in expected, f"expected {expected}, not {outcome.verdict}: {outcome.reason}"
    if outcome.verdict == "refused" and kind.names and not outcome.reason.startswith(NO_GRAPH):
        assert any(name in outcome.reason for name in kind.names.split()), f"none of {kind.names} in: {outcome.reason}"
