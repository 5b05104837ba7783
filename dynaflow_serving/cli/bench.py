"""`dynaflow bench`: the stock engine against the same engine under DynaFlow.

Contract
- Engagement is asserted: a run that split no step, or whose tokens differ, writes its JSON and ends with exit
  code 1 and the reason.
- What was chosen for the user (model, strategy, dtype, compilation) is said in the output and in the JSON.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dynaflow_serving.cli.options import MicroBatchesOption, OptionOption, StrategyOption

GPU_SHARE = 0.9  # of a GPU's memory, for both engines together; vLLM's own default for one


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
    requests: Annotated[int, typer.Option(min=1, help="Requests of a pass, all sent at once.")] = 64,
    input_len: Annotated[int, typer.Option(min=1, help="Mean prompt length, tokens (half to 1.5 times).")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Mean output length, tokens (half to 1.5 times).")] = 64,
    max_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one step at most. Default: the engine's.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts and their lengths.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Compare an engine with itself under DynaFlow: same requests, in turn, several pairs."""
    from dynaflow_serving.bench.compare import Contest, compare
    from dynaflow_serving.bench.defaults import DEFAULT_CONFIG, default_dtype
    from dynaflow_serving.bench.engines import find_engine
    from dynaflow_serving.bench.environment import has_gpu
    from dynaflow_serving.bench.report import CPU_NOTE, progress, tables
    from dynaflow_serving.bench.result import failures, noise, record, write_json
    from dynaflow_serving.bench.settings import EngineSettings, Traffic
    from dynaflow_serving.cli.options import configure, resolve_model, strategy_facts

    out, err = Console(), Console(stderr=True)
    entry = find_engine(engine)
    graph = entry.compiled(compiled)
    config = configure(strategy or DEFAULT_CONFIG, micro_batches, option)
    gpu = has_gpu()
    traffic = Traffic(requests, input_len, output_len, seed)
    model_path, local = resolve_model(model)
    settings = EngineSettings(
        model=model_path,
        dtype=dtype or default_dtype(),
        tensor_parallel=tensor_parallel,
        compiled=graph,
        max_model_len=-(-traffic.longest // 64) * 64,
        max_batched_tokens=max_batched_tokens,
        memory_share=GPU_SHARE / 2,
    )
    environment = entry.environment(tensor_parallel, gpu=gpu, compiled=graph, local_model=local)
    logs = Path(tempfile.mkdtemp(prefix="dynaflow-bench-"))
    contest = Contest(
        driver=entry.driver,
        settings=settings,
        dynaflow=config.model_dump(),
        traffic=traffic,
        pairs=pairs,
        environment=environment,
        logs=logs,
        settle_seconds=entry.spin_seconds if tensor_parallel > 1 and not gpu else 0.0,
    )
    options = ", ".join(f"{name}={value}" for name, value in strategy_facts(config).items()) or "no options"
    chosen = " (default of this command; --strategy chooses another)" if strategy is None else ""
    _say(err, f"strategy {config.strategy}: {options}{chosen}")
    _say(err, f"model {model_path}, {settings.dtype}, both engines {'compiled' if graph else entry.uncompiled}")
    with progress(err, contest.stages) as tell:
        comparison = compare(contest, tell)

    run: dict[str, Any] = {
        "engine": engine,
        "model": model_path,
        "strategy": config.strategy,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config": {
            **asdict(settings),
            "dynaflow": config.model_dump(),
            "strategy_options": strategy_facts(config),
            "traffic": asdict(traffic),
            "pairs": pairs,
            "environment": environment,
        },
    }
    result = record(comparison, run)
    if json_path is not None:
        write_json(json_path, result)
    for table in tables(result):
        out.print(table)
    if not gpu:
        _say(out, f"\n{CPU_NOTE}")
    if spread := noise(comparison):
        _say(out, f"\n{spread}")
    problems = failures(comparison)
    for problem in problems:
        _say(err, f"dynaflow: FAILED: {problem} (engine logs: {logs})")
    if problems:
        raise typer.Exit(1)
    shutil.rmtree(logs)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
