"""Baseline server against DynaFlow server, load by load, in turn.

Contract
- Both servers are alive at once; one works at a time, and the load generator beside it.
- For each load: a warm-up pass per side, which is shown but not counted, so that no cold start is in a figure; then
  pairs of passes, whose order alternates (baseline first, DynaFlow first, ...), so that a drift of the machine cancels.
- Every pass is returned, with what both /metrics said: nothing that was measured is dropped.
- Whatever happens, no process is left behind.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynaflow_serving.bench.compare import BASELINE, DYNAFLOW, ORDERS, Progress
from dynaflow_serving.bench.serving.loads import Load, ShareGPT, seed_of_pass, sharegpt_for
from dynaflow_serving.bench.serving.proof import Sample, Steps, samples, steps_between
from dynaflow_serving.bench.serving.server import Server, free_port, run_beside, terminated_as_exit
from dynaflow_serving.bench.serving.tool import Figures, Job, ServingTool
from dynaflow_serving.bench.settings import EngineSettings

PASS_SECONDS = 3600.0
METRICS_SECONDS = 1.5  # within this time, a worker's counters are at /metrics
SIDES = (BASELINE, DYNAFLOW)


@dataclass(frozen=True)
class ServingBenchmark:
    """What `serve_in_turn` is to run. `work` holds logs, data sets and the tool's results."""

    tool: ServingTool
    settings: EngineSettings
    dynaflow: dict[str, Any]
    loads: Sequence[Load]
    pairs: int
    seed: int
    gpu: bool
    environment: Mapping[str, str]
    work: Path
    settle_seconds: float = 0.0

    @property
    def stages(self) -> int:
        """How often `serve_in_turn` calls its `progress`."""
        return len(SIDES) + len(self.loads) * len(SIDES) * (1 + self.pairs) + 1


@dataclass(frozen=True)
class Pass:
    """One pass of one side. `load` is an index into the benchmark's loads; pair 0 is the warm-up.

    metrics: all of DynaFlow's samples on this side after the pass (the baseline: before and after).
    """

    load: int
    pair: int
    side: str
    figures: Figures
    steps: Steps
    metrics: list[Sample]


@dataclass(frozen=True)
class ServingPasses:
    passes: list[Pass]
    server_commands: dict[str, list[str]]
    client_commands: list[list[str]]  # of the first counted pass of each load


def serve_in_turn(benchmark: ServingBenchmark, progress: Progress) -> ServingPasses:
    """Run it. `progress` is told what begins. Raises `EngineProcessError`."""
    tool = benchmark.tool
    benchmark.work.mkdir(parents=True, exist_ok=True)
    sharegpt = sharegpt_for(benchmark.settings.model) if any(x.dataset == "sharegpt" for x in benchmark.loads) else None
    environment = {**benchmark.environment, **tool.variables}
    with contextlib.ExitStack() as stack:
        stack.enter_context(terminated_as_exit())
        servers: dict[str, Server] = {}
        for side, dynaflow in zip(SIDES, (None, benchmark.dynaflow)):
            progress(f"start {side} server")  # one after the other: an engine measures free memory when it starts
            port = free_port()
            command = tool.server(replace(benchmark.settings, dynaflow=dynaflow), port, gpu=benchmark.gpu)
            servers[side] = Server(side, command, port, environment, benchmark.work / f"{side}.log")
            stack.callback(servers[side].stop)
            servers[side].wait()
        passes: list[Pass] = []
        clients: list[list[str]] = []
        for index, load in enumerate(benchmark.loads):
            for pair in range(1 + benchmark.pairs):
                job = _job(benchmark, index, pair, sharegpt)
                what = f"{load.name}: {f'pair {pair} of {benchmark.pairs}' if pair else 'warm-up'}"
                for side in ORDERS[(pair + 1) % 2]:  # pair 1 begins with the baseline
                    progress(f"{what}: {side}")
                    time.sleep(benchmark.settle_seconds)
                    mine = replace(job, port=servers[side].port, result=benchmark.work / f"{index}-{pair}-{side}.json")
                    passes.append(_pass(benchmark, mine, servers[side], index, pair))
                    if pair == 1 and side == BASELINE:
                        clients.append(tool.client(mine))
        progress("stop servers")
    return ServingPasses(passes, {side: server.command for side, server in servers.items()}, clients)


def _job(benchmark: ServingBenchmark, index: int, pair: int, sharegpt: ShareGPT | None) -> Job:
    """The same for both sides, but for port and result."""
    load, seed = benchmark.loads[index], seed_of_pass(benchmark.seed, index, pair)
    dataset = None
    if load.dataset == "sharegpt" and sharegpt is not None:
        dataset = benchmark.work / f"sharegpt-{index}-{pair}.json"
        sharegpt.write(dataset, load, seed)
    return Job(benchmark.settings.model, 0, load, seed, dataset, benchmark.work)


def _pass(benchmark: ServingBenchmark, job: Job, server: Server, index: int, pair: int) -> Pass:
    before = samples(server.metrics())
    name = f"the load generator ({job.load.name}, against {server.name})"
    command = benchmark.tool.client(job)
    run_beside(name, command, benchmark.environment, job.result.with_suffix(".log"), PASS_SECONDS)
    time.sleep(METRICS_SECONDS)
    after = samples(server.metrics())
    figures = benchmark.tool.figures(job.result.read_text(), job.load)
    metrics = [*before, *after] if server.name == BASELINE else after
    return Pass(index, pair, server.name, figures, steps_between(before, after), metrics)
