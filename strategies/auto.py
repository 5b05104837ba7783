"""The policy (`strategy: auto`): per kind and size of batch, the candidate that was measured to win, or no split.

What a bucket of batches runs under is decided before serving (`dynaflow_serving.policy`), by timing each candidate
against un-split steps in the engine, and looked up per step. A batch of a bucket that was not decided runs un-split.
While serving, a guard compares the adopted candidates with un-split steps and switches off what has become slower.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.errors import ConfigError, ScheduleError, unknown_name
from dynaflow_serving.policy.bucket import Bucket, bucket_of
from dynaflow_serving.policy.guard import Guard
from dynaflow_serving.policy.table import Table
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.strategies.sequential import Sequential
from dynaflow_serving.strategy.base import OpScheduler, Options
from dynaflow_serving.strategy.registry import register_strategy
from dynaflow_serving.strategy.rules import Rule
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.splitting import whole

PLAIN = ""  # the candidate that does not split
NOT_DECIDED = "auto: this kind of batch was not tuned"
FASTER_WHOLE = "auto: not split is faster"
COMPARING = "auto: un-split, to compare with"
SWITCHED_OFF = "auto: switched off, it was slower while serving"
TUNING = "auto: un-split, for tuning"

logger = logging.getLogger("dynaflow_serving")


class AutoOptions(Options):
    candidates: list[str | dict[str, Any]] = Field(
        default=["nanoflow", "comm_overlap", "dual_batch"],
        min_length=1,
        description="strategies to choose from: names, paths of .py files, or mappings with 'strategy' and 'options'",
    )
    micro_batches: list[int] = Field(default=[2, 3], min_length=1, description="each candidate with each of these")
    only: list[str] = Field(
        default=[],
        description="measure these candidates alone, such as 'nanoflow x2': a share of a tuning that is spread",
    )
    budget_seconds: float = Field(60.0, gt=0, description="for tuning at start-up; what it does not reach is not split")
    pairs: int = Field(5, ge=3, description="timed pairs of a candidate and an un-split step")
    min_gain: float = Field(0.02, ge=0, description="relative gain that a candidate must show, besides the noise")
    table: str | None = Field(None, description="file of the decisions; default: one per model and machine")
    retune: bool = Field(False, description="measure anew, even if there is a table for this model and machine")
    guard_window: int = Field(
        64,
        ge=8,
        description="while serving, a candidate is looked at after so many steps of its bucket; has it become slower, "
        "some un-split steps are made to compare with, and it is switched off if they are faster",
    )
    straddle: bool = Field(True, description="whether a split may cut inside a request")
    min_collective_kib: int = Field(
        0,
        ge=0,
        description="a split is declined if a micro-batch's collective would move less: many libraries take slower "
        "algorithms there",
    )

    @field_validator("micro_batches")
    @classmethod
    def _split(cls, values: list[int]) -> list[int]:
        if min(values) < 2:
            raise ValueError("each at least 2: the policy compares with the un-split step anyway")
        return sorted(set(values))


@register_strategy("auto")
class Auto(OpScheduler):
    Options = AutoOptions

    def __init__(self, options: AutoOptions | None = None) -> None:
        super().__init__(options)
        self._by_label = _candidates(self.options)
        for label in self.options.only:
            if label not in self._by_label:
                raise ConfigError(f"option only of strategy 'auto': {unknown_name('candidate', label, self._by_label)}")
        self.forced: str | None = None  # the candidate of all steps, while tuning; None: look it up
        self._adopted: dict[Bucket, str] = {}
        self._why: dict[Bucket, str] = {}  # of decided buckets that are not split
        self.guard: Guard | None = None
        self.switched_off = 0  # buckets, by the guard

    @property
    def annotations(self) -> tuple[Rule, ...]:  # type: ignore[override]
        """Those of all candidates: they share one Program."""
        return tuple(dict.fromkeys(rule for s in self._by_label.values() for rule in s.annotations))

    @property
    def max_micro_batches(self) -> int:
        return max(s.max_micro_batches for s in self._by_label.values())

    @property
    def candidates(self) -> tuple[str, ...]:
        return tuple(self._by_label)

    @property
    def measured(self) -> tuple[str, ...]:
        """The candidates that are for this process to measure."""
        return tuple(c for c in self._by_label if not self.options.only or c in self.options.only)

    def of(self, candidate: str) -> OpScheduler:
        if candidate in self._by_label:
            return self._by_label[candidate]
        prefix, _, number = candidate.rpartition(" x")
        if prefix == Sequential.name:  # the reference of the tuner's profiles
            return Sequential(Sequential.Options(micro_batches=int(number), min_tokens=1))
        return Sequential()

    def adopt(self, table: Table, ranks: Ranks) -> None:
        """Serve by `table` from now on. Raises `ConfigError` for a candidate that there is not."""
        if unknown := set(table.adopted.values()) - set(self._by_label):
            raise ConfigError(f"the policy table names {', '.join(sorted(unknown))}: no candidate of this config")
        self.forced = None
        self._adopted = dict(table.adopted)
        self._why = {d.bucket: FASTER_WHOLE for d in table.decisions if not d.candidate and d.decided}
        self.guard = Guard(self.options.guard_window, ranks, self._switch_off)
        for decision in table.decisions:
            if decision.candidate:
                self.guard.add(decision.bucket, max(decision.noise or 0.0, self.options.min_gain))

    def split(self, batch: Batch) -> Split:
        if self.forced is not None:
            return self.cut(batch, self.forced)
        bucket = bucket_of(batch)
        candidate = self._adopted.get(bucket)
        if candidate is None:
            return whole(batch, self._why.get(bucket, NOT_DECIDED))
        if self.guard is not None and self.guard.runs_plain(bucket):
            return whole(batch, COMPARING if bucket in self._adopted else SWITCHED_OFF)
        return self.cut(batch, candidate)

    def cut(self, batch: Batch, candidate: str) -> Split:
        """`batch` as `candidate` splits it."""
        if candidate == PLAIN:
            return whole(batch, TUNING)
        split = self.of(candidate).split(batch)
        return Split(split.micro_batches, split.depends, split.reason, candidate)

    def schedule(self, s: Schedule) -> None:
        raise ScheduleError("strategy 'auto' orders nothing itself: its candidates do")

    def _switch_off(self, bucket: Bucket, speed_up: float) -> None:
        candidate = self._adopted.pop(bucket)
        self._why[bucket] = SWITCHED_OFF
        self.switched_off += 1
        logger.warning(
            "DynaFlow: %s is switched off for %s: %.2fx as fast as un-split steps while serving",
            candidate, bucket, speed_up,
        )  # fmt: skip


def _candidates(options: AutoOptions) -> dict[str, OpScheduler]:
    """Label -> strategy, each with thresholds lowered as far as they go: what is too small is for measuring to say."""
    from dynaflow_serving.config import Config

    found: dict[str, OpScheduler] = {}
    for entry in options.candidates:
        name, given = (entry, {}) if isinstance(entry, str) else _named(entry)
        cls = get_strategy(name)
        if cls.name == Auto.name:
            raise ConfigError("candidates of strategy 'auto': 'auto' itself is none")
        fields = cls.Options.model_fields
        fixed = "micro_batches" in given or "micro_batches" not in fields
        for n in [None] if fixed else options.micro_batches:
            values = {"min_tokens": 1} if "min_tokens" in fields else {}
            values |= {} if n is None else {"micro_batches": n}
            strategy = Config(strategy=name, options={**values, **given}).build()
            if strategy.max_micro_batches > 1:
                found[f"{cls.name} x{strategy.max_micro_batches}"] = strategy
    if not found:
        raise ConfigError("no candidate of strategy 'auto' ever splits a batch: there is nothing to choose")
    return found


def _named(entry: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if not isinstance(entry.get("strategy"), str) or entry.keys() - {"strategy", "options"}:
        raise ConfigError(f"candidates of strategy 'auto': {entry!r} is not {{strategy: NAME, options: {{...}}}}")
    return entry["strategy"], dict(entry.get("options") or {})
