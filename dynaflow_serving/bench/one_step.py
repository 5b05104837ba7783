"""One step of an engine with exactly the given batch, for `dynaflow explain`."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from dynaflow_serving.bench.defaults import default_dtype
from dynaflow_serving.bench.engines import find_engine
from dynaflow_serving.bench.environment import has_gpu
from dynaflow_serving.bench.process import EngineProcess
from dynaflow_serving.bench.settings import EngineSettings, Request
from dynaflow_serving.config import Config


def one_step(
    engine: str, model: str, tokens: tuple[int, ...], config: Config, dtype: str | None, tensor_parallel: int
) -> dict[str, Any]:
    """Rank 0's report after one prefill of prompts with `tokens` tokens each.

    Raises `EngineProcessError`; the engine's log is kept then.
    """
    entry = find_engine(engine)
    environment = entry.environment(tensor_parallel, gpu=has_gpu(), compiled=False, local_model=True)
    settings = EngineSettings(
        model=model,
        dtype=dtype or default_dtype(),
        tensor_parallel=tensor_parallel,
        compiled=False,
        max_model_len=max(tokens) + 1,
        max_batched_tokens=max(sum(tokens), 256),
        dynaflow=config.model_dump(),
    )
    logs = Path(tempfile.mkdtemp(prefix="dynaflow-explain-"))
    process = EngineProcess("engine", entry.driver, environment, logs / "engine.log")
    try:
        vocabulary = process.start(settings).vocabulary
        process.reset()
        draw = random.Random(0)
        # One new token each: the prefill is the only step.
        process.generate([Request([draw.randrange(vocabulary) for _ in range(n)], 1) for n in tokens])
        report = process.report()[0]
        process.close()
    finally:
        process.kill()
    shutil.rmtree(logs)
    return report
