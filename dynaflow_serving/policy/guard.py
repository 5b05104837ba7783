"""The guard watches candidates while serving, and switches off those that are slower than un-split steps.

Contract
- A comparison is `COMPARED` adjacent steps of a bucket, of which every second one runs un-split. The load and the
  length of contexts change both alike. A candidate that is slower by more than the noise is switched off.
- A candidate on trial (`online: true`) has to be faster: by `least_gain`, and by the noise of the un-split steps.
- The first steps of a bucket are a comparison. After that, the guard looks at every `window` steps of the bucket.
- Two things start a new comparison: the candidate has become slower per token than at its last one, or `RECHECKED`
  windows have passed.
- All ranks decide alike: they exchange one small collective per window and comparison, after the same number of steps.
- A step's time may be known later than at its end (a device), or never (a failed step).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from dynaflow_serving.core.measurement import noise
from dynaflow_serving.policy.bucket import Bucket, bucket_of
from dynaflow_serving.session.observers import Observer
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.step import Step

COMPARED = 8
RECHECKED = 16


@dataclass
class Watch:
    """The guard keeps this record of one bucket.

    Attributes:
        noise: The candidate may be slower by this share of the un-split time, or on trial has to be faster by it.
        on_trial: Whether the candidate is on trial.
        left: The steps that are left of the comparison, or of the window where `comparing` is False.
        comparing: Whether the current steps are a comparison.
        windows: The number of windows since the last comparison.
        reference: The candidate's seconds per token in the last comparison.
        speed_up: The candidate's speed-up over un-split steps in the last comparison.
        plain: The seconds per token of un-split steps, in the current comparison or window.
        split: The seconds per token of split steps, in the current comparison or window.
    """

    noise: float
    on_trial: bool = False
    left: int = COMPARED
    comparing: bool = True
    windows: int = 0
    reference: float = 0.0
    speed_up: float = 1.0
    plain: list[float] = field(default_factory=list)
    split: list[float] = field(default_factory=list)


class Guard(Observer):
    """The guard of one worker observes all its steps, and tells the selector which of them run un-split."""

    def __init__(
        self,
        window: int,
        ranks: Ranks,
        switch_off: Callable[[Bucket, float], None],
        tried: Callable[[Bucket, float, bool], None] = lambda bucket, speed_up, won: None,
    ) -> None:
        """Make a guard that watches no bucket yet.

        Args:
            window: The steps of a bucket between two looks at it.
            ranks: The ranks that decide alike.
            switch_off: This is called with a bucket and its measured speed-up, which is below 1.
            tried: This is called at the end of a trial, with the bucket, the speed-up, and whether that was enough.
        """
        self.window, self.ranks, self._switch_off, self._tried = window, ranks, switch_off, tried
        self._watches: dict[Bucket, Watch] = {}

    def watch_bucket(self, bucket: Bucket, noise: float) -> None:
        """Watch the adopted candidate of `bucket`, which may be slower by the share `noise`."""
        self._watches[bucket] = Watch(noise)

    def try_bucket(self, bucket: Bucket, least_gain: float) -> None:
        """Put the candidate of `bucket` on trial: it stays if it is faster by the share `least_gain` and the noise."""
        self._watches[bucket] = Watch(least_gain, on_trial=True)

    def forget_bucket(self, bucket: Bucket) -> None:
        """Watch `bucket` no longer."""
        self._watches.pop(bucket, None)

    def runs_plain(self, bucket: Bucket) -> bool:
        """Count a step of a watched `bucket`, and return whether it runs un-split."""
        watch = self._watches[bucket]
        if watch.left == 0:
            if watch.comparing:
                self._end_comparison(bucket, watch)
                if bucket not in self._watches:
                    return True
            else:
                self._end_window(watch)
            watch.plain.clear()
            watch.split.clear()
        watch.left -= 1
        return watch.comparing and watch.left % 2 == 1

    def timed(self, step: Step, seconds: float) -> None:
        if not self._watches or step.to_trace or step.to_compare:  # a sampled step takes longer
            return
        batch = step.batch
        step.saved = self.record_step(bucket_of(batch), step.planned, sum(batch.tokens), seconds)

    def record_step(self, bucket: Bucket, split: bool, tokens: int, seconds: float) -> float:
        """Record that a step of `tokens` tokens took `seconds`.

        Returns:
            The seconds that the step saved, estimated from the last comparison.
        """
        watch = self._watches.get(bucket)
        if watch is None:
            return 0.0
        (watch.split if split else watch.plain).append(seconds / tokens)
        return seconds * (watch.speed_up - 1) if split else 0.0

    def _end_comparison(self, bucket: Bucket, watch: Watch) -> None:
        """Switch the bucket's candidate off if it was slower, else begin the first window."""
        unknown = math.inf if watch.on_trial else 0.0
        slower = median(watch.split) / median(watch.plain) if watch.split and watch.plain else unknown
        slower, spread = self.ranks.greatest([slower, noise(watch.plain) if watch.plain else 0.0])
        if watch.on_trial:
            watch.noise, watch.on_trial = max(watch.noise, spread), False
            won = slower < 1 - watch.noise
            if not won:
                del self._watches[bucket]
            self._tried(bucket, 1 / slower, won)
            if not won:
                return
        elif slower > 1 + watch.noise:
            del self._watches[bucket]
            self._switch_off(bucket, 1 / slower)
            return
        watch.speed_up = 1 / slower if slower else 1.0
        watch.reference = median(watch.split) if watch.split else 0.0
        watch.comparing, watch.windows, watch.left = False, 0, self.window

    def _end_window(self, watch: Watch) -> None:
        """Begin a comparison if the candidate seems to have become slower, or if it is time for one."""
        watch.windows += 1
        now = median(watch.split) if watch.split else 0.0
        (suspect,) = self.ranks.greatest([float(now > watch.reference * (1 + watch.noise))])
        watch.comparing = bool(suspect) or watch.windows == RECHECKED
        watch.left = COMPARED if watch.comparing else self.window
