"""How a value relates to the micro-batches: the nouns of the proof.

Contract
- A micro-batch is treated as a virtual device, and a placement says what of the value each device holds.
- Placements are data. Only the rules (`rules`) know what an operator makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class Mixes(Exception):
    """An operator is not proved independent of the other tokens. The message follows the node's name: "sorts ..."."""


@dataclass(frozen=True, slots=True)
class Whole:
    """The value is the same for every micro-batch.

    Attributes:
        zero: Whether all elements are known to be 0. Such a value is also a sum of zeros (`Total`).
    """

    zero: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """Each micro-batch holds the rows of its own tokens.

    Attributes:
        dim: The dimension of the tokens, which has `copies * tokens * rows` elements.
        copies: How often the whole batch follows itself there. More than one cannot be cut into views.
        numbered: If not 0, the elements are 0, `numbered`, 2 * `numbered` ...: they number the tokens or their rows,
            and mean the same only as indices of own rows.
    """

    dim: int
    copies: int = 1
    numbered: int = 0


@dataclass(frozen=True, slots=True)
class Total:
    """Each micro-batch holds its share of a sum over all tokens, or its own mean over tokens if `mean`."""

    mean: bool = False


Placement = Whole | Cut | Total

WHOLE = Whole()
ZERO = Whole(zero=True)


def rows_of(size: int, tokens: int, copies: int = 1) -> int:
    """Return how many adjacent rows a token has in a dimension of `size` elements; 0 if that is no whole number."""
    rows, rest = divmod(size, tokens * copies)
    return 0 if rest else rows


def leaves(value: Any) -> list[Any]:
    """Return the leaves of nested lists and tuples, such as an operator's results."""
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else [value]
