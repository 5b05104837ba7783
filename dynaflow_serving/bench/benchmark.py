"""One benchmark of an engine, as the user asked for it, before it is known whether engines or servers are compared.

Contract
- `make_benchmark` decides what the user left open: the model, the dtype and whether the engine compiles.
- Both kinds of comparison are made from the same settings, so that their figures are about the same engine.
- `facts` returns what the JSON files of both kinds say of the settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dynaflow_serving.bench.compare import OfflineBenchmark
from dynaflow_serving.bench.defaults import default_dtype
from dynaflow_serving.bench.engines import Engine, find_engine
from dynaflow_serving.bench.environment import has_gpu
from dynaflow_serving.bench.serving.loads import Load
from dynaflow_serving.bench.serving.run import ServingBenchmark
from dynaflow_serving.bench.serving.tool import load_tool
from dynaflow_serving.bench.settings import EngineSettings, Traffic
from dynaflow_serving.bench.tiny_models import find_model
from dynaflow_serving.config import Config
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.policy.selector import build_selector

GPU_SHARE = 0.9  # of a GPU's memory, for both engines together; vLLM's own default for one
LENGTH_UNIT = 64  # tokens; the engines' greatest length is a multiple of it


@dataclass(frozen=True)
class Benchmark:
    """The part that a comparison of engines and one of servers have in common.

    Attributes:
        name: The engine's name in `ENGINES`; `engine` is the entry.
        settings: The settings of each of the two engines, without DynaFlow.
        config: The config of the engine that runs under DynaFlow.
        pairs: The number of timed pairs of passes.
        environment: The environment variables of both engines' processes.
        settle_seconds: The rest before each pass, after which idle ranks no longer spin.
        gpu: Whether the engines run on GPUs.
        command: The command that the user typed, for the record.
    """

    name: str
    engine: Engine
    settings: EngineSettings
    config: Config
    pairs: int
    environment: dict[str, str]
    settle_seconds: float
    gpu: bool
    command: str

    @property
    def strategy_options(self) -> dict[str, Any]:
        """All options of the strategy with their values, the defaults included."""
        options: dict[str, Any] = build_selector(self.config).options.model_dump()
        return options

    @property
    def graph(self) -> str:
        """Whether the engines compile their graphs, in words."""
        return "compiled" if self.settings.compiled else self.engine.uncompiled

    def offline(self, traffic: Traffic, logs: Path) -> OfflineBenchmark:
        """Return the comparison of two engines on the same requests."""
        length = math.ceil(traffic.longest / LENGTH_UNIT) * LENGTH_UNIT
        return OfflineBenchmark(
            driver=self.engine.driver,
            settings=replace(self.settings, max_model_len=length),
            dynaflow=self.config.model_dump(),
            traffic=traffic,
            pairs=self.pairs,
            environment=self.environment,
            logs=logs,
            settle_seconds=self.settle_seconds,
        )

    def serving(self, loads: Sequence[Load], seed: int, work: Path) -> ServingBenchmark:
        """Return the comparison of two servers under the same loads."""
        return ServingBenchmark(
            tool=load_tool(self.engine.tool),
            settings=self.settings,
            dynaflow=self.config.model_dump(),
            loads=loads,
            pairs=self.pairs,
            seed=seed,
            gpu=self.gpu,
            environment=self.environment,
            work=work,
            settle_seconds=self.settle_seconds,
        )

    def facts(self, settings: EngineSettings, **more: Any) -> dict[str, Any]:
        """Return what the record says of the settings.

        Args:
            settings: The settings that the engines got.
            more: Entries of "config" that only one kind of comparison has.
        """
        return {
            "engine": self.name,
            "model": self.settings.model,
            "strategy": self.config.strategy,
            "command": self.command,
            "config": {
                "strategy_options": self.strategy_options,
                "graph": self.graph,
                "pairs": self.pairs,
                "environment": self.environment,
                **asdict(replace(settings, dynaflow=self.config.model_dump())),
                **more,
            },
        }


def make_benchmark(
    engine: str,
    model: str | None,
    config: Config,
    *,
    pairs: int,
    tensor_parallel: int,
    dtype: str | None,
    compiled: bool | None,
    max_batched_tokens: int | None,
    command: str,
) -> Benchmark:
    """Return the benchmark, with a value for all that the user left open (None).

    Raises:
        ConfigError: The engine or the model is unknown, or the engine leaves no choice about compilation.
    """
    entry = find_engine(engine)
    compiles = entry.compiled(compiled)
    model_path, local = find_model(model)
    gpu = has_gpu()
    return Benchmark(
        name=engine,
        engine=entry,
        settings=EngineSettings(
            model=model_path,
            dtype=dtype or default_dtype(),
            tensor_parallel=tensor_parallel,
            compiled=compiles,
            max_batched_tokens=max_batched_tokens,
            memory_share=GPU_SHARE / 2,
        ),
        config=config,
        pairs=pairs,
        environment=entry.environment(tensor_parallel, gpu=gpu, compiled=compiles, local_model=local),
        settle_seconds=entry.spin_seconds if tensor_parallel > 1 and not gpu else 0.0,
        gpu=gpu,
        command=command,
    )


def assert_can_serve(engine: str, pairs: int) -> None:
    """Check before anything runs that servers can be compared and a report can be written.

    Raises:
        ConfigError: The engine has no server that can be benchmarked, or there are too few pairs.
        DynaflowError: The engine, or a package that the report needs, is not installed.
    """
    from dynaflow_serving.bench.serving.report import assert_can_report

    entry = find_engine(engine)
    if not entry.tool:
        raise ConfigError(f"--html: {engine} has no server that can be benchmarked; leave --html out")
    if pairs < 2:
        raise ConfigError("--html: a report shows the spread of several pairs; --pairs must be 2 or more")
    assert_can_report()
    load_tool(entry.tool).version()  # raises, if the engine is not here
