"""The selector of `strategy: auto` picks, per bucket, the candidate that was measured to win, or no split.

Contract
- `serve_by` gives the selector a table of decisions. From then on a step looks up its bucket, and the guard watches.
- A batch of an undecided bucket runs un-split. With `online: true`, its candidates are compared with un-split steps one
  after the other, in live steps, until one wins.
- A candidate is a strategy with one number of micro-batches, labelled `nanoflow x2`, or one that orders un-split steps,
  labelled `fused_norms`. Its label ends with the options that it was given: `comet chunks=4`.
- The candidate `PLAIN` leaves the step as it is.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, field_validator

from dynaflow_serving import strategies
from dynaflow_serving.config import Config, checked_options
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.errors import ConfigError, unknown_name
from dynaflow_serving.policy.bucket import Bucket, bucket_of
from dynaflow_serving.policy.guard import Guard
from dynaflow_serving.policy.side_effects import Facts, SideEffects
from dynaflow_serving.policy.table import Table
from dynaflow_serving.session.metrics import Metrics
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.session import Session
from dynaflow_serving.strategies import build_strategy
from dynaflow_serving.strategies.sequential import Sequential, SequentialOptions
from dynaflow_serving.strategy.base import OpScheduler, Options
from dynaflow_serving.strategy.selector import FixedStrategy, Selector
from dynaflow_serving.strategy.splitting import whole

AUTO = "auto"
PLAIN = ""  # the candidate that does not split
NOT_DECIDED = "auto: this kind of batch was not tuned"
FASTER_WHOLE = "auto: not split is faster"
COMPARING = "auto: un-split, to compare with"
SWITCHED_OFF = "auto: switched off, it was slower while serving"
TUNING = "auto: un-split, for tuning"

logger = logging.getLogger("dynaflow_serving")


class AutoOptions(Options):
    """These are the options of `strategy: auto`."""

    candidates: list[str | dict[str, Any]] = Field(
        default=["nanoflow", "comm_overlap", "dual_batch"],
        min_length=1,
        description="The policy chooses from these strategies: names, paths of .py files, or mappings with 'strategy' "
        "and 'options'.",
    )
    micro_batches: list[int] = Field(
        default=[2, 3],
        min_length=1,
        description="Each candidate is tried with each of these numbers of micro-batches. With 1, those that order "
        "un-split steps do so.",
    )
    only: list[str] = Field(
        default=[],
        description="Only these candidates are measured, such as 'nanoflow x2'. Tuning that is spread over workers "
        "sets it.",
    )
    budget_seconds: float = Field(
        60.0, gt=0, description="Tuning at start-up takes about this long. Batches that it does not reach run un-split."
    )
    pairs: int = Field(5, ge=3, description="A candidate is timed in so many pairs with an un-split step.")
    min_gain: float = Field(
        0.02, ge=0, description="A candidate must show this relative gain, and more than the noise, to be adopted."
    )
    table: str | None = Field(
        None, description="The decisions are kept in this file. By default there is one per model and machine."
    )
    retune: bool = Field(
        False, description="If true, the policy measures anew, even if there is a table for this model and machine."
    )
    online: bool = Field(
        False,
        description="If true, kinds of batches that were not decided at start are decided while serving: each "
        "candidate in turn is compared with un-split steps, until one is faster. They end with the process.",
    )
    guard_window: int = Field(
        64,
        ge=8,
        description="While serving, the guard looks at a candidate after so many steps of its bucket. If it has become "
        "slower, some steps run un-split, and if these are faster, the candidate is switched off.",
    )
    straddle: bool = Field(True, description="If true, a split may cut inside a request.")
    min_collective_kib: int = Field(
        0,
        ge=0,
        description="A split is declined if a micro-batch's collective would move fewer KiB, because many libraries "
        "take slower algorithms there.",
    )

    @field_validator("micro_batches")
    @classmethod
    def _sorted(cls, values: list[int]) -> list[int]:
        if min(values) < 1:
            raise ValueError("each at least 1")
        return sorted(set(values))


class AutoSelector(Selector):
    """This selector applies the policy to the candidates that its options name.

    Attributes:
        table: The decisions that it serves by, or None while there are none.
        guard: The guard over adopted candidates, once there is a table.
        switched_off: The number of buckets whose candidate the guard has switched off.
    """

    name = AUTO

    def __init__(self, options: AutoOptions | None = None) -> None:
        """Build the candidates.

        Raises:
            ConfigError: A candidate is not valid or is given twice, or `only` names one that does not exist.
        """
        self._options = options or AutoOptions.model_validate({})
        self._by_label = _candidates(self._options)
        for label in self._options.only:
            if label not in self._by_label:
                raise ConfigError(f"option only of strategy 'auto': {unknown_name('candidate', label, self._by_label)}")
        self.table: Table | None = None
        self.guard: Guard | None = None
        self.switched_off = 0
        self._adopted: dict[Bucket, str] = {}
        self._why: dict[Bucket, str] = {}  # decided buckets that are not split, with the reason
        self._to_try: dict[Bucket, list[str]] = {}  # the candidates that are left for buckets decided while serving
        self._facts = Facts({})

    @property
    def options(self) -> AutoOptions:
        return self._options

    @property
    def candidates(self) -> tuple[str, ...]:
        return tuple(self._by_label)

    @property
    def in_use(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._adopted.values()))

    @property
    def measured(self) -> tuple[str, ...]:
        """These candidates are for this process to measure."""
        return tuple(c for c in self._by_label if not self._options.only or c in self._options.only)

    def strategy(self, candidate: str) -> OpScheduler:
        """Return the strategy labelled `candidate`, or a sequential one where no candidate has that label."""
        if candidate in self._by_label:
            return self._by_label[candidate]
        prefix, _, number = candidate.rpartition(" x")
        if prefix == Sequential.name:  # the reference of the tuner's profiles
            return in_turn(int(number))
        return Sequential()

    def serve_by(self, table: Table, session: Session, ranks: Ranks | None = None, facts: Facts | None = None) -> None:
        """Look decisions up in `table` from now on, and watch them in the steps of `session`.

        Decisions of earlier tables stay for buckets that this one has none of.

        Args:
            table: The decisions, equal on all ranks.
            session: The guard observes the steps of this session.
            ranks: The ranks that decide alike; by default, those of the session.
            facts: For the side effects of splits that are tried while serving.

        Raises:
            ConfigError: The table names a candidate that does not exist.
        """
        if unknown := set(table.adopted.values()) - set(self._by_label):
            raise ConfigError(f"the policy table names {', '.join(sorted(unknown))}: no candidate of this config")
        if self.guard is None:
            switch_off = functools.partial(self._switch_off, session.metrics)
            self.guard = Guard(self._options.guard_window, ranks or session.ranks, switch_off, self._tried)
            # The guard estimates what a step saved, and the metrics count it afterwards.
            session.observe_with(self.guard, first=True)
        self._facts = facts or self._facts
        for decision in table.decisions:
            bucket = decision.bucket
            self._adopted.pop(bucket, None)
            self._why.pop(bucket, None)
            self.guard.forget_bucket(bucket)
            if decision.candidate:
                self._adopted[bucket] = decision.candidate
                self.guard.watch_bucket(bucket, max(decision.noise or 0.0, self._options.min_gain))
            elif decision.decided:
                self._why[bucket] = FASTER_WHOLE
        earlier = [] if self.table is None else self.table.decisions
        new = {d.bucket for d in table.decisions}
        kept = [d for d in earlier if d.bucket not in new]
        self.table = table.model_copy(update={"decisions": [*table.decisions, *kept]})

    def split(self, batch: Batch) -> Split:
        """Split `batch` as its bucket's adopted candidate does, or leave it whole with the reason."""
        bucket = bucket_of(batch)
        candidate = self._adopted.get(bucket)
        if candidate is None and self._options.online and bucket not in self._why:
            candidate = self._put_on_trial(bucket, batch)
        if candidate is None:
            return whole(batch, self._why.get(bucket, NOT_DECIDED))
        if self.guard is not None and self.guard.runs_plain(bucket):
            return whole(batch, COMPARING if bucket in self._adopted else self._why.get(bucket, NOT_DECIDED))
        return self.cut(batch, candidate)

    def cut(self, batch: Batch, candidate: str) -> Split:
        return whole(batch, TUNING) if candidate == PLAIN else super().cut(batch, candidate)

    def veto(self, batch: Batch, split: Split, facts: Facts) -> str:
        """Return why the options rule the `split` of `batch` out, or ""."""
        effects = SideEffects.of_split(batch, split, facts)
        return effects.veto(self._options.straddle, self._options.min_collective_kib)

    def decisions(self) -> dict[str, Any] | None:
        """Return the table as plain data, for reports."""
        return None if self.table is None else self.table.model_dump()

    def _put_on_trial(self, bucket: Bucket, batch: Batch) -> str | None:
        """Let the guard compare the next candidate that cuts `batch`, and return it; None if there is none."""
        if self.guard is None:
            return None
        left = self._to_try.setdefault(bucket, self._likely_first(bucket))
        for candidate in left:
            split = self.cut(batch, candidate)
            if len(split.micro_batches) > 1 and not self.veto(batch, split, self._facts):
                left.remove(candidate)
                self._adopted[bucket] = candidate
                self.guard.try_bucket(bucket, self._options.min_gain)
                return candidate
        return None

    def _likely_first(self, bucket: Bucket) -> list[str]:
        """Return the candidates that split, those of the nearest buckets of the kind first."""
        same = [b for b in self._adopted if b.kind == bucket.kind]
        near = sorted(same, key=lambda b: abs(math.log2(b.tokens / bucket.tokens)))
        labels = dict.fromkeys([*(self._adopted[b] for b in near), *self.measured])
        return [label for label in labels if not self.plans_unsplit(label)]

    def _tried(self, bucket: Bucket, speed_up: float, won: bool) -> None:
        """Keep the candidate that was on trial, or give way to the next one."""
        candidate = self._adopted[bucket]
        if not won:
            del self._adopted[bucket]
            if not self._to_try[bucket]:
                self._why[bucket] = FASTER_WHOLE
        logger.info(
            "DynaFlow: %s %s for %s: %.2fx as fast as un-split steps while serving",
            candidate, "is adopted" if won else "is not adopted", bucket, speed_up,
        )  # fmt: skip

    def _switch_off(self, metrics: Metrics, bucket: Bucket, speed_up: float) -> None:
        candidate = self._adopted.pop(bucket)
        self._why[bucket] = SWITCHED_OFF
        self.switched_off += 1
        metrics.switched_off()
        logger.warning(
            "DynaFlow: %s is switched off for %s: %.2fx as fast as un-split steps while serving",
            candidate, bucket, speed_up,
        )  # fmt: skip


def in_turn(micro_batches: int) -> Sequential:
    """Return the strategy that operators are timed in: micro-batches one after the other on one stream."""
    return Sequential(SequentialOptions(micro_batches=micro_batches, min_tokens=1))


def build_selector(config: Config) -> Selector:
    """Build the selector that splits and orders the steps under `config`.

    Raises:
        ConfigError: The strategy or one of its options is not valid.
    """
    if not config.strategy.endswith(".py") and config.strategy not in strategy_names():
        valid = unknown_name("strategy", config.strategy, strategy_names())
        raise ConfigError(f"{valid} The path of a .py file that registers one, or of a YAML file, works too.")
    if config.strategy != AUTO:
        return FixedStrategy(build_strategy(config.strategy, config.options))
    return AutoSelector(checked_options(AutoOptions, config.options, AUTO))


def strategy_names() -> list[str]:
    """Return all names that a config's `strategy` may have; paths of files are valid, too."""
    return sorted([AUTO, *strategies.strategy_names()])


def options_of(strategy: str) -> type[BaseModel]:
    """Return the pydantic model of a strategy's options.

    Raises:
        ConfigError: There is no such strategy.
    """
    return AutoOptions if strategy == AUTO else strategies.get_strategy(strategy).Options


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a config file, with the options of every registered strategy."""
    schema = Config.model_json_schema()
    schema["title"] = "dynaflow_serving strategy config"
    schema["allOf"] = [
        {
            "if": {"properties": {"strategy": {"const": name}}},
            "then": {"properties": {"options": options_of(name).model_json_schema()}},
        }
        for name in strategy_names()
    ]
    return schema


def _candidates(options: AutoOptions) -> dict[str, OpScheduler]:
    """Return the candidates by label. Their token thresholds are 1, because measuring finds out what is too small."""
    found: dict[str, OpScheduler] = {}
    for entry in options.candidates:
        name, given = (entry, {}) if isinstance(entry, str) else _named(entry)
        if name == AUTO:
            raise ConfigError("candidates of strategy 'auto': 'auto' itself is none")
        cls = strategies.get_strategy(name)
        fields = cls.Options.model_fields
        fixed = "micro_batches" in given or "micro_batches" not in fields
        for n in [None] if fixed else options.micro_batches:
            if n == 1 and not cls.schedules_unsplit:
                continue
            values = {"min_tokens": 1} if "min_tokens" in fields else {}
            values |= {} if n is None else {"micro_batches": n}
            strategy = build_strategy(name, {**values, **given})
            if strategy.max_micro_batches == 1 and not strategy.schedules_unsplit:
                continue
            label = _label(strategy, given)
            if label in found:
                raise ConfigError(f"candidates of strategy 'auto': {label} is given twice")
            found[label] = strategy
    if not found:
        raise ConfigError("no candidate of strategy 'auto' splits a batch or orders un-split steps: nothing to choose")
    return found


def _label(strategy: OpScheduler, given: Mapping[str, Any]) -> str:
    number = [f"x{strategy.max_micro_batches}"] if strategy.max_micro_batches > 1 else []
    chosen = [f"{name}={value}" for name, value in given.items() if name not in ("micro_batches", "min_tokens")]
    return " ".join([strategy.name, *number, *chosen])


def _named(entry: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of a candidate that is given as a mapping."""
    if not isinstance(entry.get("strategy"), str) or entry.keys() - {"strategy", "options"}:
        raise ConfigError(f"candidates of strategy 'auto': {entry!r} is not {{strategy: NAME, options: {{...}}}}")
    return entry["strategy"], dict(entry.get("options") or {})
