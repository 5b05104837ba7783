"""The parts of a pass alone: its compute without collectives, and its collectives without compute.

Contract
- Both come from the graphs that DynaFlow captured of a side, and both run the un-split batch. Compute runs all
  operators but the collectives, whose input, or an earlier result, stands for their output. The network runs the
  collectives, one after the other, on tensors of the same shapes.
- No schedule of these operators is faster than the longer of the two: that is the limit of overlap.
- `operator_times` are those of the same micro-batches one after the other, for the simulator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.program import Resource
from dynaflow_serving.core.timeline import operator_times
from dynaflow_serving.executor import get_executor
from dynaflow_serving.integrations.base import WorkloadSide
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.strategies.sequential import Sequential
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import cut_at_requests

RUNS = 3  # traced ones

Run = Callable[[], object]
Wrap = Callable[[str, Callable[..., Any]], Callable[..., Any]]


class Alone:
    """The captured graphs of one side, with the arguments of one pass."""

    def __init__(self, side: WorkloadSide) -> None:
        """Run one pass to learn the arguments. The side has run before, so that its graphs are captured."""
        self._graphs = captured_graphs(side)
        collectives = [_collectives(captured, args) for captured, args in self._graphs]
        silent = [(_without_network(c, sent), args) for (c, args), sent in zip(self._graphs, collectives)]
        self.compute: Run = _all([_whole(captured, args) for captured, args in silent])
        self.network: Run = _all([_network(sent) for sent in collectives])

    @property
    def communicates(self) -> bool:
        """Whether there is a collective in the graphs."""
        return any(_network_operators(captured) for captured, _ in self._graphs)

    def operator_times(self, micro_batches: int) -> list[dict[str, Any]]:
        """Return the median milliseconds of every operator and micro-batch of the first graph."""
        captured, args = self._graphs[0]
        plan_cache, split = _sequential(captured, args, micro_batches)
        timelines = []
        with torch.no_grad():
            for _ in range(1 + RUNS):
                plan_cache.run(args, split, traced=True)
                timeline = plan_cache.timeline(split.signature)
                assert timeline is not None
                timelines.append(timeline)
        times = operator_times(timelines[1:])
        return [{"name": name, "micro_batch": number, "ms": s * 1e3} for (name, number), s in times.items()]


def captured_graphs(side: WorkloadSide) -> list[tuple[CapturedProgram, tuple[Any, ...]]]:
    """Return the graphs that a pass of a side runs, each with its arguments."""
    found: list[tuple[CapturedProgram, tuple[Any, ...]]] = []
    with _noting(side.session.plan_caches, found):
        side.run()
    return found


@contextmanager
def _noting(plan_caches: Sequence[PlanCache], found: list[tuple[CapturedProgram, tuple[Any, ...]]]) -> Iterator[None]:
    """Add to `found` what the plan caches run inside this block."""
    for plan_cache in plan_caches:

        def run(args: Any, *rest: Any, cache: PlanCache = plan_cache, **options: Any) -> Any:
            found.append((cache.captured, tuple(args)))
            return PlanCache.run(cache, args, *rest, **options)

        setattr(plan_cache, "run", run)  # noqa: B010
    try:
        yield
    finally:
        for plan_cache in plan_caches:
            delattr(plan_cache, "run")


def _sequential(captured: CapturedProgram, args: Sequence[Any], micro_batches: int) -> tuple[PlanCache, Split]:
    """Return what runs a graph in micro-batches one after the other, and how it cuts them."""
    plan_cache = PlanCache(captured, FixedStrategy(Sequential()), get_executor("cpu"), zero_copy=False)
    batch = Batch((1,) * captured.token_counter()(args))
    return plan_cache, plan_cache.allowed_split(batch, cut_at_requests(batch, micro_batches))


def _whole(captured: CapturedProgram, args: Sequence[Any]) -> Run:
    """Return what runs a graph un-split."""
    plan_cache, split = _sequential(captured, args, micro_batches=1)

    def run() -> None:
        with torch.no_grad():  # a graph of AOT autograd holds its own backward
            plan_cache.run(args, split)

    return run


def _wrapped(captured: CapturedProgram, wrap: Wrap) -> CapturedProgram:
    functions: Mapping[str, Callable[..., Any]] = captured.functions
    return dataclasses.replace(captured, functions={n: wrap(n, f) for n, f in functions.items()}, into={})


def _network_operators(captured: CapturedProgram) -> set[str]:
    return {o.name for o in captured.program.operators if o.resource is Resource.NETWORK}


@dataclasses.dataclass(frozen=True)
class _Collective:
    """One call of a collective: its function, arguments of the same shapes, and its result."""

    function: Callable[..., Any]
    given: tuple[Any, ...]
    result: Any


def _collectives(captured: CapturedProgram, args: Sequence[Any]) -> dict[str, _Collective]:
    """Return the collectives of a graph by the names of their operators, in order, as one run calls them."""
    found: dict[str, _Collective] = {}
    network = _network_operators(captured)

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            kept = tuple(torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in given)
            result = function(*given)
            found[name] = _Collective(function, kept, result)
            return result

        return call if name in network else function

    _whole(_wrapped(captured, noting), args)()
    return found


def _without_network(captured: CapturedProgram, collectives: Mapping[str, _Collective]) -> CapturedProgram:
    """Return a graph whose collectives send nothing: their input, or a result of before, stands for their output."""

    def silent(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if name not in collectives:
            return function
        result = collectives[name].result
        return lambda x, *_: x if x.shape == result.shape else result

    return _wrapped(captured, silent)


def _network(collectives: Mapping[str, _Collective]) -> Run:
    def run() -> None:
        for collective in collectives.values():
            collective.function(*collective.given)

    return run


def _all(runs: Sequence[Run]) -> Run:
    def run() -> None:
        for one in runs:
            one()

    return run
