"""`NodeRunner`: a server per side on two emulated nodes, as on two machines, under the engine's own load.

Contract
- Node 0 runs the HTTP server and rank 0, node 1 rank 1 (`--nnodes 2 --node-rank 0|1`). All sides' servers are alive at
  once, each rank on its share of the cores, the same for all sides.
- The engine's own load generator runs on node 0. Its process lives as long as the comparison, so that it imports once.
- The generated texts of a pass are compared; each pass has prompts of its own.
- Compute alone is one more server, whose collectives return at once (`muted`). The network alone is what this server
  noted, sent again by two ranks with nothing else to do.
- `strategy: auto` decides at start, so its server is started anew in each part.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from dynaflow_serving.bench.engines import Engine
from dynaflow_serving.bench.environment import cores_of_ranks, device_name, usable_cores
from dynaflow_serving.bench.link import ADDRESSES, NODES, Link
from dynaflow_serving.bench.muted import messages, prepare
from dynaflow_serving.bench.process import ChildProcess, EngineProcessError, ask_all, here
from dynaflow_serving.bench.runner.base import COMPUTE, NETWORK, PassResult, Progress, Runner, SideSteps
from dynaflow_serving.bench.serving.loads import Load
from dynaflow_serving.bench.serving.server import Server, free_port
from dynaflow_serving.bench.serving.server_metrics import read_metrics, reason_not_stock, steps_between
from dynaflow_serving.bench.serving.tool import ClientJob, Node, ServingTool
from dynaflow_serving.bench.settings import EngineSettings
from dynaflow_serving.bench.sides import Side

METRICS_SECONDS = 1.5  # within this time, a worker's counters are at /metrics
LOOK_SECONDS = 0.2  # so often it is looked whether all servers of a pass are alive
PASS_SECONDS = 600.0


class NodeRunner(Runner):
    """Runs the sides as servers on two nodes."""

    def __init__(
        self,
        sides: Sequence[Side],
        engine: Engine,
        tool: ServingTool,
        settings: EngineSettings,
        load: Load,
        environment: Mapping[str, str],
        work: Path,
        link: Link,
        settle_seconds: float,
    ) -> None:
        """Prepare to start.

        Args:
            sides: The sides, the stock engine first.
            engine: The facts of the engine.
            tool: Its server and its load generator.
            settings: The settings of all servers, without DynaFlow.
            load: The requests of every pass.
            environment: The variables to add to the environment of servers and load generator.
            work: The folder for logs and results.
            link: Joins the two nodes.
            settle_seconds: The rest before each pass.
        """
        super().__init__(sides)
        self._engine, self._tool, self._settings, self._load = engine, tool, settings, load
        self._environment, self._work, self._link = {**environment, **tool.variables}, work, link
        self.settle_seconds = settle_seconds
        self._stack = contextlib.ExitStack()
        self._servers: dict[str, list[Server]] = {}
        self._replays: list[ChildProcess] = []
        self._part = 0
        self._noted = 0
        self._ended: dict[str, float] = {}  # when the last pass of a server ended

    @property
    def stages(self) -> int:
        return 1 + len([s for s in self.sides if not s.decides]) + 1

    def start(self, progress: Progress) -> None:
        self.release, self.device = self._tool.version(), device_name()
        self._client = self._child("load-generator", "client", self._engine.tool, 0, self._environment)
        for side in self.sides:
            if not side.decides:
                self._launch(side.name, side)
        self._launch(COMPUTE, self.sides[0], prepare(self._work / "muted"))
        progress("start the load generator")
        for name, servers in self._servers.items():
            progress(f"start servers: {name if name != COMPUTE else 'compute alone'}")
            self._wait(servers)
        address, port = ADDRESSES[0], str(free_port(ADDRESSES[0]))
        for rank in range(NODES):
            where = {"RANK": str(rank), "WORLD_SIZE": str(NODES), "MASTER_ADDR": address, "MASTER_PORT": port}
            environment = {**self._environment, **self._link.environment(rank), **where, "OMP_NUM_THREADS": "1"}
            self._replays.append(self._child(f"network-alone-{rank}", "replay", "", rank, environment))
        ask_all(self._replays, "start")

    def begin_part(self) -> None:
        self._part += 1
        for side in self.sides:
            if side.decides:
                for server in self._servers.pop(side.name, []):
                    server.stop()
                self._launch(side.name, side)
                self._wait(self._servers[side.name])

    def run(self, side: Side, number: int) -> PassResult:
        result = self._send(side.name, number)
        content = result.read_text()
        figures = self._tool.figures(content, self._load)
        why = f" The first error: {next(iter(figures.errors))}" if figures.errors else ""
        failed = f"{figures.failed} of {self._load.requests} requests failed.{why}" if figures.failed else ""
        if side.config is None and not failed:
            failed = reason_not_stock(read_metrics(self._servers[side.name][0].metrics()))
        return PassResult(figures.seconds, outputs=self._tool.texts(json.loads(content)), failed=failed)

    def steps(self, side: Side) -> SideSteps:
        time.sleep(max(0.0, self._ended[side.name] + METRICS_SECONDS - time.monotonic()))
        steps = steps_between([], read_metrics(self._servers[side.name][0].metrics()))
        return SideSteps(split=steps.total_split, unsplit=steps.unsplit)

    @property
    def alone(self) -> Mapping[str, Callable[[int], float]]:
        return {COMPUTE: self._compute_alone, NETWORK: self._network_alone}

    def _compute_alone(self, number: int) -> float:
        self._noted = len(messages(self._work / "muted"))
        time.sleep(self.settle_seconds)
        return self._tool.figures(self._send(COMPUTE, number).read_text(), self._load).seconds

    def _network_alone(self, number: int) -> float:
        """Send what the latest pass of compute alone has noted; before the first one, what its start has."""
        noted = messages(self._work / "muted")
        return max(map(float, ask_all(self._replays, "run", messages=noted[self._noted :] or noted)))

    def close(self) -> None:
        for process in self._replays:
            process.tell("close")
        for servers in self._servers.values():
            for server in servers:
                server.terminate()
        self._stack.close()

    # -- processes ---------------------------------------------------------------------------------------
    def _child(self, name: str, kind: str, driven: str, node: int, environment: Mapping[str, str]) -> ChildProcess:
        placed = partial(self._link.command, node) if node else here
        process = ChildProcess(name, kind, driven, environment, self._work / f"{name}.log", placed)
        self._stack.callback(process.kill)
        return process

    def _launch(self, name: str, side: Side, more: Mapping[str, str] | None = None) -> None:
        """Start the servers of a side on both nodes, without waiting for them."""
        settings, port, master = replace(self._settings, dynaflow=side.content), free_port(), free_port(ADDRESSES[0])
        shares = cores_of_ranks(usable_cores(), NODES).split("|")
        self._servers[name] = servers = []
        for rank in range(NODES):
            node = Node(rank, NODES, ADDRESSES[0], master)
            words = self._tool.server(settings, port, gpu=False, node=node)
            bound = self._tool.bound_to(shares[rank])
            environment = {**self._environment, **self._link.environment(rank), **bound, **(more or {})}
            log = self._work / f"{name.replace(' ', '-')}-{self._part}-node{rank}.log"
            servers.append(Server(f"{name}, node {rank}", self._link.command(rank, *words), port, environment, log))
            self._stack.callback(servers[-1].stop)

    def _wait(self, servers: Sequence[Server]) -> None:
        servers[0].wait(besides=servers[1:])

    def _send(self, name: str, number: int) -> Path:
        """Have the load generator send one pass, and return the file of its result."""
        servers = self._servers[name]
        result = self._work / f"{name.replace(' ', '-')}-{self._part}-{number}.json"
        seed = 1000 * self._part + number
        job = ClientJob(self._settings.model, servers[0].port, self._load, seed, dataset=None, result=result)
        self._client.tell("run", words=self._tool.client_words(job))
        end = time.monotonic() + PASS_SECONDS
        while not self._client.answered(LOOK_SECONDS):
            for server in servers:
                server.assert_alive()
            if time.monotonic() > end:
                raise EngineProcessError(f"the load generator did not end within {PASS_SECONDS:.0f} s against {name}")
        self._client.answer("run")
        self._ended[name] = time.monotonic()
        return result
