"""`dynaflow bench`: the stock engine against the same engine under DynaFlow.

Contract
- Without --html two engines run offline, and their tokens are compared. With it two servers run under load, and a
  report is written.
- A run that split no step, whose tokens differ or whose requests failed writes its files. It then ends with exit
  code 1 and the reason.
- The output and the files say what was chosen for the user: model, strategy, dtype, compilation.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType

from dynaflow_serving.cli.options import (
    CompiledOption,
    JSONOption,
    MaxBatchedTokensOption,
    MicroBatchesOption,
    OptionOption,
    StrategyOption,
    TensorParallelOption,
    command_line,
    configure,
)
from dynaflow_serving.cli.output import progress_bar, say, say_on_stderr
from dynaflow_serving.errors import ConfigError

if TYPE_CHECKING:
    from dynaflow_serving.bench.benchmark import Benchmark
    from dynaflow_serving.bench.serving.loads import Load
    from dynaflow_serving.bench.settings import Traffic

LOADS, RATES = ("random", "sharegpt"), (8.0, float("inf"))

EngineArgument = Annotated[str, typer.Argument(help="Engine to benchmark: vllm or sglang.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="PATH",
        help="Model directory, Hugging Face name, or tiny model made here (llama, qwen3, mixtral, qwen3_moe). "
        "Default: tiny llama.",
    ),
]
PairsOption = Annotated[int, typer.Option(min=1, help="Timed pairs of passes.")]
DtypeOption = Annotated[str | None, typer.Option(help="Default: float32 on CPU, auto on GPU.")]
RequestsOption = Annotated[int, typer.Option(min=1, help="Requests of a pass; without --rate, all sent at once.")]
InputLenOption = Annotated[int, typer.Option(min=1, help="Mean prompt length, tokens (half to 1.5 times).")]
OutputLenOption = Annotated[int, typer.Option(min=1, help="Mean output length, tokens (half to 1.5 times).")]
SeedOption = Annotated[int, typer.Option(help="Seed of the prompts and their lengths.")]
HTMLOption = Annotated[
    Path | None, typer.Option("--html", help="Benchmark servers under load instead, and write a report to this file.")
]
LoadOption = Annotated[
    list[str] | None,
    typer.Option(help="With --html: random or sharegpt; may be repeated. Default: both.", show_default=False),
]
RateOption = Annotated[
    list[float] | None,
    typer.Option(
        help="With --html: requests per second (inf: all at once); may be repeated. Default: 8 and inf.",
        show_default=False,
    ),
]


def bench(
    engine: EngineArgument,
    model: ModelOption = None,
    strategy: StrategyOption = None,
    micro_batches: MicroBatchesOption = None,
    option: OptionOption = None,
    pairs: PairsOption = 3,
    tensor_parallel: TensorParallelOption = 1,
    dtype: DtypeOption = None,
    compiled: CompiledOption = None,
    requests: RequestsOption = 64,
    input_len: InputLenOption = 128,
    output_len: OutputLenOption = 64,
    max_batched_tokens: MaxBatchedTokensOption = None,
    seed: SeedOption = 0,
    json_path: JSONOption = None,
    html: HTMLOption = None,
    load: LoadOption = None,
    rate: RateOption = None,
) -> None:
    """Compare an engine with itself under DynaFlow: same requests, in turn, several pairs."""
    from dynaflow_serving.bench.benchmark import assert_can_serve, make_benchmark
    from dynaflow_serving.bench.defaults import DEFAULT_CONFIG
    from dynaflow_serving.bench.serving.loads import make_loads
    from dynaflow_serving.bench.settings import Traffic

    if html is not None:
        assert_can_serve(engine, pairs)
    elif load or rate:
        raise ConfigError("--load and --rate are for servers: add --html FILE. Offline, all requests are sent at once.")
    benchmark = make_benchmark(
        engine, model, configure(strategy or DEFAULT_CONFIG, micro_batches, option),
        pairs=pairs, tensor_parallel=tensor_parallel, dtype=dtype, compiled=compiled,
        max_batched_tokens=max_batched_tokens, command=command_line(),
    )  # fmt: skip
    _say_what_is_chosen(benchmark, default_strategy=strategy is None)
    if html is None:
        traffic = Traffic(requests=requests, input_len=input_len, output_len=output_len, seed=seed)
        _compare_engines(benchmark, traffic, json_path)
    else:
        loads = make_loads(load or LOADS, rate or RATES, requests, input_len, output_len)
        _compare_servers(benchmark, loads, seed, json_path, html)


def _say_what_is_chosen(benchmark: Benchmark, *, default_strategy: bool) -> None:
    options = ", ".join(f"{name}={value}" for name, value in benchmark.strategy_options.items()) or "no options"
    origin = " (default of this command; --strategy chooses another)" if default_strategy else ""
    say_on_stderr(f"strategy {benchmark.config.strategy}: {options}{origin}")
    settings = benchmark.settings
    say_on_stderr(f"model {settings.model}, {settings.dtype}, both engines {benchmark.graph}")


def _compare_engines(benchmark: Benchmark, traffic: Traffic, json_path: Path | None) -> None:
    from dynaflow_serving.bench.compare import compare
    from dynaflow_serving.bench.report import CPU_OFFLINE, tables
    from dynaflow_serving.bench.result import record, write_json

    work = Path(tempfile.mkdtemp(prefix="dynaflow-bench-"))
    offline = benchmark.offline(traffic, work)
    with progress_bar(offline.stages) as tell:
        comparison = compare(offline, tell)
    result = record(comparison, benchmark.facts(offline.settings, traffic=asdict(traffic)))
    if json_path is not None:
        write_json(json_path, result)
    _conclude(tables(result), ["" if benchmark.gpu else CPU_OFFLINE, result["noise"]], result["failures"], work)


def _compare_servers(benchmark: Benchmark, loads: list[Load], seed: int, json_path: Path | None, html: Path) -> None:
    from dynaflow_serving.bench.environment import machine
    from dynaflow_serving.bench.report import CPU_SERVERS
    from dynaflow_serving.bench.result import write_json
    from dynaflow_serving.bench.serving.record import record
    from dynaflow_serving.bench.serving.report import render
    from dynaflow_serving.bench.serving.run import serve_in_turn
    from dynaflow_serving.bench.serving.table import tables
    from dynaflow_serving.files import write_text

    work = Path(tempfile.mkdtemp(prefix="dynaflow-bench-"))
    serving = benchmark.serving(loads, seed, work)
    with progress_bar(serving.stages) as tell:
        served = serve_in_turn(serving, tell)
    facts: dict[str, Any] = benchmark.facts(serving.settings, seed=seed)
    result = record(serving, served, facts | {"machine": machine()})
    if json_path is not None:
        write_json(json_path, result)
    write_text(html, render(result))
    _conclude(tables(result), ["" if benchmark.gpu else CPU_SERVERS, *result["notes"]], result["failures"], work)


def _conclude(tables: Iterable[RenderableType], notes: Sequence[str], problems: Sequence[str], work: Path) -> None:
    """Print the tables, what to know about them, and the verdict. Only a failed run keeps its logs."""
    console = Console()
    for table in tables:
        console.print(table)
    for note in filter(None, notes):
        say(f"\n{note}")
    for problem in problems:
        say_on_stderr(f"dynaflow: FAILED: {problem} (engine logs: {work})")
    if problems:
        raise typer.Exit(1)
    shutil.rmtree(work)
