"""Timing of variants against each other, and the time that a suite may take. Pure logic: no device in here.

Contract
- Variants take turns (a b c, c b a, a b c ...), so that a drift of the machine cancels. No round mixes warm-up with
  measurement. A ratio is taken within a round, never between medians of different rounds.
- A variant that fails is left out with its error as its result; the others go on.
- A section gets its share of the time that is left, so a slow one takes from those after it, never from the total.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dynaflow_serving.core.measurement import Spread, in_turn

Clock = Callable[[], float]
SAMPLE_MS = 20.0  # a sample is as many calls in a row as take about this long
MOST_CALLS = 100
WARM_UP = 4  # with `graph: whole`, the first run of a plan is eager and the second captures
ROUNDS = (5, 60)  # at least, even if the time is over; at most


class Timer(Protocol):
    def milliseconds(self, call: Callable[[], Any], calls: int) -> float:
        """Return the time of one call on the device: the mean of `calls` in a row."""


class CudaTimer:
    """CUDA events around the calls on the current stream; the calls must join their streams to it."""

    def milliseconds(self, call: Callable[[], Any], calls: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / calls


@dataclass
class VariantTimes:
    """Milliseconds per round and variant; sample i of every variant is of round i."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def speedup(self, variant: str, baseline: str) -> Spread:
        """Return the time of `baseline` over that of `variant`, round by round: above 1 `variant` is faster."""
        pairs = zip(self.samples[baseline], self.samples[variant], strict=True)
        return Spread.of_ratios(b / v for b, v in pairs)


def time_in_turn(
    variants: Mapping[str, Callable[[], Any]], timer: Timer, seconds: float, clock: Clock = time.perf_counter
) -> VariantTimes:
    """Time `variants` against each other for about `seconds`, warm-up included."""
    began = clock()
    measured, calls = VariantTimes(), dict[str, int]()
    for name, call in variants.items():
        try:
            timer.milliseconds(call, WARM_UP)
            once = timer.milliseconds(call, 1)
        except Exception as e:  # out of memory, no green contexts: the result of this variant
            measured.failed[name] = f"{type(e).__name__}: {e}".partition("\n")[0]
            continue
        calls[name] = min(MOST_CALLS, max(1, round(SAMPLE_MS / max(once, 1e-6))))
        measured.samples[name] = []
    order, least, most = list(calls), *ROUNDS
    for number in range(most if order else 0):
        if number >= least and clock() - began >= seconds:
            break
        for name in in_turn(order, number):
            measured.samples[name].append(timer.milliseconds(variants[name], calls[name]))
    return measured


@dataclass(frozen=True)
class Section:
    """A part of the suite: `run(seconds)` returns its rows, and `weight` is its share of the time."""

    name: str
    weight: float
    run: Callable[[float], list[dict[str, Any]]]


@dataclass
class SectionOutcome:
    """The rows of a section, or why there are none."""

    section: str
    seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


def run_sections(
    sections: Sequence[Section], seconds: float, clock: Clock = time.perf_counter
) -> Iterator[SectionOutcome]:
    """Run the sections one after the other within `seconds`.

    A section whose time is gone is not run, and its error says so.
    """
    began = clock()
    for i, section in enumerate(sections):
        start = clock()
        left = seconds - (start - began)
        outcome = SectionOutcome(section.name, 0.0)
        if left <= 0:
            outcome.error = f"not run: the {seconds:.0f} s of the suite were used up by the sections before it"
        else:
            try:
                outcome.rows = section.run(left * section.weight / sum(s.weight for s in sections[i:]))
            except Exception as e:  # the other sections' results must not be lost
                outcome.error = f"{type(e).__name__}: {e}"
        outcome.seconds = clock() - start
        yield outcome
