"""Run-time watch over adopted candidates: what turns out slower than un-split steps is switched off.

Contract
- Of every adopted bucket some steps run un-split: four of the first eight, then one in `every`. They are what the
  candidate's steps are compared with, per token, so that a change of the load changes both.
- After every `window` steps of a bucket the ranks compare medians (one small collective), so that all switch off
  alike; which steps those are follows from the number of steps, never from a clock.
- A step's time may be known later than at its end (a device), or never (a failed step).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from dynaflow_serving.policy.bucket import Bucket
from dynaflow_serving.ranks import Ranks

FIRST = 8  # steps of a bucket, of which every second runs un-split
KEPT = 8  # un-split steps that count at most, the latest ones


@dataclass
class Watch:
    """One bucket. Seconds are per token."""

    noise: float  # relative: what the candidate may be slower by
    steps: int = 0
    plain: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    split: list[float] = field(default_factory=list)


class Guard:
    def __init__(self, window: int, every: int, ranks: Ranks, switch_off: Callable[[Bucket, float], None]) -> None:
        """switch_off: told the bucket and the measured speed-up, below 1."""
        self.window, self.every, self.ranks, self._switch_off = window, every, ranks, switch_off
        self._watches: dict[Bucket, Watch] = {}

    def add(self, bucket: Bucket, noise: float) -> None:
        self._watches[bucket] = Watch(noise)

    def runs_plain(self, bucket: Bucket) -> bool:
        """Whether this step of `bucket`, which has an adopted candidate, is one to compare with. Counts the step."""
        watch = self._watches[bucket]
        if watch.steps and watch.steps % self.window == 0:
            self._judge(bucket, watch)
            if bucket not in self._watches:
                return True
        watch.steps += 1
        return watch.steps % 2 == 0 if watch.steps <= FIRST else watch.steps % self.every == 0

    def observe(self, bucket: Bucket, split: bool, tokens: int, seconds: float) -> float:
        """A step of a watched bucket took so long. Returns the seconds that it saved, estimated."""
        watch = self._watches.get(bucket)
        if watch is None:
            return 0.0
        each = seconds / tokens
        if not split:
            watch.plain.append(each)
            return 0.0
        watch.split.append(each)
        return (median(watch.plain) - each) * tokens if watch.plain else 0.0

    def _judge(self, bucket: Bucket, watch: Watch) -> None:
        slower = 0.0
        if len(watch.plain) > 1 and len(watch.split) > 1:
            slower = median(watch.split) / median(watch.plain)
        watch.split.clear()
        (slower,) = self.ranks.greatest([slower])
        if slower > 1 + watch.noise:
            del self._watches[bucket]
            self._switch_off(bucket, 1 / slower)
