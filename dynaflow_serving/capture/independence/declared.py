"""Operators that their authors declare to keep tokens apart.

Contract
- A declared operator has no rule that could be proved. The first split step is checked against the un-split one, so a
  wrong declaration is found there.
- Declarations are per process: an integration makes those of its engine, a strategy or a config those of its user.
"""

from __future__ import annotations

import re

from dynaflow_serving.capture.independence.case import Case, changed_dims
from dynaflow_serving.capture.independence.placement import WHOLE, Cut, Mixes, Placement, Total
from dynaflow_serving.config import OPERATOR_NAME
from dynaflow_serving.errors import ConfigError

_declared: set[str] = set()


def row_wise(*operators: str) -> None:
    """Declare that operators treat each row (token, sequence) on its own.

    The rows are dimension 0 of a tensor argument, or whichever dimension the batch is. Each result has them, too.

    Args:
        operators: Such as "mylib::rotate": the namespace and the name, without an overload.

    Raises:
        ConfigError: A name has no namespace.
    """
    for name in operators:
        if not re.fullmatch(OPERATOR_NAME, name):
            raise ConfigError(f"{name!r} is no operator's name: write it as 'namespace::name', without an overload")
    _declared.update(operators)


def is_declared(name: str) -> bool:
    """Whether an operator was declared row-wise."""
    return name in _declared


def as_declared(case: Case) -> list[Placement]:
    """Return the placements of the results of an operator that keeps rows apart, and their number."""
    cuts = {p for p in case.placements() if isinstance(p, Cut)}
    if any(c.numbered or c.copies > 1 for c in cuts) or any(isinstance(p, Total) for p in case.placements()):
        raise Mixes("is declared row-wise, but reads numbers of tokens, copies of the batch or a sum over it")
    rows = {t.shape[p.dim] for t in case.call.tensors if isinstance(p := case.placement_of(t), Cut)}
    found: list[Placement] = []
    for pair in case.call.results:
        dims = changed_dims(pair)
        empty = not pair[0].numel()  # it only says that something comes before
        if cuts and not empty and (not dims or {pair[0].shape[dims[0]]} != rows):
            raise Mixes("is declared row-wise, but has a result with another number of rows")
        found.append(Cut(dims[0]) if dims else WHOLE)
    return found
