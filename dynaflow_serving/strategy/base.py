"""`OpScheduler`, the base class of strategies: it decides the split and the order.

Contract
- A strategy names the type of its options once: `class Mine(OpScheduler[MineOptions])`. `self.options` has that type,
  and the class attribute `Options` is set from it. A strategy without options derives from plain `OpScheduler`.
- A strategy's Python runs while recording, once per Program x Split signature, never in the hot path. Only `split`
  runs every step.
- `split` makes at most `max_micro_batches`. `check_splits` finds a wrong one before an engine serves.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any, ClassVar, Generic, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypeVar  # typing has defaults of type variables from Python 3.13 on

from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.program import Program
from dynaflow_serving.errors import ConfigError, ScheduleError
from dynaflow_serving.strategy.probes import PROBES, split_fault
from dynaflow_serving.strategy.rules import Rule
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.splitting import whole
from dynaflow_serving.strategy.tags import TagUse


class Options(BaseModel):
    """Base of every strategy's options: unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SplitOptions(Options):
    """Options of a strategy that cuts a step into a configurable number of micro-batches.

    A subclass overrides a field to change its default, its bounds or its description.
    """

    micro_batches: int = Field(2, ge=1, description="how many micro-batches a step is cut into at most; 1: no split")
    min_tokens: int = Field(
        2048, ge=1, description="a step is not split if a micro-batch would have fewer tokens (rows of the batch)"
    )


OptionsT = TypeVar("OptionsT", bound=Options, default=Options, covariant=True)


class OpScheduler(abc.ABC, Generic[OptionsT]):
    """A strategy. Subclass, write `split` and `schedule`, and register it with `@register_strategy`.

    Attributes:
        name: What configs call the strategy; `register_strategy` sets it.
        Options: The type of `options`, from the class's type argument.
        annotations: Where the captured graph is cut for this strategy, besides the integration's own rules.
        schedules_unsplit: Whether `schedule` also orders steps of one micro-batch.
        looks_for: The tags that `schedule` looks for, and what it does without them.
        row_wise: Custom operators that treat each token on its own, such as `mylib::rotate`.
        takes_whole: Operators with these tags have their communication within, because `schedule` cuts them itself.
        fewest_ranks: With fewer tensor-parallel ranks, `schedule` has nothing to do. Engines decline that at start.
        context_on_streams: Whether operators that read an engine's context run on other streams than COMPUTE, which
            the worker threads of executor `cpu` cannot.
    """

    name: ClassVar[str] = ""
    Options: ClassVar[type[Options]] = Options
    annotations: ClassVar[tuple[Rule, ...]] = ()
    schedules_unsplit: ClassVar[bool] = False
    looks_for: ClassVar[tuple[TagUse, ...]] = ()
    row_wise: ClassVar[tuple[str, ...]] = ()
    takes_whole: ClassVar[tuple[str, ...]] = ()
    fewest_ranks: ClassVar[int] = 1
    context_on_streams: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__dict__.get("__orig_bases__", ()):
            origin = get_origin(base)
            if isinstance(origin, type) and issubclass(origin, OpScheduler):
                (options,) = get_args(base)
                if isinstance(options, TypeVar):
                    continue  # the class leaves the options to those that derive from it
                if not isinstance(options, type):
                    raise TypeError(f"{cls.__name__}: {options!r} is no class: define the options above the strategy")
                cls.Options = options

    def __init__(self, options: OptionsT | None = None) -> None:
        self.options: OptionsT = options if options is not None else cast(OptionsT, self.Options())

    @property
    def max_micro_batches(self) -> int:
        """How many micro-batches `split` makes at most: engines prepare for as many.

        It is the option `micro_batches` where the options are `SplitOptions`, and else 2.
        """
        return self.options.micro_batches if isinstance(self.options, SplitOptions) else 2

    @abc.abstractmethod
    def split(self, batch: Batch) -> Split:
        """Cut one step's batch. Called every step: keep it to microseconds (see `splitting`)."""

    @abc.abstractmethod
    def schedule(self, s: Schedule) -> None:
        """Execute every task of `s` in some order and on some streams."""

    def check_splits(self) -> None:
        """Try `split` on a few batches such as engines make.

        Raises:
            ConfigError: `split` raised, made more than `max_micro_batches`, or did not tile the batch.
        """
        for kind, batch in PROBES.items():
            try:
                fault = split_fault(batch, self.split(batch), self.max_micro_batches)
            except Exception as e:
                raise ConfigError(
                    f"strategy {self.name!r} cannot split a batch ({kind}): {type(e).__name__}: {e}"
                ) from e
            if fault:
                raise ConfigError(f"strategy {self.name!r} splits a batch ({kind}) wrongly: {fault}")

    def missing_tags(self, programs: Iterable[Program]) -> str:
        """Return what the strategy looks for and none of `programs` has, and what follows; "" if nothing is missing."""
        programs = tuple(programs)
        return "; ".join(
            f"strategy {self.name!r} finds no operator tagged {' or '.join(use.tags)}: {use.otherwise}"
            for use in self.looks_for
            if use.missing_from(programs)
        )

    def record(self, program: Program, micro_batches: int, depends: Iterable[tuple[int, int]] = ()) -> Schedule:
        """Run `schedule` and return the finished recording.

        Raises:
            ScheduleError: `schedule` did something impossible, or has left tasks.
        """
        s = Schedule(program, micro_batches, depends)
        self.schedule(s)
        if s.unfinished:
            ready = [str(t) for t in s.get_ready_ops()]
            why = f"ready but not executed: {', '.join(ready[:5])}" if ready else "they wait for one another"
            raise ScheduleError(f"strategy {self.name!r} left {s.unfinished} operators unexecuted ({why})")
        return s


class UnsplitScheduler(OpScheduler[OptionsT]):
    """A strategy that never splits a step, and orders un-split ones.

    Attributes:
        unsplit_reason: Why it splits nothing; reports count the steps of each reason.
    """

    schedules_unsplit = True
    unsplit_reason: ClassVar[str]

    @property
    def max_micro_batches(self) -> int:
        return 1

    def split(self, batch: Batch) -> Split:
        return whole(batch, self.unsplit_reason)
