"""One rank of a `Workload`, in its own process: all sides of the comparison, on the same model and inputs.

Contract
- Every pass begins at a barrier of all ranks, and ends when its outputs are there. Its seconds are this rank's; a rank
  that waits for another one in a collective measures that, too.
- Each pass's outputs are compared with those of the stock system's first pass. They are equal if they differ by less
  than the `tolerance` of the dtype, relative to the greatest magnitude: on some processors a micro-batch takes another
  matmul kernel than its batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist

from dynaflow_serving.bench.alone import Alone
from dynaflow_serving.bench.sides import AUTO, STOCK
from dynaflow_serving.config import Config
from dynaflow_serving.integrations.base import Pass, Workload, WorkloadSettings, WorkloadSide, WorkloadWithPeers
from dynaflow_serving.session.difference import relative_difference

RECOMPILE_LIMIT = 64  # Dynamo's cache has an entry per side


def tolerance(dtype: torch.dtype) -> float:
    """Return by how much equal outputs may differ, relative to the greatest magnitude: the root of the dtype's eps."""
    return float(torch.finfo(dtype).eps ** 0.5) if dtype.is_floating_point else 0.0


def difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> tuple[float, bool]:
    """Return the greatest difference relative to the greatest magnitude of its tensor, and whether all are equal."""
    if len(found) != len(expected):
        return float("inf"), False
    apart = [relative_difference(a, b) for a, b in zip(found, expected, strict=True)]
    return max(apart, default=0.0), all(x <= tolerance(b.dtype) for x, b in zip(apart, expected))


def finished(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors when they are there: a collective may be in flight, a device may be at work."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    there = [t.wait() if isinstance(t, AsyncCollectiveTensor) else t for t in tensors]
    if any(t.is_cuda for t in there):
        torch.cuda.synchronize()
    return there


class Rank:
    """One rank, driven by the messages of `runner.ranks`."""

    def __init__(self, workload: Callable[[WorkloadSettings], Workload]) -> None:
        self._make = workload
        self._sides: dict[str, WorkloadSide] = {}
        self._passes: dict[str, Pass] = {}  # without DynaFlow
        self._expected: list[torch.Tensor] = []
        self._alone: Alone | None = None  # what captured graphs tell of a pass
        self._parts: Mapping[str, Callable[[], object]] = {}  # of a pass, alone

    def start(
        self, settings: dict[str, Any], sides: dict[str, dict[str, Any] | None], ranks: int, threads: int
    ) -> dict[str, Any]:
        """Make the model and all sides, and run each of them once.

        Args:
            settings: The fields of the `WorkloadSettings`.
            sides: The content of the config of each side; None for stock and for peers.
            ranks: The number of ranks.
            threads: The threads that this rank computes with.

        Returns:
            The release, and whether a pass communicates.
        """
        torch.set_num_threads(threads)
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        if ranks > 1:
            dist.init_process_group("gloo")
        self._workload = self._make(WorkloadSettings(**settings))
        self._expected = [t.clone() for t in finished(self._workload.stock())]
        for name, content in sides.items():
            if name == STOCK:
                self._passes[name] = self._workload.stock
            elif content is None:
                self._passes[name] = cast(WorkloadWithPeers, self._workload).peers[name]
            else:
                self._sides[name] = self._workload.under(Config(**content))
                self._sides[name].run()
        fixed = [side for name, side in self._sides.items() if sides[name]["strategy"] != AUTO]  # type: ignore[index]
        if fixed and ranks > 1:
            self._find_parts(fixed[0])
        return {"release": self._workload.release, "communicates": bool(self._parts)}

    def tune(self, side: str) -> None:
        """Have `strategy: auto` decide, under what the link is now."""
        self._sides[side].tune()

    def run(self, side: str) -> dict[str, Any]:
        """Run one pass; return its seconds, and how far its outputs are from the stock system's."""
        run = self._passes[side] if side in self._passes else self._sides[side].run
        seconds, outputs = self._timed(run)
        apart, equal = difference(outputs, self._expected)
        return {"seconds": seconds, "apart": apart, "equal": equal}

    def alone(self, what: str) -> float:
        """Return the seconds of "compute" or of the "network" of a pass alone."""
        return self._timed(self._parts[what])[0]

    def steps(self, side: str) -> dict[str, Any]:
        """Return the report of a side so far, without its programs."""
        return self._sides[side].session.report().model_dump(mode="json", exclude={"programs"})

    def details(self, side: str, micro_batches: int) -> dict[str, Any]:
        """Return the program and the plan of a side, and its operators' times in so many micro-batches, in turn."""
        assert self._alone is not None
        program = self._sides[side].session.report().programs[0]
        times = self._alone.operator_times(micro_batches)
        return {"program": program.program, "plan": program.plans[-1], "operators": times}

    def _find_parts(self, side: WorkloadSide) -> None:
        if side.alone is not None:
            self._parts = side.alone
            return
        self._alone = Alone(side)
        if self._alone.communicates:
            self._parts = {"compute": self._alone.compute, "network": self._alone.network}

    def close(self) -> None:
        """Leave the group together with the other ranks."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def _timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        if dist.is_initialized():
            dist.barrier()
        began = time.perf_counter()
        result = run()
        if isinstance(result, list):
            result = finished(result)
        return time.perf_counter() - began, result
