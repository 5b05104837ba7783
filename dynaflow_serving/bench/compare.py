"""Stock engine against DynaFlow engine, on the same requests, in turn.

Contract
- Both engines are alive at once, each in its own process; one works at a time.
- A warm-up pass each is compared but not timed. Then pairs of passes; the order within a pair alternates
  (baseline first, DynaFlow first, ...), so that a drift of the machine cancels.
- Every pass has its own prompts (see `settings`), the same for both engines; all their tokens are compared.
- Counters are zeroed after the warm-up: `Engagement` tells about the timed passes only.
- Whatever happens, no process is left behind.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynaflow_serving.bench.process import EngineProcess
from dynaflow_serving.bench.settings import EngineSettings, Request, Traffic, requests_of_pass

BASELINE, DYNAFLOW = "baseline", "dynaflow"
ORDERS = ((BASELINE, DYNAFLOW), (DYNAFLOW, BASELINE))
Progress = Callable[[str], None]


@dataclass(frozen=True)
class OfflineBenchmark:
    """What `compare` is to run. `settle_seconds` of rest come before each pass (idle workers of vLLM spin for 1 s)."""

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
class Pair:
    order: tuple[str, str]
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
    """What DynaFlow says it did in the timed passes: rank 0's report, and whether all ranks agree."""

    strategy: str
    mode: str
    split: int
    unsplit: dict[str, int]
    plan_hash: str
    ranks_agree: bool

    @staticmethod
    def of(reports: list[dict[str, Any]]) -> Engagement:
        def facts(report: dict[str, Any]) -> tuple[Any, ...]:
            return report["steps"], report["plan_hash"]

        first = reports[0]
        return Engagement(
            strategy=first["strategy"],
            mode=first["mode"],
            split=first["steps"]["split"],
            unsplit=dict(Counter(first["steps"]["unsplit"]).most_common()),
            plan_hash=first["plan_hash"],
            ranks_agree=all(facts(r) == facts(first) for r in reports),
        )


@dataclass(frozen=True)
class Comparison:
    engine_version: str
    device: str
    traffic: Traffic
    pairs: list[Pair]
    mismatches: list[Mismatch]
    engagement: Engagement


def compare(benchmark: OfflineBenchmark, progress: Progress) -> Comparison:
    """Run it. `progress` is told what begins. Raises `EngineProcessError`."""
    with contextlib.ExitStack() as stack:
        engines = {}
        for name in (BASELINE, DYNAFLOW):  # both processes first: while one starts its engine, the other imports
            engines[name] = EngineProcess(name, benchmark.driver, benchmark.environment, benchmark.logs / f"{name}.log")
            stack.callback(engines[name].kill)
        for name, dynaflow in ((BASELINE, None), (DYNAFLOW, benchmark.dynaflow)):
            progress(f"start {name} engine")
            info = engines[name].start(replace(benchmark.settings, dynaflow=dynaflow))
        pairs, mismatches = [], []
        for number in range(1 + benchmark.pairs):
            requests = requests_of_pass(benchmark.traffic, info.vocabulary, number)
            order = ORDERS[(number + 1) % 2]  # pass 1, the first pair, begins with the baseline
            what = f"pair {number} of {benchmark.pairs}" if number else "warm-up"
            seconds, tokens = {}, {}
            for name in order:
                progress(f"{what}: {name}")
                seconds[name], tokens[name] = _rested(engines[name], requests, benchmark.settle_seconds)
            if found := _difference(number, tokens[BASELINE], tokens[DYNAFLOW]):
                mismatches.append(found)
            if number:
                pairs.append(Pair(order, seconds))
            else:
                engines[DYNAFLOW].reset()
        reports = engines[DYNAFLOW].report()
        progress("stop engines")
        for engine in engines.values():
            engine.close()
    return Comparison(info.version, info.device, benchmark.traffic, pairs, mismatches, Engagement.of(reports))


def _rested(engine: EngineProcess, requests: list[Request], rest: float) -> tuple[float, list[list[int]]]:
    time.sleep(rest)
    return engine.generate(requests)


def _difference(number: int, expected: list[list[int]], found: list[list[int]]) -> Mismatch | None:
    differing = [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
    if not differing:
        return None
    a, b = expected[differing[0]], found[differing[0]]
    position = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return Mismatch(number, len(differing), differing[0], position)
