"""Run-time watch over adopted candidates: what turns out slower than un-split steps is switched off.

Contract
- A comparison is `COMPARED` adjacent steps of a bucket, every second one un-split: what changes with the load or the
  length of contexts changes both. Slower than un-split ones by more than the noise: switched off.
- The first steps of a bucket are a comparison. After that, every `window` steps are looked at: has the candidate become
  slower per token than at its last comparison, or are `RECHECKED` windows over, the next steps are a comparison again.
- Which steps those are, and what is switched off, all ranks decide alike: with one small collective per window and
  comparison, after numbers of steps that are the same on all ranks.
- A step's time may be known later than at its end (a device), or never (a failed step).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from dynaflow_serving.policy.bucket import Bucket, bucket_of
from dynaflow_serving.session.observers import Observer
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.step import Step

COMPARED = 8
RECHECKED = 16


@dataclass
class Watch:
    """One bucket. Seconds are per token."""

    noise: float  # relative: what a candidate may be slower by
    left: int = COMPARED  # steps of the comparison, or, with `comparing` False, of the window
    comparing: bool = True
    windows: int = 0  # since the last comparison
    reference: float = 0.0  # of the candidate's steps in the last comparison
    speed_up: float = 1.0  # in the last comparison
    plain: list[float] = field(default_factory=list)
    split: list[float] = field(default_factory=list)


class Guard(Observer):
    def __init__(self, window: int, ranks: Ranks, switch_off: Callable[[Bucket, float], None]) -> None:
        """switch_off: told the bucket and the measured speed-up, below 1."""
        self.window, self.ranks, self._switch_off = window, ranks, switch_off
        self._watches: dict[Bucket, Watch] = {}

    def add(self, bucket: Bucket, noise: float) -> None:
        self._watches[bucket] = Watch(noise)

    def runs_plain(self, bucket: Bucket) -> bool:
        """Whether this step of `bucket`, which has an adopted candidate, runs un-split. Counts the step."""
        watch = self._watches[bucket]
        if watch.left == 0:
            if watch.comparing:
                self._judge(bucket, watch)
                if bucket not in self._watches:
                    return True
            else:
                self._look(watch)
            watch.plain.clear()
            watch.split.clear()
        watch.left -= 1
        return watch.comparing and watch.left % 2 == 1

    def timed(self, step: Step, seconds: float) -> None:
        if not self._watches or step.to_trace or step.to_compare:  # sampling takes time, too
            return
        batch = step.batch
        step.saved = self.observe(bucket_of(batch), step.planned, sum(batch.tokens), seconds)

    def observe(self, bucket: Bucket, split: bool, tokens: int, seconds: float) -> float:
        """A step took so long. Returns the seconds that it saved, estimated from the last comparison."""
        watch = self._watches.get(bucket)
        if watch is None:
            return 0.0
        (watch.split if split else watch.plain).append(seconds / tokens)
        return seconds * (watch.speed_up - 1) if split else 0.0

    def _judge(self, bucket: Bucket, watch: Watch) -> None:
        """After a comparison."""
        slower = median(watch.split) / median(watch.plain) if watch.split and watch.plain else 0.0
        (slower,) = self.ranks.greatest([slower])
        if slower > 1 + watch.noise:
            del self._watches[bucket]
            self._switch_off(bucket, 1 / slower)
            return
        watch.speed_up = 1 / slower if slower else 1.0
        watch.reference = median(watch.split) if watch.split else 0.0
        watch.comparing, watch.windows, watch.left = False, 0, self.window

    def _look(self, watch: Watch) -> None:
        """After a window."""
        watch.windows += 1
        now = median(watch.split) if watch.split else 0.0
        (suspect,) = self.ranks.greatest([float(now > watch.reference * (1 + watch.noise))])
        watch.comparing = bool(suspect) or watch.windows == RECHECKED
        watch.left = COMPARED if watch.comparing else self.window
