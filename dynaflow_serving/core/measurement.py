"""Repeated measurements: their spread, their noise, and the order in which things are measured.

Contract
- A spread is the median with the least and the greatest value. It assumes nothing about how the values are distributed,
  and it hides no outlier.
- Noise is half of the interquartile range, relative to the median. Above `NOISY`, equal work took so different times
  that a ratio of such times is not to be trusted.
- Things take turns round by round, and the order of every second round is reversed, so that a drift of the machine
  cancels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

T = TypeVar("T")

NOISY = 0.13  # as when the slower of two values is 1.3 times the faster


@dataclass(frozen=True)
class Spread:
    """The median, the least and the greatest of several values, in the values' unit."""

    median: float
    min: float
    max: float

    @staticmethod
    def of_values(values: Iterable[float]) -> Spread:
        """Return the spread of at least one value."""
        values = list(values)
        return Spread(median=statistics.median(values), min=min(values), max=max(values))

    @staticmethod
    def of_ratios(ratios: Iterable[float]) -> Spread:
        """Return the spread of at least one ratio, each above 0.

        Between two middle ratios the median is their geometric mean, which favours neither side: of 0.5 and 2 it is 1.
        """
        ratios = list(ratios)
        low, high = statistics.median_low(ratios), statistics.median_high(ratios)
        return Spread(median=math.sqrt(low * high), min=min(ratios), max=max(ratios))

    def as_dict(self) -> dict[str, float]:
        """Return plain data: `{"median": ..., "min": ..., "max": ...}`."""
        return asdict(self)


def noise(values: Iterable[float]) -> float:
    """Return half of the interquartile range of at least one value, relative to the median."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    low, high = ordered[quarter], ordered[-1 - quarter]
    return (high - low) / 2 / statistics.median(ordered)


def in_turn(things: Sequence[T], round_number: int) -> Sequence[T]:
    """Return the things in the order of a round: as they are in even rounds, reversed in odd ones."""
    return things if round_number % 2 == 0 else things[::-1]
