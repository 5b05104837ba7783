"""Stock engine against DynaFlow engine, on the same requests, in turn.

Contract
- Both engines are alive at once, each in its own process; one works at a time.
- Each engine first runs a warm-up pass, which is compared but not timed. Then pairs of passes follow. The order within
  a pair alternates (baseline first, DynaFlow first, ...), so that a drift of the machine cancels.
- Every pass has its own prompts (see `settings`), the same for both engines, and all their tokens are compared.
- The counters are zeroed after the warm-up, so `Engagement` tells about the timed passes only.
- Whatever happens, no process is left behind.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynaflow_serving.bench.process import EngineProcess
from dynaflow_serving.bench.settings import EngineSettings, Traffic, requests_of_pass
from dynaflow_serving.core.measurement import in_turn
from dynaflow_serving.session.report import WorkerReport

BASELINE, DYNAFLOW = "baseline", "dynaflow"
SIDES = (BASELINE, DYNAFLOW)
Progress = Callable[[str], None]


@dataclass(frozen=True)
class OfflineBenchmark:
    """The comparison that `compare` runs.

    Attributes:
        driver: The `module:class` of the `EngineDriver`.
        settings: The settings of both engines, without DynaFlow.
        dynaflow: The content of the config file for the second engine.
        traffic: The requests of every pass.
        pairs: The number of timed pairs.
        environment: The variables to add to both engines' environment.
        logs: The folder of the engines' logs.
        settle_seconds: The rest before each pass (idle workers of vLLM spin for 1 s).
    """

    driver: str
    settings: EngineSettings
    dynaflow: dict[str, Any]
    traffic: Traffic
    pairs: int
    environment: Mapping[str, str]
    logs: Path
    settle_seconds: float = 0.0

    @property
    def stages(self) -> int:
        """How often `compare` calls its `progress`."""
        return 2 + 2 * (1 + self.pairs) + 1


@dataclass(frozen=True)
class PassPair:
    """One timed pass of each engine.

    Attributes:
        order: The names of the engines as they took turns.
        seconds: The duration of each engine's pass, by its name.
    """

    order: Sequence[str]
    seconds: dict[str, float]

    @property
    def ratio(self) -> float:
        """DynaFlow's throughput over the baseline's."""
        return self.seconds[BASELINE] / self.seconds[DYNAFLOW]


@dataclass(frozen=True)
class Mismatch:
    """The first request of a pass whose tokens differ."""

    pass_number: int
    requests: int  # how many differ in this pass
    request: int
    position: int


@dataclass(frozen=True)
class Engagement:
    """DynaFlow's steps in the timed passes, by its own report.

    Attributes:
        strategy: The strategy's name.
        mode: How the engine runs the plans, in its own words.
        split: The number of split steps.
        unsplit: The number of un-split steps by reason.
        plan_hash: The digest of the plans.
        ranks_agree: Whether all ranks report the same steps and plans; the figures above are rank 0's.
    """

    strategy: str
    mode: str
    split: int
    unsplit: dict[str, int]
    plan_hash: str
    ranks_agree: bool

    @staticmethod
    def from_reports(reports: list[WorkerReport]) -> Engagement:
        """Return what the reports of all ranks say, rank 0's first."""

        first = reports[0]
        return Engagement(
            strategy=first.strategy,
            mode=first.mode,
            split=first.steps.split,
            unsplit=dict(Counter(first.steps.unsplit).most_common()),
            plan_hash=first.plan_hash,
            ranks_agree=all((r.steps, r.plan_hash) == (first.steps, first.plan_hash) for r in reports),
        )


@dataclass(frozen=True)
class OfflineResult:
    """Everything that a comparison of two engines has found."""

    engine_version: str
    device: str
    traffic: Traffic
    pairs: list[PassPair]
    mismatches: list[Mismatch]
    engagement: Engagement


def compare(benchmark: OfflineBenchmark, progress: Progress) -> OfflineResult:
    """Run both engines in turn and return what was found.

    Args:
        benchmark: What to run.
        progress: Told what begins, `benchmark.stages` times.

    Raises:
        EngineProcessError: An engine failed.
    """
    with contextlib.ExitStack() as stack:
        engines = {}
        for name in SIDES:  # both processes first: while one starts its engine, the other imports
            log = benchmark.logs / f"{name}.log"
            engines[name] = EngineProcess(name, benchmark.driver, benchmark.environment, log=log)
            stack.callback(engines[name].kill)
        for name, dynaflow in ((BASELINE, None), (DYNAFLOW, benchmark.dynaflow)):
            progress(f"start {name} engine")
            info = engines[name].start(replace(benchmark.settings, dynaflow=dynaflow))
        pairs, mismatches = [], []
        for number in range(1 + benchmark.pairs):
            requests = requests_of_pass(benchmark.traffic, info.vocabulary, number)
            order = in_turn(SIDES, number + 1)  # pass 1, the first pair, begins with the baseline
            stage = f"pair {number} of {benchmark.pairs}" if number else "warm-up"
            seconds, tokens = {}, {}
            for name in order:
                progress(f"{stage}: {name}")
                time.sleep(benchmark.settle_seconds)
                seconds[name], tokens[name] = engines[name].generate(requests)
            if found := _difference(number, tokens[BASELINE], tokens[DYNAFLOW]):
                mismatches.append(found)
            if number:
                pairs.append(PassPair(order, seconds))
            else:
                engines[DYNAFLOW].reset()
        reports = engines[DYNAFLOW].report()
        progress("stop engines")
        for engine in engines.values():
            engine.close()
    return OfflineResult(
        engine_version=info.version,
        device=info.device,
        traffic=benchmark.traffic,
        pairs=pairs,
        mismatches=mismatches,
        engagement=Engagement.from_reports(reports),
    )


def _difference(number: int, expected: list[list[int]], found: list[list[int]]) -> Mismatch | None:
    """Return where the tokens of a pass first differ; None if they are equal."""
    differing = [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
    if not differing:
        return None
    a, b = expected[differing[0]], found[differing[0]]
    position = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return Mismatch(pass_number=number, requests=len(differing), request=differing[0], position=position)
