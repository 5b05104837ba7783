"""Tuning without serving: `dynaflow tune`.

Contract
- A `TuningJob` runs in a child process that tunes at its start: an engine as it would serve, or an embedded example.
  The settings that depend on the machine (the engine's defaults, environment) are decided where the job runs.
- `make_shares` deals the candidates out to several jobs. Each measures its own against its own un-split steps. All have
  the key of a process with all candidates, so that `merge_tables` can put the tables together.
- A merged table holds all trials. The tuner's own rule concludes from them, with the noise of the noisiest share that
  has timed a candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from dynaflow_serving.bench.engines import find_engine
from dynaflow_serving.bench.process import EngineProcess
from dynaflow_serving.bench.settings import EngineSettings
from dynaflow_serving.bench.tiny_models import find_model
from dynaflow_serving.capture.examples import EXAMPLES
from dynaflow_serving.config import Config
from dynaflow_serving.errors import ConfigError, DynaflowError
from dynaflow_serving.policy.bucket import Bucket
from dynaflow_serving.policy.selector import AutoSelector, build_selector
from dynaflow_serving.policy.table import Decision, Table, Trial, differences
from dynaflow_serving.policy.tuner import adopt_best_trial

EXAMPLE_DRIVER = "dynaflow_serving.tune.example:ExampleDriver"


class TuningError(DynaflowError):
    """A table cannot be measured, or cannot be put together."""


@dataclass(frozen=True)
class TuningJob:
    """The target of tuning, and the settings of its engine; None stands for the engine's own default.

    Attributes:
        target: An embedded example, a model directory or a Hugging Face name.
        config: The content of a config file with strategy 'auto'.
        engine: The engine's name; "" for an embedded example.
        tensor_parallel: The number of ranks.
        dtype: The dtype of the model.
        compiled: Whether the engine compiles its graph.
        max_model_len: The most tokens of a request.
        max_batched_tokens: The most tokens of a step.
        local: Whether the model is on this machine.
    """

    target: str
    config: dict[str, Any]
    engine: str = ""
    tensor_parallel: int = 1
    dtype: str | None = None
    compiled: bool | None = None
    max_model_len: int | None = None
    max_batched_tokens: int | None = None
    local: bool = True

    @property
    def selector(self) -> AutoSelector:
        """The selector of its strategy.

        Raises:
            ConfigError: The strategy decides nothing.
        """
        selector = build_selector(Config(**self.config))
        if not isinstance(selector, AutoSelector):
            raise ConfigError(
                f"strategy {selector.name!r} decides nothing, so there is nothing to tune: give the config of a "
                "strategy 'auto', with others as its candidates (--candidate)"
            )
        return selector

    @property
    def summary(self) -> str:
        """The candidates that are measured, and how long that may take, in words."""
        selector = self.selector
        return f"candidates {', '.join(selector.measured)}; at most {selector.options.budget_seconds:g} s of measuring"

    def with_choices(
        self, candidates: list[str] | None, micro_batches: list[int] | None, budget_seconds: float | None
    ) -> TuningJob:
        """Return the job with choices of the user's in place of the config's; None keeps the config's.

        Raises:
            ConfigError: The strategy decides nothing, or a choice is not valid.
        """
        self.selector  # noqa: B018  raises for another strategy
        choices: dict[str, Any] = {
            "candidates": candidates and [_absolute(name) for name in candidates],
            "micro_batches": micro_batches,
            "budget_seconds": budget_seconds,
        }
        return self.with_options(**{name: value for name, value in choices.items() if value is not None})

    def with_options(self, **options: Any) -> TuningJob:
        """Return the job with other options of the strategy.

        Raises:
            ConfigError: An option is not valid.
        """
        config = Config(**self.config)
        changed = config.model_copy(update={"options": {**config.options, **options}})
        build_selector(changed)  # raises for options that are not valid
        return replace(self, config=changed.model_dump())


def _absolute(candidate: str) -> str:
    """Make the path of a strategy file one that holds in any working directory."""
    return str(Path(candidate).resolve()) if candidate.endswith(".py") else candidate


def for_example(job: TuningJob) -> TuningJob:
    """Return the job if its target is an embedded example that can be tuned.

    Raises:
        ConfigError: There is no such example, or a setting is given that only models have.
    """
    if job.target not in EXAMPLES:
        raise ConfigError(
            f"target {job.target!r} is not an embedded example ({', '.join(EXAMPLES)}). For a model, say which engine "
            "will serve it: --engine vllm or --engine sglang"
        )
    given = {
        "--tensor-parallel": job.tensor_parallel > 1,
        "--dtype": job.dtype,
        "--compiled and --uncompiled": job.compiled is not None,
        "--max-model-len": job.max_model_len,
        "--max-batched-tokens": job.max_batched_tokens,
    }
    if wrong := [name for name, is_given in given.items() if is_given]:
        raise ConfigError(f"{', '.join(wrong)}: for models (--engine), not for embedded examples")
    return job


def for_engine(job: TuningJob, engine: str) -> TuningJob:
    """Return the job of an engine that loads the target as its model.

    Raises:
        ConfigError: The engine or the model is unknown, or the engine leaves no choice about compilation.
    """
    entry = find_engine(engine)
    if job.compiled is not None:
        entry.compiled(job.compiled)
    model, local = find_model(job.target)
    return replace(job, target=model, local=local, engine=engine)


def tune_in_child(job: TuningJob, name: str, log: Path) -> Table:
    """Tune in a child process.

    Args:
        job: What to tune.
        name: The name of the child in messages.
        log: The file for its output; the engine writes its table beside it.

    Raises:
        EngineProcessError: The child failed.
        TuningError: The engine did not tune.
    """
    job = job.with_options(retune=True, table=str(log.with_suffix(".json")))
    if job.engine:
        process, settings = _engine(job, name, log)
    else:
        # One thread: these models are so small that more of them mostly wait for one another.
        process = EngineProcess(name, EXAMPLE_DRIVER, {"OMP_NUM_THREADS": "1"}, log)
        settings = EngineSettings(model=job.target, dynaflow=job.config)
    try:
        process.start(settings)
        policy = process.report()[0].policy
        process.close()
    finally:
        process.kill()
    if policy is None:
        raise TuningError(f"{name} has started, but has decided nothing (engine log: {log})")
    return Table.model_validate(policy)


def _engine(job: TuningJob, name: str, log: Path) -> tuple[EngineProcess, EngineSettings]:
    entry = find_engine(job.engine)
    # Every choice is the one of the engine's own server, since the table is to hold for that. The variables that the
    # benchmark sets on a CPU are for two engines that share it, so they are left out.
    compiled = entry.compiled(True if job.compiled is None and not entry.fixed_graph else job.compiled)
    environment = entry.environment(job.tensor_parallel, gpu=True, compiled=compiled, local_model=job.local)
    settings = EngineSettings(
        model=job.target,
        dtype=job.dtype or "auto",
        tensor_parallel=job.tensor_parallel,
        compiled=compiled,
        max_model_len=job.max_model_len,
        max_batched_tokens=job.max_batched_tokens,
        memory_share=None,
        as_server=True,
        dynaflow=job.config,
    )
    return EngineProcess(name, entry.driver, environment, log), settings


def make_shares(job: TuningJob, most: int) -> list[TuningJob]:
    """Return at most `most` jobs, each with some of the job's candidates."""
    labels = job.selector.measured
    count = min(most, len(labels))
    return [job.with_options(only=list(labels[i::count])) for i in range(count)]


def merge_tables(measured: Sequence[tuple[TuningJob, Table]]) -> Table:
    """Return one table that holds the trials of all shares.

    Args:
        measured: Each share with its table.

    Raises:
        TuningError: The shares were not measured under one key.
    """
    (first, table), *others = measured
    for _, other in others:
        if found := differences(table.key, other.key, "in one share", "in another"):
            raise TuningError(
                f"the shares were not measured alike, so one table cannot hold for them: {found}. Use workers with the "
                "same device and the same releases"
            )
    selector = first.with_options(only=[]).selector
    by_bucket: dict[Bucket, list[tuple[TuningJob, Decision]]] = {}
    for job, part in measured:
        for decision in part.decisions:
            by_bucket.setdefault(decision.bucket, []).append((job, decision))
    decisions = [_merged(bucket, parts, selector) for bucket, parts in by_bucket.items()]
    return Table(key=table.key, decisions=decisions, seconds=max(t.seconds for _, t in measured))


def _merged(bucket: Bucket, parts: Sequence[tuple[TuningJob, Decision]], selector: AutoSelector) -> Decision:
    merged = Decision(kind=bucket.kind, tokens=bucket.tokens, requests=bucket.requests)
    tried = [d for _, d in parts if d.noise is not None]
    if not tried:
        merged.reason = "; ".join(dict.fromkeys(d.reason for _, d in parts))
        return merged
    trials: dict[str, Trial] = {}
    for job, decision in parts:
        own = decision.trials or [Trial(candidate=c, verdict=decision.reason) for c in job.selector.measured]
        trials |= {t.candidate: t.model_copy(deep=True) for t in own}
    merged.trials = [trials[label] for label in selector.candidates if label in trials]
    timed = [d for d in tried if any(t.ratios for t in d.trials)] or tried
    merged.plain_ms = median(d.plain_ms for d in timed if d.plain_ms is not None)
    merged.noise = max(d.noise for d in timed if d.noise is not None)
    adopt_best_trial(merged, selector.options.min_gain)
    return merged
