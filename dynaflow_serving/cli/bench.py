"""`dynaflow bench`: the stock engine against the same engine under DynaFlow.

Contract
- Without --html: two engines offline, tokens compared. With it: two servers under load, and a report.
- Engagement is asserted: a run that split no step, whose tokens differ or whose requests failed writes its files and
  ends with exit code 1 and the reason.
- What was chosen for the user (model, strategy, dtype, compilation) is said in the output and in the files.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from dynaflow_serving.bench.engines import Engine, find_engine
from dynaflow_serving.bench.serving.loads import Load, make_loads
from dynaflow_serving.bench.settings import EngineSettings, Traffic
from dynaflow_serving.cli.options import MicroBatchesOption, OptionOption, StrategyOption
from dynaflow_serving.errors import ConfigError

GPU_SHARE = 0.9  # of a GPU's memory, for both engines together; vLLM's own default for one
LOADS, RATES = ("random", "sharegpt"), (8.0, float("inf"))


def bench(
    engine: Annotated[str, typer.Argument(help="Engine to benchmark: vllm or sglang.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="PATH",
            help="Model directory, Hugging Face name, or tiny model made here (llama, qwen3, mixtral, qwen3_moe). "
            "Default: tiny llama.",
        ),
    ] = None,
    strategy: StrategyOption = None,
    micro_batches: MicroBatchesOption = None,
    option: OptionOption = None,
    pairs: Annotated[int, typer.Option(min=1, help="Timed pairs of passes.")] = 3,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", "-tp", min=1, help="Ranks.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="Default: float32 on CPU, auto on GPU.")] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compiled/--uncompiled",
            help="vLLM: both engines with or without compilation and CUDA graphs. Default: compiled on GPU only.",
            show_default=False,
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a pass; without --rate, all sent at once.")] = 64,
    input_len: Annotated[int, typer.Option(min=1, help="Mean prompt length, tokens (half to 1.5 times).")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Mean output length, tokens (half to 1.5 times).")] = 64,
    max_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one step at most. Default: the engine's.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts and their lengths.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Benchmark servers under load instead, and write a report to this file."),
    ] = None,
    load: Annotated[
        list[str] | None,
        typer.Option(help="With --html: random or sharegpt; may be repeated. Default: both.", show_default=False),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            help="With --html: requests per second (inf: all at once); may be repeated. Default: 8 and inf.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compare an engine with itself under DynaFlow: same requests, in turn, several pairs."""
    from dynaflow_serving.bench.defaults import DEFAULT_CONFIG, default_dtype
    from dynaflow_serving.bench.environment import has_gpu
    from dynaflow_serving.cli.options import configure, resolve_model, strategy_facts

    entry = find_engine(engine)
    graph = entry.compiled(compiled)
    if html is None and (load or rate):
        raise ConfigError("--load and --rate are for servers: add --html FILE. Offline, all requests are sent at once.")
    if html is not None:
        _assert_can_serve(engine, entry, pairs)
    config = configure(strategy or DEFAULT_CONFIG, micro_batches, option)
    model_path, local = resolve_model(model)
    gpu = has_gpu()
    common = Common(
        entry=entry,
        settings=EngineSettings(
            model=model_path,
            dtype=dtype or default_dtype(),
            tensor_parallel=tensor_parallel,
            compiled=graph,
            max_batched_tokens=max_batched_tokens,
            memory_share=GPU_SHARE / 2,
        ),
        dynaflow=config.model_dump(),
        pairs=pairs,
        environment=entry.environment(tensor_parallel, gpu=gpu, compiled=graph, local_model=local),
        settle_seconds=entry.spin_seconds if tensor_parallel > 1 and not gpu else 0.0,
        gpu=gpu,
    )
    facts = strategy_facts(config)
    run: dict[str, Any] = {
        "engine": engine,
        "model": model_path,
        "strategy": config.strategy,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config": {
            "dynaflow": config.model_dump(),
            "strategy_options": facts,
            "graph": "compiled" if graph else entry.uncompiled,
            "pairs": pairs,
            "environment": common.environment,
        },
    }
    err = Console(stderr=True)
    options = ", ".join(f"{name}={value}" for name, value in facts.items()) or "no options"
    chosen = " (default of this command; --strategy chooses another)" if strategy is None else ""
    _say(err, f"strategy {config.strategy}: {options}{chosen}")
    _say(err, f"model {model_path}, {common.settings.dtype}, both engines {run['config']['graph']}")
    if html is None:
        _offline(common, Traffic(requests, input_len, output_len, seed), run, json_path)
    else:
        loads = make_loads(load or LOADS, rate or RATES, requests, input_len, output_len)
        _servers(common, loads, seed, run, json_path, html)


@dataclass(frozen=True)
class Common:
    """What a comparison of engines and one of servers have in common."""

    entry: Engine
    settings: EngineSettings
    dynaflow: dict[str, Any]
    pairs: int
    environment: dict[str, str]
    settle_seconds: float
    gpu: bool


def _offline(common: Common, traffic: Traffic, run: dict[str, Any], json_path: Path | None) -> None:
    from dynaflow_serving.bench.compare import Contest, compare
    from dynaflow_serving.bench.report import CPU_OFFLINE, progress, tables
    from dynaflow_serving.bench.result import failures, noise, record, write_json

    work = Path(tempfile.mkdtemp(prefix="dynaflow-bench-"))
    contest = Contest(
        driver=common.entry.driver,
        settings=replace(common.settings, max_model_len=-(-traffic.longest // 64) * 64),
        dynaflow=common.dynaflow,
        traffic=traffic,
        pairs=common.pairs,
        environment=common.environment,
        logs=work,
        settle_seconds=common.settle_seconds,
    )
    with progress(Console(stderr=True), contest.stages) as tell:
        comparison = compare(contest, tell)
    run["config"] |= {**asdict(contest.settings), "dynaflow": common.dynaflow, "traffic": asdict(traffic)}
    result = record(comparison, run)
    if json_path is not None:
        write_json(json_path, result)
    _conclude(tables(result), ["" if common.gpu else CPU_OFFLINE, noise(comparison)], failures(comparison), work)


def _servers(
    common: Common, loads: list[Load], seed: int, run: dict[str, Any], json_path: Path | None, html: Path
) -> None:
    from dynaflow_serving.bench.environment import machine
    from dynaflow_serving.bench.report import CPU_SERVERS, progress
    from dynaflow_serving.bench.result import write_json
    from dynaflow_serving.bench.serving.record import record
    from dynaflow_serving.bench.serving.report import render
    from dynaflow_serving.bench.serving.run import ServingContest, serve_in_turn
    from dynaflow_serving.bench.serving.table import tables
    from dynaflow_serving.bench.serving.tool import load_tool
    from dynaflow_serving.files import write_text

    work = Path(tempfile.mkdtemp(prefix="dynaflow-bench-"))
    contest = ServingContest(
        tool=load_tool(common.entry.tool),
        settings=common.settings,
        dynaflow=common.dynaflow,
        loads=loads,
        pairs=common.pairs,
        seed=seed,
        gpu=common.gpu,
        environment=common.environment,
        work=work,
        settle_seconds=common.settle_seconds,
    )
    with progress(Console(stderr=True), contest.stages) as tell:
        runs = serve_in_turn(contest, tell)
    run["config"] |= {**asdict(contest.settings), "dynaflow": common.dynaflow, "seed": seed}
    result = record(contest, runs, run | {"machine": machine()})
    if json_path is not None:
        write_json(json_path, result)
    write_text(html, render(result))
    _conclude(tables(result), ["" if common.gpu else CPU_SERVERS, *result["notes"]], result["failures"], work)


def _conclude(tables: Iterable[RenderableType], notes: Sequence[str], problems: Sequence[str], work: Path) -> None:
    """Tables, what to know about them, and the verdict. Logs are kept only where they explain a failure."""
    out, err = Console(), Console(stderr=True)
    for table in tables:
        out.print(table)
    for note in filter(None, notes):
        _say(out, f"\n{note}")
    for problem in problems:
        _say(err, f"dynaflow: FAILED: {problem} (engine logs: {work})")
    if problems:
        raise typer.Exit(1)
    shutil.rmtree(work)


def _assert_can_serve(engine: str, entry: Engine, pairs: int) -> None:
    from dynaflow_serving.bench.serving.report import assert_can_report
    from dynaflow_serving.bench.serving.tool import load_tool

    if not entry.tool:
        raise ConfigError(f"--html: {engine} has no server that can be benchmarked; leave --html out")
    if pairs < 2:
        raise ConfigError("--html: a report shows the spread of several pairs; --pairs must be 2 or more")
    assert_can_report()
    load_tool(entry.tool).version()  # raises, if the engine is not here


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
