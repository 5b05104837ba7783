"""`RankRunner`: ranks as torchrun starts them, each of which holds the model and all sides.

Contract
- With a link each rank is on its own node. Otherwise all are on this machine.
- The time of a pass is that of the slowest rank. Outputs are compared on every rank.
- If a rank dies, the others are ended: they would wait for it for ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from dynaflow_serving.bench.environment import device_name, usable_cores
from dynaflow_serving.bench.link import ADDRESSES, Link
from dynaflow_serving.bench.process import ChildProcess, ask_all, here
from dynaflow_serving.bench.runner.base import COMPUTE, NETWORK, PassResult, Progress, Runner, SideSteps, steps_of
from dynaflow_serving.bench.serving.server import free_port
from dynaflow_serving.bench.serving.tool import HOST
from dynaflow_serving.bench.sides import Side
from dynaflow_serving.integrations.base import WorkloadSettings
from dynaflow_serving.session.report import WorkerReport


class RankRunner(Runner):
    """Runs the sides in rank processes."""

    def __init__(
        self,
        sides: Sequence[Side],
        workload: str,
        settings: WorkloadSettings,
        ranks: int,
        environment: Mapping[str, str],
        logs: Path,
        link: Link | None,
    ) -> None:
        """Prepare to start.

        Args:
            sides: The sides, the stock system first.
            workload: The `module:class` of the `Workload`.
            settings: What it is asked to run.
            ranks: The number of ranks; with a link one per node.
            environment: The variables to add to the ranks' environment.
            logs: The folder of the ranks' logs.
            link: Joins the two nodes; None if all ranks are on this machine.
        """
        super().__init__(sides)
        self._workload, self._settings, self._ranks, self._link = workload, settings, ranks, link
        self._environment, self._logs = environment, logs
        self._stack = contextlib.ExitStack()
        self._processes: list[ChildProcess] = []
        self._communicates = False
        self._started = False

    @property
    def stages(self) -> int:
        return 1

    def start(self, progress: Progress) -> None:
        progress("start ranks: load the model, capture its graphs")
        master = ADDRESSES[0] if self._link else HOST
        threads = max(1, len(usable_cores()) // self._ranks)
        common = {**self._environment, "MASTER_ADDR": master, "MASTER_PORT": str(free_port(master))}
        common |= {"OMP_NUM_THREADS": str(threads), "WORLD_SIZE": str(self._ranks)}
        for rank in range(self._ranks):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            placed = here
            if self._link is not None:
                environment |= self._link.environment(rank)
                placed = partial(self._link.command, rank)
            log = self._logs / f"rank{rank}.log"
            process = ChildProcess(f"rank {rank}", "rank", self._workload, environment, log, placed)
            self._stack.callback(process.kill)
            self._processes.append(process)
        configs = {side.name: side.content for side in self.sides}
        settings = asdict(self._settings)
        first, *_ = self._ask("start", settings=settings, sides=configs, ranks=self._ranks, threads=threads)
        self.release, self.device, self._communicates = first["release"], device_name(), first["communicates"]
        self._started = True

    def begin_part(self) -> None:
        for side in self.sides:
            if side.decides:
                self._ask("tune", side=side.name)

    def run(self, side: Side, number: int) -> PassResult:
        replies = self._ask("run", side=side.name)
        worst = max(replies, key=lambda r: r["apart"] if r["apart"] == r["apart"] else float("inf"))
        equal = all(r["equal"] for r in replies)
        return PassResult(
            seconds=max(r["seconds"] for r in replies),
            difference="" if equal else f"the outputs differ by {worst['apart']:.1e} of their greatest magnitude",
        )

    def steps(self, side: Side) -> SideSteps:
        return steps_of([WorkerReport.model_validate(r) for r in self._ask("steps", side=side.name)])

    @property
    def alone(self) -> Mapping[str, Callable[[int], float]]:
        return {what: partial(self._alone, what) for what in (COMPUTE, NETWORK)} if self._communicates else {}

    def _alone(self, what: str, number: int) -> float:
        return max(map(float, self._ask("alone", what=what)))

    def details(self, side: Side) -> dict[str, Any]:
        """Return the Program, the plan, and the operators' times in turn: what a prediction needs."""
        if side.micro_batches < 2 or not self._communicates or self._settings.training:
            return {}
        details: dict[str, Any] = self._ask("details", side=side.name, micro_batches=side.micro_batches)[0]
        return details

    def close(self) -> None:
        if self._started:
            for process in self._processes:
                process.tell("close")
        for process in self._processes:
            process.close()
        self._stack.close()

    def _ask(self, action: str, **arguments: Any) -> list[Any]:
        """Have all ranks do the same, and return their answers, rank 0's first."""
        return ask_all(self._processes, action, **arguments)
