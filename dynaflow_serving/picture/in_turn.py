"""The strategy that an engine runs for operator times: the split of another strategy, its micro-batches in turn.

Contract
- A config names it by the path of this file, since it is for measuring and in no list of strategies.
- It has the other strategy's annotations and cuts, so it schedules the same Program.
- Every second step is not split, to compare with. All ranks count the same steps.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.strategies import build_strategy
from dynaflow_serving.strategies.sequential import Sequential
from dynaflow_serving.strategy.base import OpScheduler, Options
from dynaflow_serving.strategy.registry import register_strategy
from dynaflow_serving.strategy.rules import Rule
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.splitting import whole

UNSPLIT = "un-split, to compare with"


class InTurnOptions(Options):
    strategy: str = Field(description="whose split it is")
    options: dict[str, Any] = Field(default_factory=dict, description="options of that strategy")


@register_strategy("in_turn")
class InTurn(OpScheduler[InTurnOptions]):
    def __init__(self, options: InTurnOptions) -> None:
        super().__init__(options)
        self._other = build_strategy(options.strategy, options.options)
        self._steps = 0

    @property
    def annotations(self) -> tuple[Rule, ...]:  # type: ignore[override]
        return self._other.annotations

    @property
    def max_micro_batches(self) -> int:
        return self._other.max_micro_batches

    def check_splits(self) -> None:
        """Count no steps: the other strategy was checked when it was made."""

    def split(self, batch: Batch) -> Split:
        self._steps += 1
        if self._steps % 2 == 0:
            return whole(batch, UNSPLIT)
        split = self._other.split(batch)
        return Split(split.micro_batches, split.depends, split.reason)

    def schedule(self, s: Schedule) -> None:
        Sequential().schedule(s)
