"""An embedded example behind the interface of an engine's driver, so that `dynaflow tune` treats both alike.

Contract
- The example runs on the CPU of this machine. A step runs its Program on as many rows as the batch has tokens. There is
  no KV cache, so context is ignored.
- The driver tunes at its start, and serves nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from dynaflow_serving.bench.drivers import EngineInfo
from dynaflow_serving.bench.environment import device_name
from dynaflow_serving.bench.settings import EngineSettings, Request
from dynaflow_serving.capture.examples import HIDDEN, example_capture
from dynaflow_serving.config import load
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.policy.bucket import Limits, representatives
from dynaflow_serving.policy.calls import tune_calls
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.policy.table import Table
from dynaflow_serving.session.session import Session

LIMITS = Limits(tokens=2048, requests=16, length=2048, cached=1 << 20)


class Example:
    """An embedded example under a config, with steps as an engine has them."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        loaded = load(config)
        self.name = name
        self.session = Session(build_selector(loaded), loaded)
        self.plan_cache = self.session.add(example_capture(name))

    def step(self, batch: Batch, rows: torch.Tensor) -> Any:
        with self.session.step(batch) as step:
            return self.plan_cache.run((len(rows), rows), step.split, traced=step.to_trace)

    @torch.no_grad()
    def tune(self, limits: Limits = LIMITS) -> Table:
        calls = [
            (batch, functools.partial(self.step, batch, torch.randn(sum(batch.tokens), HIDDEN)))
            for batch in representatives(limits)
        ]
        return tune_calls(
            self.session, calls, self.plan_cache.captured.constants, {"engine": "example", "model": self.name}
        )


class ExampleDriver:
    """An `EngineDriver` of an embedded example."""

    def __init__(self) -> None:
        self.example: Example | None = None

    def start(self, settings: EngineSettings) -> EngineInfo:
        assert settings.dynaflow is not None
        self.example = Example(settings.model, settings.dynaflow)
        self.example.tune()
        return EngineInfo(torch.__version__, 0, device_name())

    def generate(self, requests: list[Request]) -> list[list[int]]:
        raise ConfigError("an embedded example has no tokens to generate: give a model directory")

    def report(self) -> list[dict[str, Any]]:
        return [] if self.example is None else [self.example.session.report().model_dump(mode="json")]

    def reset(self) -> None:
        if self.example is not None:
            self.example.session.reset()

    def close(self) -> None:
        if self.example is not None:
            self.example.session.close()
