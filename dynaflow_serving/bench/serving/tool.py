"""The interface to an engine's server and its load generator; each engine has a file (`vllm_tool`, `sglang_tool`).

Contract
- A tool only writes command lines and reads a result: `server` and `run` start the processes.
- The two servers of a comparison differ in `EngineSettings.dynaflow` alone, and get the same arguments as the offline
  engines of `drivers.EngineDriver`.
- `PassFigures` has the same units for all engines: seconds, tokens, requests; latencies in milliseconds.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from dynaflow_serving.bench.serving.loads import Load
from dynaflow_serving.bench.settings import EngineSettings
from dynaflow_serving.errors import DynaflowError

HOST = "127.0.0.1"
LATENCIES = ("ttft", "tpot", "itl", "e2e")
STATISTICS = ("mean", "median", "p99")


@dataclass(frozen=True)
class PassFigures:
    """One pass, as the engine's tool measured it.

    Attributes:
        completed: The number of completed requests.
        failed: The number of the others.
        seconds: The duration of the pass.
        input_tokens: The tokens of all prompts.
        output_tokens: The tokens of all outputs.
        requests_per_s: Completed requests per second.
        output_tokens_per_s: Output tokens per second.
        total_tokens_per_s: Tokens per second, prompts included.
        latencies: Milliseconds over the completed requests by name, such as "ttft median"; None where there is none.
        errors: The messages of failed requests, each with how often it came.
    """

    completed: int
    failed: int
    seconds: float
    input_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    latencies: dict[str, float | None]
    errors: dict[str, int]


@dataclass(frozen=True)
class Node:
    """One of several nodes that one server runs on, with a rank each.

    Attributes:
        rank: The number of the node; node 0 has the HTTP server.
        count: The number of nodes.
        address: The address of node 0, as the others reach it.
        port: The port there at which the ranks meet.
    """

    rank: int
    count: int
    address: str
    port: int


@dataclass(frozen=True)
class ClientJob:
    """One pass for the load generator.

    Attributes:
        model: The model's name or folder.
        port: The port of the server.
        load: The requests.
        seed: The seed of the requests and of their arrival times.
        dataset: The ShareGPT-like file, if the load is of that kind.
        result: The file for the tool's result.
    """

    model: str
    port: int
    load: Load
    seed: int
    dataset: Path | None
    result: Path


class ServingTool(Protocol):
    variables: Mapping[str, str]
    """Environment variables that the server needs beside those of `Engine.environment`."""

    def version(self) -> str:
        """Return the engine's version.

        Raises:
            DynaflowError: The engine is not installed.
        """

    def server(self, settings: EngineSettings, port: int, *, gpu: bool, node: Node | None = None) -> list[str]:
        """Return the command line of the HTTP server, or of its part on a node."""

    def bound_to(self, cores: str) -> dict[str, str]:
        """Return the variables that bind the rank of a node to cores such as "0,1"."""

    def client(self, job: ClientJob) -> list[str]:
        """Return the command line of the load generator, which writes `job.result`."""

    def client_words(self, job: ClientJob) -> list[str]:
        """Return the arguments of that command line."""

    def run_client(self, words: list[str]) -> None:
        """Run the load generator in this process, with the arguments `words`."""

    def texts(self, result: Mapping[str, Any]) -> list[str]:
        """Return the texts that were generated, in the order of the requests."""

    def figures(self, content: str, load: Load) -> PassFigures:
        """Read the content of `job.result`."""


def load_tool(path: str) -> ServingTool:
    """Return an instance of the class at `module:class`."""
    module, _, name = path.partition(":")
    tool: ServingTool = getattr(importlib.import_module(module), name)()
    return tool


def installed(package: str) -> str:
    """Return the version of a package.

    Raises:
        DynaflowError: The package is not installed.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise DynaflowError(
            f"{package} is not installed in the environment of {sys.executable}, so its servers cannot be benchmarked "
            f"here. Install it (pip install 'dynaflow-serving[{package}]'), or run the command of an environment that "
            "has it."
        ) from None


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Write `{"tp_size": 2, "sleep_on_idle": True}` as the words of `--tp-size 2 --sleep-on-idle`; dicts are JSON."""
    words: list[str] = []
    for name, value in arguments.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words


def read_figures(result: Mapping[str, Any], load: Load, *, total: str, e2e: str) -> PassFigures:
    """Read the fields that both engines' tools share.

    Args:
        result: The tool's result.
        load: The requests that were sent.
        total: The name of the field of tokens per second, prompts included.
        e2e: The name of the end-to-end latency in its fields.
    """
    names = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2e": e2e}
    return PassFigures(
        completed=result["completed"],
        failed=load.requests - result["completed"],
        seconds=result["duration"],
        input_tokens=result["total_input_tokens"],
        output_tokens=result["total_output_tokens"],
        requests_per_s=result["request_throughput"],
        output_tokens_per_s=result["output_throughput"],
        total_tokens_per_s=result[total],
        latencies={
            f"{latency} {statistic}": _positive(result[f"{statistic}_{names[latency]}_ms"])
            for latency in LATENCIES
            for statistic in STATISTICS
        },
        errors=dict(Counter(_first_line(e) for e in result.get("errors", []) if e)),
    )


def _positive(value: float | None) -> float | None:
    """Return None for 0 and NaN, which mean that there was nothing to measure (such as the ITL of one token)."""
    return None if value is None or math.isnan(value) or value <= 0 else float(value)


def _first_line(message: str) -> str:
    """Return the line of a message that says what happened: of a traceback the last one."""
    lines = [line.strip() for line in message.strip().splitlines()] or [""]
    return (lines[-1] if lines[0].startswith("Traceback") else lines[0])[:300]
