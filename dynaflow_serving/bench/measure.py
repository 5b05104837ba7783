"""The measurement: all sides take turns, part by part and round by round.

Contract
- A part is a rate of the link, or `ONE_NODE`. Its first round warms up and is compared, not counted.
- In a round each side runs one pass, and compute alone and network alone run once, where the runner can. Every second
  round is in reverse, so that a drift of the machine cancels.
- A pass's outputs are compared with the stock system's in the same round.
- Before each pass, while all sides rest, it is measured how many cores something else keeps busy.
- Everything that was measured is returned.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dynaflow_serving.bench.environment import busy_seconds
from dynaflow_serving.bench.link import ONE_NODE, Link, place
from dynaflow_serving.bench.runner.base import PassResult, Progress, Runner, SideSteps
from dynaflow_serving.bench.serving.server import terminated_as_exit
from dynaflow_serving.bench.sides import STOCK, Side
from dynaflow_serving.core.measurement import in_turn

LOOK_SECONDS = 0.2  # so long everything rests, before a pass


@dataclass
class SidePasses:
    """The counted passes of one side in one part.

    Attributes:
        side: The side.
        seconds: The duration of each pass.
        differences: How outputs differed from the stock system's, by round; the warm-up's too.
        failed: What did not work, by round.
        steps: The steps of all rounds but the warm-up.
        retransmissions: The TCP segments that were sent again, in all of these passes.
        load: The cores that something else kept busy before each pass.
        details: More about the side, for the record.
    """

    side: Side
    seconds: list[float] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    steps: SideSteps = field(default_factory=SideSteps)
    retransmissions: int = 0
    load: list[float] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class PartResult:
    """All passes over one rate of the link.

    Attributes:
        link_mbit: The rate in megabit per second; 0 if there is no limit, `ONE_NODE` on this machine alone.
        sides: The passes of each side, the stock system's first.
        alone: The seconds of each part of a pass alone.
    """

    link_mbit: float | None
    sides: list[SidePasses]
    alone: dict[str, list[float]]


def stages(runner: Runner, links: Sequence[float | None], pairs: int) -> int:
    """Return how often `measure` calls its `progress`."""
    return runner.stages + len(links) * (1 + (1 + pairs) * len(runner.sides)) + 1


def measure(
    runner: Runner, links: Sequence[float | None], pairs: int, link: Link | None, progress: Progress
) -> list[PartResult]:
    """Run all sides in turn, and return what was found.

    Args:
        runner: It runs the sides.
        links: The rate of each part.
        pairs: The number of counted rounds of a part.
        link: The link whose rate is set; None if there is none.
        progress: Told what begins, `stages` times.

    Raises:
        EngineProcessError: A process failed.
    """
    with terminated_as_exit(), contextlib.closing(runner):
        runner.start(progress)
        parts = [_part(runner, rate, pairs, link, progress) for rate in links]
        progress("stop")
        return parts


def merged(starts: Sequence[Sequence[PartResult]]) -> list[PartResult]:
    """Return the parts of several starts as one: the passes of all, and the steps of all.

    Two processes of one system may differ by some per cent for as long as they live; the spread over starts shows it.
    """
    first, *others = starts
    for other in others:
        for part, more in zip(first, other, strict=True):
            for what, seconds in more.alone.items():
                part.alone[what] += seconds
            for passes, extra in zip(part.sides, more.sides, strict=True):
                passes.seconds += extra.seconds
                passes.differences += extra.differences
                passes.failed += extra.failed
                passes.load += extra.load
                passes.retransmissions += extra.retransmissions
                passes.steps = together(passes.steps, extra.steps)
    return list(first)


def together(one: SideSteps, other: SideSteps) -> SideSteps:
    """Return the steps of two starts."""
    unsplit = dict(Counter(one.unsplit) + Counter(other.unsplit))
    return replace(other, split=one.split + other.split, unsplit=unsplit, problem=one.problem or other.problem)


def _part(runner: Runner, rate: float | None, pairs: int, link: Link | None, progress: Progress) -> PartResult:
    where = f"{place(rate)}: " if link is not None or rate is ONE_NODE else ""
    if link is not None:
        link.set_rate(rate or 0.0)
    progress(f"{where}set up{', and tune' if any(side.decides for side in runner.sides) else ''}")
    runner.begin_part()
    part = PartResult(rate, [SidePasses(side) for side in runner.sides], {what: [] for what in runner.alone})
    before: dict[str, SideSteps] = {}
    for number in range(1 + pairs):
        stage = f"{where}{f'pair {number} of {pairs}' if number else 'warm-up'}"
        results: dict[str, PassResult] = {}
        turns: list[SidePasses | str] = [*part.sides, *part.alone]
        for what in in_turn(turns, number + 1):  # the first pair begins with the stock system
            if isinstance(what, str):
                seconds = runner.alone[what](number)
                part.alone[what] += [seconds] if number else []
            else:
                progress(f"{stage}: {what.side.name}")
                results[what.side.name] = _pass(runner, what, number, link)
        for passes in part.sides:
            name = passes.side.name
            if difference := differs(results[STOCK], results[name]):
                passes.differences.append(f"{stage}: {difference}")
            if results[name].failed:
                passes.failed.append(f"{stage}: {results[name].failed}")
            if not number and passes.side.config is not None:
                before[name] = runner.steps(passes.side)
    for passes in part.sides:
        if passes.side.config is not None:
            passes.steps = since(before[passes.side.name], runner.steps(passes.side))
            passes.details = runner.details(passes.side)
    return part


def _pass(runner: Runner, passes: SidePasses, number: int, link: Link | None) -> PassResult:
    time.sleep(runner.settle_seconds)
    began, busy = time.perf_counter(), busy_seconds()
    time.sleep(LOOK_SECONDS)
    load = (busy_seconds() - busy) / (time.perf_counter() - began)
    sent_again = 0 if link is None else link.retransmissions()
    result = runner.run(passes.side, number)
    if number:
        passes.seconds.append(result.seconds)
        passes.load.append(load)
        passes.retransmissions += 0 if link is None else link.retransmissions() - sent_again
    return result


def differs(stock: PassResult, other: PassResult) -> str:
    """Say where the outputs of a pass first differ from the stock system's; "" if they do not."""
    if other.difference:
        return other.difference
    if stock.outputs is None or other.outputs is None or stock.outputs == other.outputs:
        return ""
    if len(stock.outputs) != len(other.outputs):
        return f"{len(other.outputs)} outputs instead of {len(stock.outputs)}"
    wrong = [i for i, (a, b) in enumerate(zip(stock.outputs, other.outputs)) if a != b]
    a, b = stock.outputs[wrong[0]], other.outputs[wrong[0]]
    place = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    unit = "character" if isinstance(a, str) else "token"
    return f"{len(wrong)} of {len(stock.outputs)} requests, the first at {unit} {place} of request {wrong[0]}"


def since(before: SideSteps, after: SideSteps) -> SideSteps:
    """Return the steps between two counts."""
    unsplit = {why: count - before.unsplit.get(why, 0) for why, count in after.unsplit.items()}
    unsplit = {why: count for why, count in unsplit.items() if count}
    return replace(after, split=after.split - before.split, unsplit=unsplit)
