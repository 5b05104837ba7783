"""One call with the placements of its arguments: what a rule is asked about.

Contract
- A rule returns the placements of the tensors in the result, in order, or raises `Mixes`.
- A rule need not look at sizes: `prove` checks that a result depends on the number of tokens in the dimension that its
  placement says, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from dynaflow_serving.capture.independence.placement import WHOLE, Cut, Mixes, Placement, Whole
from dynaflow_serving.capture.independence.record import Call


@dataclass(frozen=True)
class Case:
    """A call, and where the tokens of its arguments are."""

    call: Call
    placement_of: Callable[[torch.Tensor], Placement]

    def __getitem__(self, name: str) -> Any:
        """Return an argument, for the first number of tokens."""
        return self.call.args[name]

    def at(self, name: str) -> Placement:
        """Return the placement of a tensor argument; a missing one is the same for all micro-batches."""
        argument = self.call.args.get(name)
        return self.placement_of(argument) if isinstance(argument, torch.Tensor) else WHOLE

    def placements(self) -> list[Placement]:
        """Return the placements of all tensor arguments."""
        return [self.placement_of(t) for t in self.call.tensors]

    def cut(self, name: str) -> Cut:
        """Return the placement of an argument that has to be cut."""
        placement = self.at(name)
        if not isinstance(placement, Cut) or placement.numbered:
            raise Mixes(f"needs {name} cut by tokens")
        return placement

    def whole(self, *names: str) -> None:
        """Check that these arguments are the same for all micro-batches."""
        for name in names:
            tensors = (t for t in pytree.tree_leaves(self.call.args.get(name)) if isinstance(t, torch.Tensor))
            if any(not isinstance(self.placement_of(t), Whole) for t in tensors):
                raise Mixes(f"has tokens in its argument {name}")

    def each(self, placement: Placement) -> list[Placement]:
        """Return `placement` for each tensor of the result."""
        return [placement] * len(self.call.results)

    def by_size(self) -> list[Placement]:
        """Return, for each tensor of the result, a cut in the one dimension that depends on the number of tokens."""
        return [sized(pair) for pair in self.call.results]


def sized(pair: tuple[torch.Tensor, torch.Tensor]) -> Placement:
    """Return the cut of a result that must have a token axis; `pair` is it for both numbers of tokens."""
    dims = changed_dims(pair)
    if not dims:
        raise Mixes("reduces or contracts over the token axis")
    return Cut(dims[0])


def changed_dims(pair: tuple[torch.Tensor, torch.Tensor]) -> list[int]:
    """Return the dimensions that depend on the number of tokens."""
    first, second = pair
    if first.dim() != second.dim():
        raise Mixes("has a result with another number of dimensions for another number of tokens")
    return [d for d, (a, b) in enumerate(zip(first.shape, second.shape)) if a != b]


def dim_of(dim: int, rank: int) -> int:
    """Return a dimension counted from the front."""
    return dim % rank if rank else 0


def taken(size: int, arguments: Mapping[str, Any]) -> range:
    """Return the positions that a slice takes of a dimension; `arguments` has its start, end and step."""
    return range(size)[slice(arguments["start"], arguments["end"], arguments["step"])]


Rule = Callable[[Case], list[Placement]]


@dataclass(frozen=True)
class Entry:
    """A rule, and the arguments whose numbers may depend on the number of tokens."""

    rule: Rule
    sizes: frozenset[str]


RULES: dict[str, Entry] = {}
"""Operator, with namespace and without overload, -> its rule. `rules` fills it."""


def rule(*names: str, sizes: Iterable[str] = ()) -> Callable[[Rule], Rule]:
    """Register a rule for operators, such as `aten::view`.

    Args:
        names: The operators.
        sizes: The arguments whose numbers may depend on the number of tokens.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, Entry(function, frozenset(sizes))))
        return function

    return register
