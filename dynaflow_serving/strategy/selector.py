"""Which strategy splits and orders a step.

Contract
- A `Selector` names its choice in `Split.candidate`, and `strategy(candidate)` gives it back: the plan of a split is
  the chosen strategy's.
- All strategies of one selector share one Program, so `annotations` are those of all of them.
- `FixedStrategy` runs every step under one strategy, whose candidate is "". The policy's selector chooses per batch.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any

from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.program import Program
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.rules import Rule


class Selector(abc.ABC):
    name: str  # of what the user configured

    @property
    @abc.abstractmethod
    def candidates(self) -> tuple[str, ...]:
        """All that `Split.candidate` may be."""

    @abc.abstractmethod
    def strategy(self, candidate: str) -> OpScheduler:
        """The strategy behind `Split.candidate`."""

    @abc.abstractmethod
    def split(self, batch: Batch) -> Split:
        """Cut one step's batch. It is called every step, and every rank gets the same answer."""

    @property
    @abc.abstractmethod
    def options(self) -> Any:
        """What the user configured, as a pydantic model."""

    @property
    def in_use(self) -> tuple[str, ...]:
        """These candidates may split steps from now on."""
        return self.candidates

    @property
    def annotations(self) -> tuple[Rule, ...]:
        strategies = [self.strategy(candidate) for candidate in self.candidates]
        return tuple(dict.fromkeys(rule for s in strategies for rule in s.annotations))

    @property
    def row_wise(self) -> tuple[str, ...]:
        """The custom operators that the strategies declare to treat each token on its own."""
        return tuple(name for candidate in self.candidates for name in self.strategy(candidate).row_wise)

    @property
    def taken_whole(self) -> frozenset[str]:
        """The tags of operators that the strategies want with their communication within."""
        return frozenset(tag for candidate in self.candidates for tag in self.strategy(candidate).takes_whole)

    @property
    def max_micro_batches(self) -> int:
        return max(self.strategy(candidate).max_micro_batches for candidate in self.candidates)

    @property
    def schedules_unsplit(self) -> bool:
        """Whether un-split steps run under a plan, too."""
        return any(self.strategy(candidate).schedules_unsplit for candidate in self.candidates)

    def missing_tags(self, programs: Iterable[Program]) -> tuple[str, ...]:
        """Return a sentence for each strategy that looks for tags which none of `programs` has."""
        programs = tuple(programs)
        found = (self.strategy(candidate).missing_tags(programs) for candidate in self.candidates)
        return tuple(dict.fromkeys(sentence for sentence in found if sentence))

    def plans_unsplit(self, candidate: str) -> bool:
        """Whether un-split steps of `candidate` are what it is for: it never splits, and orders these."""
        strategy = self.strategy(candidate)
        return strategy.schedules_unsplit and strategy.max_micro_batches == 1

    @property
    def whole_planners(self) -> tuple[str, ...]:
        """These candidates order un-split steps, and split none."""
        return tuple(candidate for candidate in self.candidates if self.plans_unsplit(candidate))

    @property
    def fewest_rows(self) -> int:
        """A batch of fewer rows is left as it is: one row can be ordered, not split."""
        return 1 if self.whole_planners else 2

    def cut(self, batch: Batch, candidate: str) -> Split:
        """`batch` as `candidate` splits it."""
        split = self.strategy(candidate).split(batch)
        return Split(split.micro_batches, split.depends, split.reason, candidate)

    def decisions(self) -> dict[str, Any] | None:
        """What was decided by measuring, as plain data; None where nothing is decided."""
        return None


class FixedStrategy(Selector):
    """One strategy for every step."""

    def __init__(self, strategy: OpScheduler) -> None:
        self._strategy = strategy
        self.name = strategy.name

    @property
    def candidates(self) -> tuple[str, ...]:
        return ("",)

    @property
    def options(self) -> Any:
        return self._strategy.options

    def strategy(self, candidate: str) -> OpScheduler:
        return self._strategy

    def split(self, batch: Batch) -> Split:
        return self._strategy.split(batch)
