"""Steps of an engine with exactly the given batch, for `dynaflow explain`.

Contract
- An engine that receives a batch piecemeal runs it in several steps. `run_steps` leaves such a try out and tries again,
  a few times.
- An engine that fails leaves its log, and the error names it.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dynaflow_serving.bench.defaults import default_dtype
from dynaflow_serving.bench.engines import find_engine
from dynaflow_serving.bench.environment import has_gpu
from dynaflow_serving.bench.process import EngineProcess
from dynaflow_serving.bench.settings import EngineSettings, Request
from dynaflow_serving.config import Config
from dynaflow_serving.core.timeline import Timeline
from dynaflow_serving.session.report import WorkerReport

SPARE = 8  # positions beyond a prompt: one for its new token, and SGLang keeps six to itself


@dataclass(frozen=True)
class MeasuredStep:
    """One step of the batch.

    Attributes:
        seconds: The duration of the step, with all that the engine does before and after the model.
        split: Whether the step was split.
        timelines: One timeline per Program where the step was traced, else none.
    """

    seconds: float
    split: bool
    timelines: tuple[Timeline, ...]


def one_step(
    engine: str, model: str, tokens: tuple[int, ...], config: Config, dtype: str | None, tensor_parallel: int
) -> WorkerReport:
    """Run one prefill of prompts with `tokens` tokens each and return rank 0's report.

    Raises:
        EngineProcessError: The engine failed.
    """
    with _engine(engine, model, tokens, config, dtype, tensor_parallel) as (process, vocabulary):
        process.generate(_prompts(tokens, vocabulary, 0))
        return process.report()[0]


def run_steps(
    engine: str,
    model: str,
    tokens: tuple[int, ...],
    config: Config,
    dtype: str | None,
    tensor_parallel: int,
    runs: int,
) -> tuple[list[MeasuredStep], WorkerReport]:
    """Run the prefill of `one_step` repeatedly.

    Returns:
        At most `runs` steps, of which the engine cut none, and rank 0's report after the last.

    Raises:
        EngineProcessError: The engine failed.
    """
    found: list[MeasuredStep] = []
    with _engine(engine, model, tokens, config, dtype, tensor_parallel) as (process, vocabulary):
        report = process.report()[0]
        for number in range(2 * runs):
            if len(found) == runs:
                break
            seconds, _ = process.generate(_prompts(tokens, vocabulary, number))
            before, report = report, process.report()[0]
            split = report.steps.split - before.steps.split
            unsplit = sum(report.steps.unsplit.values()) - sum(before.steps.unsplit.values())
            if split + unsplit == 1:
                new = report.timelines if report.timelines != before.timelines else []
                found.append(MeasuredStep(seconds, split=bool(split), timelines=tuple(map(Timeline.from_dict, new))))
    return found, report


@contextmanager
def _engine(
    engine: str, model: str, tokens: tuple[int, ...], config: Config, dtype: str | None, tensor_parallel: int
) -> Iterator[tuple[EngineProcess, int]]:
    """Start the engine; yield it, with its counters at zero, and the size of its vocabulary."""
    entry = find_engine(engine)
    environment = entry.environment(tensor_parallel, gpu=has_gpu(), compiled=False, local_model=True)
    settings = EngineSettings(
        model=model,
        dtype=dtype or default_dtype(),
        tensor_parallel=tensor_parallel,
        compiled=False,
        max_model_len=max(tokens) + SPARE,
        max_batched_tokens=max(sum(tokens), 256),
        dynaflow=config.model_dump(),
    )
    logs = Path(tempfile.mkdtemp(prefix="dynaflow-explain-"))
    process = EngineProcess("engine", entry.driver, environment, logs / "engine.log")
    try:
        vocabulary = process.start(settings).vocabulary
        process.reset()
        yield process, vocabulary
        process.close()
    finally:
        process.kill()
    shutil.rmtree(logs)


def _prompts(tokens: tuple[int, ...], vocabulary: int, seed: int) -> list[Request]:
    """Return prompts for one new token each, so that the prefill is the only step.

    Another seed gives prompts that no prefix cache knows.
    """
    draw = random.Random(seed)
    return [Request([draw.randrange(vocabulary) for _ in range(n)], 1) for n in tokens]
