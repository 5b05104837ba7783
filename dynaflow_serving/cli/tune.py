"""`dynaflow tune`: the decisions of `strategy: auto`, measured before serving.

Contract
- TARGET is an embedded example (no engine needed) or a model, which an engine loads as it would to serve.
- The table is the one that a start with the same settings would measure itself, so that it need not.
- Nothing is written unless everything was measured.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynaflow_serving.cli.options import (
    CompiledOption,
    MaxBatchedTokensOption,
    OptionOption,
    TensorParallelOption,
    configure,
)
from dynaflow_serving.cli.output import WIDTH, console_of_tables, progress_lines, say, say_on_stderr

if TYPE_CHECKING:
    from dynaflow_serving.policy.table import Table
    from dynaflow_serving.tune.offline import TuningJob

TargetArgument = Annotated[
    str,
    typer.Argument(
        help="Embedded example (llama, moe, dit); with --engine: model directory, Hugging Face name, or tiny model "
        "made here."
    ),
]
AutoOption = Annotated[
    str, typer.Option("--strategy", "-s", metavar="NAME|FILE", help="YAML config with 'strategy: auto'.")
]
EngineOption = Annotated[str | None, typer.Option(help="Engine that will serve the model: vllm or sglang.")]
CandidateOption = Annotated[
    list[str] | None,
    typer.Option("--candidate", "-c", metavar="NAME|FILE", help="Instead of the config's candidates; may be repeated."),
]
NumbersOption = Annotated[
    list[int] | None, typer.Option("--micro-batches", "-n", help="Instead of the config's numbers; may be repeated.")
]
BudgetOption = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="For measuring; with --ray, of each share.", show_default=False)
]
DtypeOption = Annotated[str | None, typer.Option(help="Default: the engine's.", show_default=False)]
MaxModelLenOption = Annotated[int | None, typer.Option(min=2, help="Default: the engine's.", show_default=False)]
OutOption = Annotated[
    Path | None,
    typer.Option(help="Write the table here (option 'table' of the strategy), not where a start looks for it."),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Spread the candidates over the workers of this Ray cluster: HOST:PORT, 'auto', or 'local' for one that "
        "is started here.",
    ),
]


def tune(
    target: TargetArgument,
    strategy: AutoOption = "auto",
    engine: EngineOption = None,
    candidate: CandidateOption = None,
    micro_batches: NumbersOption = None,
    option: OptionOption = None,
    budget: BudgetOption = None,
    tensor_parallel: TensorParallelOption = 1,
    dtype: DtypeOption = None,
    compiled: CompiledOption = None,
    max_model_len: MaxModelLenOption = None,
    max_batched_tokens: MaxBatchedTokensOption = None,
    out: OutOption = None,
    ray: RayOption = None,
) -> None:
    """Measure which strategy wins for which kind of batch, and keep the table for serving."""
    from dynaflow_serving.policy.table import default_path
    from dynaflow_serving.tune.offline import TuningJob, for_engine, for_example

    job = TuningJob(
        target=target,
        config=configure(strategy, None, option).model_dump(),
        tensor_parallel=tensor_parallel,
        dtype=dtype,
        compiled=compiled,
        max_model_len=max_model_len,
        max_batched_tokens=max_batched_tokens,
    ).with_choices(candidate, micro_batches, budget)
    job = for_example(job) if engine is None else for_engine(job, engine)
    say_on_stderr(f"{target}: {job.summary}" + (" per share" if ray else ""))
    table = _measure(job, engine or "example") if ray is None else _measure_on_cluster(job, ray)
    _print_table(table)
    if out is not None:
        table.save(out)
        say(f"Written to {out}. To serve by it: options: {{table: {out}}}")
    elif engine is not None:
        path = default_path(table.key)
        table.save(path)
        say(f"Written to {path}, where a start of {engine} with the same settings finds it.")


def _measure(job: TuningJob, name: str) -> Table:
    from dynaflow_serving.tune.offline import tune_in_child

    logs = Path(tempfile.mkdtemp(prefix="dynaflow-tune-"))
    log = logs / "engine.log"
    with progress_lines() as tell:
        tell(name, f"starts and measures; its log: {log}")
        table = tune_in_child(job, name, log)
    shutil.rmtree(logs)
    return table


def _measure_on_cluster(job: TuningJob, address: str) -> Table:
    from dynaflow_serving.tune.cluster import tune_on_cluster
    from dynaflow_serving.tune.offline import merge_tables

    with progress_lines() as tell:
        shares = tune_on_cluster(job, address, tell)
    return merge_tables([(share.job, share.table) for share in shares])


def _print_table(table: Table) -> None:
    """Print the table, or a line per decision where the terminal is too narrow for it."""
    from dynaflow_serving.policy.show import as_table, log_lines

    console = console_of_tables()
    if console.width >= WIDTH:
        console.print(as_table(table))
        return
    for line in log_lines(table):
        say(line)
