"""What a child process asks of an engine.

Contract
- One driver drives one engine, in one process, through the engine's public API.
- `start` returns when the engine can serve; with `EngineSettings.dynaflow` it raises unless DynaFlow is active.
- `generate` decodes greedily to exactly the length that each request asks for.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

from dynaflow_serving.bench.settings import EngineSettings, Request


@dataclass(frozen=True)
class EngineInfo:
    version: str
    vocabulary: int  # prompts hold token ids below this
    device: str  # in words, such as "NVIDIA H100 80GB HBM3"


class Driver(Protocol):
    def start(self, settings: EngineSettings) -> EngineInfo: ...

    def generate(self, requests: list[Request]) -> list[list[int]]:
        """The new tokens of each request."""

    def report(self) -> list[dict[str, Any]]:
        """`dynaflow_report` of every rank, counted since `reset`."""

    def reset(self) -> None:
        """Zero the counters of the report."""

    def close(self) -> None: ...


def load_driver(path: str) -> Driver:
    """An instance of the class at `module:class`."""
    module, _, name = path.partition(":")
    driver: Driver = getattr(importlib.import_module(module), name)()
    return driver
