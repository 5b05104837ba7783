"""`EngineRunner`: an engine per side, offline, each in its own process.

Contract
- All engines are alive at once and get the same requests, all at a time; their tokens are compared.
- Every pass has prompts of its own (see `settings`), so that none is found in a prefix cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dynaflow_serving.bench.process import EngineProcess
from dynaflow_serving.bench.runner.base import PassResult, Progress, Runner, SideSteps, steps_of
from dynaflow_serving.bench.settings import EngineSettings, Traffic, requests_of_pass
from dynaflow_serving.bench.sides import Side


class EngineRunner(Runner):
    """Runs the sides in engines."""

    def __init__(
        self,
        sides: Sequence[Side],
        driver: str,
        settings: EngineSettings,
        traffic: Traffic,
        environment: Mapping[str, str],
        logs: Path,
        settle_seconds: float,
    ) -> None:
        """Prepare to start.

        Args:
            sides: The sides, the stock engine first.
            driver: The `module:class` of the `EngineDriver`.
            settings: The settings of all engines, without DynaFlow.
            traffic: The requests of every pass.
            environment: The variables to add to the engines' environment.
            logs: The folder of the engines' logs.
            settle_seconds: The rest before each pass.
        """
        super().__init__(sides)
        self._driver, self._settings, self._traffic = driver, settings, traffic
        self._environment, self._logs, self.settle_seconds = environment, logs, settle_seconds
        self._stack = contextlib.ExitStack()
        self._engines: dict[str, EngineProcess] = {}
        self._vocabulary = 0

    @property
    def stages(self) -> int:
        return len(self.sides)

    def start(self, progress: Progress) -> None:
        for side in self.sides:  # all processes first: while one starts its engine, the others import
            name = side.name.replace(" ", "-")
            process = EngineProcess(side.name, self._driver, self._environment, self._logs / f"{name}.log")
            self._stack.callback(process.kill)
            self._engines[side.name] = process
        for side in self.sides:
            progress(f"start {side.name}")
            info = self._engines[side.name].start(replace(self._settings, dynaflow=side.content))
        self.release, self.device, self._vocabulary = info.version, info.device, info.vocabulary

    def run(self, side: Side, number: int) -> PassResult:
        requests = requests_of_pass(self._traffic, self._vocabulary, number)
        seconds, tokens = self._engines[side.name].generate(requests)
        return PassResult(seconds, outputs=tokens)

    def steps(self, side: Side) -> SideSteps:
        return steps_of(self._engines[side.name].report())

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._stack.close()
