"""The executor interface, and the options that executors take.

Contract
- `bind` turns a verified Plan into one callable; all the plan's structure is spent there, so that a run
  is straight-line Python (`codegen`).
- A `BoundPlan` is called with the program's inputs in order (constants excluded), the token offsets of
  the micro-batches (first 0, last the total) and `enter`, which is called on the caller's thread before
  an operator with context when the micro-batch changes. It returns the program's outputs in order.
- An option that an executor cannot honour is an `InactiveError` when it is made; a stream that the plan
  does not have is a `ConfigError` when a plan with several streams is bound.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from dynaflow_serving.capture.eager.gradients import Submit, at_once
from dynaflow_serving.capture.program import CapturedProgram, Enter, PlanFunction
from dynaflow_serving.config import ExecutorOptions
from dynaflow_serving.core.plan import COMPUTE_STREAM, Plan
from dynaflow_serving.errors import ConfigError, InactiveError, ScheduleError, unknown_name
from dynaflow_serving.executor.tracing import ClockTracer, Tracer
from dynaflow_serving.kernels import kernels_of


class CapturedGraphs(NamedTuple):
    """How many graphs an executor has captured, and the memory that they take."""

    graphs: int
    mib: float


@dataclass(frozen=True, slots=True)
class BoundPlan:
    """A plan that an executor has made callable.

    `run` is the function itself: a caller that counts nanoseconds calls that, and saves one call.
    """

    plan: Plan
    run: PlanFunction
    source: str = ""
    """The text of the generated function; empty where none was generated."""
    tracer: Tracer | None = None
    """Where each run leaves the times of its actions."""

    def __call__(self, args: Sequence[Any], bounds: Sequence[int], enter: Enter) -> list[Any]:
        return self.run(args, bounds, enter)


class Executor(abc.ABC):
    name: ClassVar[str]
    offers: ClassVar[frozenset[str]] = frozenset()
    """Which of the options "sm_share" and "graph" it honours."""

    def __init__(self, options: ExecutorOptions | None = None) -> None:
        """Raises `InactiveError` for options that this executor cannot honour."""
        self.options = options or ExecutorOptions()
        wanted = {"sm_share": [s for s, o in self.options.streams.items() if o.sm_share is not None]}
        wanted["graph"] = [self.options.graph] if self.options.graph != "off" else []
        for option, values in wanted.items():
            if values and option not in self.offers:
                raise InactiveError(
                    f"executor {self.name!r} has no {option} (asked for: {', '.join(values)}); remove it from the "
                    "config, or use executor: cuda on a CUDA device"
                )

    def bind(
        self,
        captured: CapturedProgram,
        plan: Plan,
        kernels: Mapping[str, Callable[..., Any]],
        tracer: Tracer | None = None,
    ) -> BoundPlan:
        """Compile `plan`.

        Args:
            captured: what `plan` is a plan of.
            plan: a verified plan.
            kernels: by name, those that `plan` names and no registry knows.
            tracer: one of `self.tracer()`, which each run tells the time of every action; None takes no time.

        Raises:
            ConfigError: the options are for a stream that the plan does not have.
            ScheduleError: this executor cannot run the plan, or there is no kernel of that name.
        """
        extra = [s for s in plan.streams if s != COMPUTE_STREAM]
        if extra and (missing := self.options.streams.keys() - extra):  # without extra: an un-split step, or no network
            raise ConfigError(f"streams: {unknown_name('stream', min(missing), extra)} (a plan of {plan.strategy})")
        _check_one_stream(captured, plan)
        return self._bind(captured, plan, kernels_of(plan, kernels), tracer)

    @abc.abstractmethod
    def _bind(
        self, captured: CapturedProgram, plan: Plan, kernels: Mapping[str, Callable[..., Any]], tracer: Tracer | None
    ) -> BoundPlan: ...

    def submit_to(self, stream: str) -> Submit:
        """Return what runs a function on a stream of plans, after what it has got so far: gradients need it.

        The compute stream is the caller's, so this is for the others.
        """
        return at_once

    def tracer(self) -> Tracer:
        """A new tracer that `bind` takes."""
        return ClockTracer()

    @property
    def graphs(self) -> CapturedGraphs | None:
        """None where plans are not captured."""
        return None

    def report(self) -> dict[str, Any]:
        """What `Session.report` adds about the executor; plain data."""
        return {"executor": self.name}

    def close(self) -> None:  # noqa: B027  most executors have nothing to stop
        """Stop what the executor has started (threads)."""


def _check_one_stream(captured: CapturedProgram, plan: Plan) -> None:
    """Raise `ScheduleError` if operators of one suspended computation are on several streams.

    Such a computation allocates and drops tensors in its own time, and no plan could wait for that.
    """
    stream_of: dict[int, str] = {}  # by micro-batch
    for a in plan.actions:
        if captured.one_stream.intersection(a.operators):
            stream = stream_of.setdefault(a.start, a.stream)
            if stream != a.stream:
                raise ScheduleError(
                    f"{a.operators[0]}@{a.start} is on stream {a.stream!r}, earlier code of its micro-batch "
                    f"on {stream!r}: without a graph (capture: eager) the code between annotated calls keeps one "
                    "stream per micro-batch; annotate what is to run elsewhere"
                )
