from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from dynaflow_serving.core.batch import Split


@dataclass
class StepCounts:
    """Whether steps were split, and why the others were not."""

    split: int = 0
    unsplit: Counter[str] = field(default_factory=Counter)

    def add(self, split: Split) -> None:
        if len(split.micro_batches) > 1:
            self.split += 1
        else:
            self.unsplit[split.reason] += 1
