"""Baseline server against DynaFlow server, load by load, in turn.

Contract
- Both servers are alive at once; one works at a time, and the load generator beside it.
- Each load begins with a warm-up pass per side, which is shown but not counted, so that no cold start is in a figure.
  Then pairs of passes follow. Their order alternates (baseline first, DynaFlow first, ...), so that a drift of the
  machine cancels.
- Every pass is returned with the answers of both /metrics: nothing that was measured is dropped.
- Whatever happens, no process is left behind.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynaflow_serving.bench.serving.loads import Load, ShareGPT, seed_of_pass, sharegpt_for
from dynaflow_serving.bench.serving.server import Server, free_port, run_beside, terminated_as_exit
from dynaflow_serving.bench.serving.server_metrics import MetricSample, ServedSteps, read_metrics, steps_between
from dynaflow_serving.bench.serving.tool import ClientJob, PassFigures, ServingTool
from dynaflow_serving.bench.settings import EngineSettings
from dynaflow_serving.core.measurement import in_turn

Progress = Callable[[str], None]

BASELINE, DYNAFLOW = "baseline", "dynaflow"
SIDES = (BASELINE, DYNAFLOW)
PASS_SECONDS = 3600.0
METRICS_SECONDS = 1.5  # within this time, a worker's counters are at /metrics


@dataclass(frozen=True)
class ServingBenchmark:
    """The comparison that `serve_in_turn` runs.

    Attributes:
        tool: The engine's server and load generator.
        settings: The settings of both servers, without DynaFlow.
        dynaflow: The content of the config file for the second server.
        loads: The loads, one after the other.
        pairs: The number of counted pairs per load.
        seed: The seed that those of the passes are made from.
        gpu: Whether the servers run on GPUs.
        environment: The variables to add to the environment of servers and load generators.
        work: The folder for logs, data sets and the tool's results.
        settle_seconds: The rest before each pass.
    """

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
class ServedPass:
    """One pass of one side.

    Attributes:
        load: The index of its load in the benchmark's loads.
        pair: The number of its pair; 0 is the warm-up.
        side: `BASELINE` or `DYNAFLOW`.
        figures: What the load generator measured.
        steps: The steps that the server counted during the pass.
        metrics: All of DynaFlow's samples on this side after the pass, on the baseline before it too.
    """

    load: int
    pair: int
    side: str
    figures: PassFigures
    steps: ServedSteps
    metrics: list[MetricSample]


@dataclass(frozen=True)
class ServingPasses:
    """All passes, and the commands that ran them."""

    passes: list[ServedPass]
    server_commands: dict[str, list[str]]
    client_commands: list[list[str]]  # of the first counted pass of each load


def serve_in_turn(benchmark: ServingBenchmark, progress: Progress) -> ServingPasses:
    """Run both servers in turn and return all passes.

    Args:
        benchmark: What to run.
        progress: Told what begins, `benchmark.stages` times.

    Raises:
        EngineProcessError: A server or a load generator failed.
    """
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
        passes: list[ServedPass] = []
        clients: list[list[str]] = []
        for index, load in enumerate(benchmark.loads):
            for pair in range(1 + benchmark.pairs):
                job = _job(benchmark, index, pair, sharegpt)
                stage = f"{load.name}: {f'pair {pair} of {benchmark.pairs}' if pair else 'warm-up'}"
                for side in in_turn(SIDES, pair + 1):  # pair 1 begins with the baseline
                    progress(f"{stage}: {side}")
                    time.sleep(benchmark.settle_seconds)
                    mine = replace(job, port=servers[side].port, result=benchmark.work / f"{index}-{pair}-{side}.json")
                    passes.append(_pass(benchmark, mine, servers[side], index, pair))
                    if pair == 1 and side == BASELINE:
                        clients.append(tool.client(mine))
        progress("stop servers")
    commands = {side: server.command for side, server in servers.items()}
    return ServingPasses(passes, server_commands=commands, client_commands=clients)


def _job(benchmark: ServingBenchmark, index: int, pair: int, sharegpt: ShareGPT | None) -> ClientJob:
    """Return the pass for the load generator; each side sets its own port and result."""
    load, seed = benchmark.loads[index], seed_of_pass(benchmark.seed, index, pair)
    dataset = None
    if load.dataset == "sharegpt" and sharegpt is not None:
        dataset = benchmark.work / f"sharegpt-{index}-{pair}.json"
        sharegpt.write(dataset, load, seed)
    return ClientJob(
        model=benchmark.settings.model, port=0, load=load, seed=seed, dataset=dataset, result=benchmark.work
    )


def _pass(benchmark: ServingBenchmark, job: ClientJob, server: Server, index: int, pair: int) -> ServedPass:
    before = read_metrics(server.metrics())
    name = f"the load generator ({job.load.name}, against {server.name})"
    command = benchmark.tool.client(job)
    run_beside(name, command, benchmark.environment, job.result.with_suffix(".log"), PASS_SECONDS)
    time.sleep(METRICS_SECONDS)
    after = read_metrics(server.metrics())
    figures = benchmark.tool.figures(job.result.read_text(), job.load)
    metrics = [*before, *after] if server.name == BASELINE else after
    return ServedPass(
        load=index,
        pair=pair,
        side=server.name,
        figures=figures,
        steps=steps_between(before, after),
        metrics=metrics,
    )
