"""The interface between a child process and its engine.

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
    """The facts that a started engine reports of itself."""

    version: str
    vocabulary: int  # prompts hold token ids below this
    device: str  # in words, such as "NVIDIA H100 80GB HBM3"


class EngineDriver(Protocol):
    """Drives one engine through its public API."""

    def start(self, settings: EngineSettings) -> EngineInfo:
        """Start the engine; return when it can serve."""

    def generate(self, requests: list[Request]) -> list[list[int]]:
        """Run the requests and return the new tokens of each."""

    def report(self) -> list[dict[str, Any]]:
        """Return the `WorkerReport` of every rank as plain data, counted since `reset`."""

    def reset(self) -> None:
        """Zero the counters of the report."""

    def close(self) -> None:
        """End the engine, if it was started."""


def load(path: str) -> Any:
    """Return the class, or whatever else is at `module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def load_driver(path: str) -> EngineDriver:
    """Return an instance of the class at `module:class`."""
    driver: EngineDriver = load(path)()
    return driver
