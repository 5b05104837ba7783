"""What runs on the two ranks of `test_session`: importable there by name."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch
import torch.distributed as dist
from support import IN_PLACE, TWO_STREAMS, lowered, manual, program_of, without

from dynaflow_serving.capture.examples import example_capture
from dynaflow_serving.config import Config
from dynaflow_serving.core.plan import ActionKind
from dynaflow_serving.errors import InactiveError, PlanError
from dynaflow_serving.executor.cpu import CPUExecutor
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.policy.selector import build_selector
from dynaflow_serving.session.plan_cache import no_context
from dynaflow_serving.session.session import Session


def session(**options: Any) -> Session:
    config = Config(strategy="nanoflow", options={"min_tokens": 4, **options})
    return Session(build_selector(config), config, mode="test", logger=logging.getLogger("test"))


def agree(micro_batches: tuple[int, int]) -> str:
    """Compare plans with the other rank over gloo; `micro_batches` has the option of each rank."""
    s = session(micro_batches=micro_batches[dist.get_rank()])
    s.add(example_capture("llama"))
    try:
        s.confirm(dist.group.WORLD)
        return "agreed"
    except InactiveError as error:
        return str(error)
    finally:
        s.close()


def race() -> dict[str, Any]:
    """A real all-reduce on the network stream, with its wait and without. It is sent only when `read` has read, or,
    with the wait, when `read` has not come within a tenth of a second: the outcome does not hang on luck."""
    has_read, started = threading.Event(), threading.Event()

    def all_reduce(y: torch.Tensor) -> None:
        started.set()
        has_read.wait(0.1)
        dist.all_reduce(y)

    def read(y: torch.Tensor) -> torch.Tensor:
        assert started.wait(5)
        z = y.clone()
        has_read.set()
        return z

    program = program_of(IN_PLACE)
    capture = manual(program, make=torch.clone, bump=all_reduce, read=read)
    plan = lowered(program, 1, *TWO_STREAMS)
    racy = without(plan, ActionKind.WAIT, "compute")
    try:
        verify(program, racy)
        verdict = "accepted"
    except PlanError as error:
        verdict = str(error).splitlines()[0]
    executor, x = CPUExecutor(), torch.full((3,), dist.get_rank() + 1.0)
    results = []
    for p in (plan, racy):
        started.clear()
        has_read.clear()
        results.append(executor.bind(capture, p, {})([x], [0, 3], no_context)[0].tolist())
    executor.close()
    return {"with": results[0], "without": results[1], "verdict": verdict}


def all_scenarios() -> dict[str, Any]:
    """One start of the ranks for all tests: each takes seconds to import torch."""
    return {"agree": {pair: agree(pair) for pair in ((2, 2), (2, 3))}, "race": race()}
