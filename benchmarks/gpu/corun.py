"""(a) Two operators that need different things of the device: one after the other, on two streams, with an SM share.

A matrix product (bound by arithmetic) runs beside copy, SiLU-mul and RMS norm (bound by memory), each of which takes as
long alone. It also runs beside another matrix product, where nothing is to be won. All variants are plans of one
Program, which the package's executor runs; the memory-bound operator is the one that gets the SM share.

Contract
- Every variant computes the same, with the same kernels. Overlapped operators have the limit of their summed work.
- The code is unmeasured on a GPU: its tests run on a CPU with the sequential executor and a fake timer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.limits import Limits, Work
from benchmarks.gpu.report import ResultRow, rows_of
from benchmarks.gpu.timing import Timer, time_in_turn
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.config import ExecutorOptions, StreamOptions
from dynaflow_serving.core.batch import Batch, Signature, Split
from dynaflow_serving.core.plan import COMPUTE_STREAM
from dynaflow_serving.core.program import Operator, Program, Resource, Scope, Value
from dynaflow_serving.executor import Executor
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import whole

MakeExecutor = Callable[[ExecutorOptions], Executor]
SEQUENTIAL, STREAMS = "one after the other", "two streams"
SM_SHARES = (0.125, 0.25, 0.5)
HIDDEN, ROWS = 4096, 8192  # of the product [ROWS, HIDDEN] x [HIDDEN, HIDDEN]


@dataclass(frozen=True)
class Neighbour:
    """The operator beside the product; `passes` says how often it reads or writes its input's bytes."""

    run: Callable[..., torch.Tensor]
    passes: float


NEIGHBOURS = {
    "copy": Neighbour(lambda x, w: x.clone(), 2),
    "silu_mul": Neighbour(lambda x, w: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], 2.5),  # two kernels in eager
    "rms_norm": Neighbour(lambda x, w: F.rms_norm(x, (x.shape[-1],)), 2),
    "another product": Neighbour(lambda x, w: x @ w, 0),
}


class CoRun(OpScheduler):
    """The product on the compute stream, its neighbour on `side` or after it."""

    name = "co_run"
    schedules_unsplit = True

    def __init__(self, side: str) -> None:
        super().__init__()
        self.side = side

    def split(self, batch: Batch) -> Split:
        return whole(batch, "co-run")

    def schedule(self, s: Schedule) -> None:
        for task in s.get_ready_ops():
            s.execute(task, stream=COMPUTE_STREAM if task.name == "product" else self.side)


def program() -> Program:
    values = {v: Value(v, Scope.BATCH, 0) for v in ("a", "x", "y", "z")} | {"w": Value("w", Scope.SHARED)}
    neighbour = Operator(name="neighbour", resource=Resource.MEMORY, inputs=("x", "w"), outputs=("z",))
    product = Operator(name="product", resource=Resource.COMPUTE, inputs=("a", "w"), outputs=("y",))
    return Program(inputs=("a", "x", "w"), outputs=("y", "z"), values=values, operators=(neighbour, product))


def rows(
    timer: Timer,
    seconds: float,
    limits: Limits,
    make_executor: MakeExecutor,
    device: str,
    dtype: torch.dtype,
    hidden: int = HIDDEN,
    tokens: int = ROWS,
) -> list[ResultRow]:
    a = torch.randn(tokens, hidden, device=device).to(dtype)
    w = torch.randn(hidden, hidden, device=device).to(dtype)
    product = Work(2 * tokens * hidden**2, 2 * a.nbytes + w.nbytes)
    result = []
    for name, neighbour in NEIGHBOURS.items():
        x, work = a, product
        if neighbour.passes:  # as long as the product, alone
            wanted = limits.milliseconds([product], overlapped=False) / 1e3 * limits.bytes_per_s / neighbour.passes
            x = torch.randn(max(2, int(wanted / a[0].nbytes)), hidden, device=device).to(dtype)
            work = Work(0, neighbour.passes * x.nbytes)
        functions = {"product": torch.matmul, "neighbour": neighbour.run}
        calls, facts = _variants(CapturedProgram(program(), functions), [a, x, w], make_executor)
        measured = time_in_turn(calls, timer, seconds / len(NEIGHBOURS))
        for variant, row in facts.items():
            if "error" in row:
                measured.failed[variant] = row["error"]
        bound = {v: limits.milliseconds([product, work], overlapped=v != SEQUENTIAL) for v in facts}
        against = {v: (SEQUENTIAL,) for v in facts if v != SEQUENTIAL}
        result += rows_of(f"product beside {name}", measured, bound, against, facts)
    return result


def _variants(
    capture: CapturedProgram, args: list[Any], make_executor: MakeExecutor
) -> tuple[dict[str, Callable[[], Any]], dict[str, ResultRow]]:
    wanted: dict[str, tuple[str, ExecutorOptions]] = {
        SEQUENTIAL: (COMPUTE_STREAM, ExecutorOptions()),
        STREAMS: ("side", ExecutorOptions()),
    }
    for share in SM_SHARES:
        options = ExecutorOptions(streams={"side": StreamOptions(sm_share=share)})
        wanted[f"{STREAMS}, SM share {share}"] = ("side", options)
    calls: dict[str, Callable[[], Any]] = {}
    facts: dict[str, ResultRow] = {}
    for variant, (side, options) in wanted.items():
        try:
            plan_cache = PlanCache(capture, FixedStrategy(CoRun(side)), make_executor(options))
            prepared = plan_cache.prepare(Signature(1))
        except Exception as e:  # no green contexts here
            facts[variant] = {"error": f"{type(e).__name__}: {e}"}
            continue
        facts[variant] = {"plan": prepared.plan.digest, "streams": list(prepared.plan.streams)}
        split = whole(Batch((len(args[0]),)), "co-run")
        calls[variant] = lambda plan_cache=plan_cache, split=split: plan_cache.run(args, split)  # type: ignore[misc]
    return calls, facts
