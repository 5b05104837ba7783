"""The executor that runs no tensor: it returns the Simulation that the plan would have.

Contract
- It is bound and called like every other executor, so a PlanCache drives it. Only time is simulated: the strategy's
  split, the recording, the lowering and the verification are the real ones.
- Its program's only argument is the `Batch`, its only result the `Simulation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dynaflow_serving.capture.program import CapturedProgram, Enter
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.core.plan import Plan
from dynaflow_serving.executor.base import BoundPlan, Executor
from dynaflow_serving.executor.tracing import Tracer
from dynaflow_serving.simulate.cost import RooflineCosts
from dynaflow_serving.simulate.device import Topology
from dynaflow_serving.simulate.engine import Simulation, simulate
from dynaflow_serving.simulate.kernel_models import workloads
from dynaflow_serving.simulate.model import DecoderModel


class SimulatedExecutor(Executor):
    """Runs a plan in the simulator, on the kernels of a decoder."""

    name = "simulated"

    def __init__(self, model: DecoderModel, topology: Topology, graphs: bool = True) -> None:
        super().__init__()
        self._model, self._topology, self._graphs = model, topology, graphs

    def _bind(
        self, captured: CapturedProgram, plan: Plan, kernels: Mapping[str, Callable[..., Any]], tracer: Tracer | None
    ) -> BoundPlan:
        def run(args: Sequence[Any], bounds: Sequence[int], enter: Enter) -> list[Simulation]:
            batch: Batch = args[0]
            costs = RooflineCosts(
                topology=self._topology,
                work=self._model.work,
                widths=self._model.widths,
                workloads=workloads(batch, bounds),
                graphs=self._graphs,
            )
            return [simulate(plan, costs.demands(plan))]

        return BoundPlan(plan, run, tracer=tracer)
