"""`dynaflow tune`: the decisions of `strategy: auto`, measured before serving.

Contract
- TARGET is an embedded example (no engine needed) or a model, which an engine loads as it would to serve.
- What is written is what a start with the same settings would have measured itself, so that it does not.
- Nothing is written unless everything was measured.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dynaflow_serving.cli.options import OptionOption, configure, resolve_model
from dynaflow_serving.errors import ConfigError

if TYPE_CHECKING:
    from dynaflow_serving.tune.offline import Job

WIDTH = 160  # columns that the table needs, and gets where it is not shown on a terminal

Tell = Callable[[str, str], None]  # (what is under way, what becomes of it)


def tune(
    target: Annotated[
        str,
        typer.Argument(
            help="Embedded example (llama, moe, dit); with --engine: model directory, Hugging Face name, or tiny model "
            "made here."
        ),
    ],
    strategy: Annotated[
        str, typer.Option("--strategy", "-s", metavar="NAME|FILE", help="YAML config with 'strategy: auto'.")
    ] = "auto",
    engine: Annotated[str | None, typer.Option(help="Engine that will serve the model: vllm or sglang.")] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            "--candidate", "-c", metavar="NAME|FILE", help="Instead of the config's candidates; may be repeated."
        ),
    ] = None,
    micro_batches: Annotated[
        list[int] | None,
        typer.Option("--micro-batches", "-n", help="Instead of the config's numbers; may be repeated."),
    ] = None,
    option: OptionOption = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="For measuring; with --ray, of each share.", show_default=False),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", "-tp", min=1, help="Ranks.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="Default: the engine's.", show_default=False)] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compiled/--uncompiled",
            help="vLLM: with or without compilation and CUDA graphs. Default: the engine's.",
            show_default=False,
        ),
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Default: the engine's.", show_default=False)] = None,
    max_batched_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of one step at most. Default: the engine's.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the table here (option 'table' of the strategy), not where a start looks for it."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Spread the candidates over the workers of this Ray cluster: HOST:PORT, 'auto', or 'local' for one "
            "that is started here.",
        ),
    ] = None,
) -> None:
    """Measure which strategy wins for which kind of batch, and keep the table for serving."""
    from dynaflow_serving.policy.show import as_table, log_lines
    from dynaflow_serving.policy.table import default_path
    from dynaflow_serving.tune.offline import Job, merge, run

    changed: dict[str, Any] = {
        "candidates": candidate and [_absolute(name) for name in candidate],
        "micro_batches": micro_batches,
        "budget_seconds": budget,
    }
    job = Job(
        target=target,
        config=configure(strategy, None, option).model_dump(),
        tensor_parallel=tensor_parallel,
        dtype=dtype,
        compiled=compiled,
        max_model_len=max_model_len,
        max_batched_tokens=max_batched_tokens,
    )
    job.auto  # noqa: B018  an error if it is another strategy
    job = job.with_options(**{name: value for name, value in changed.items() if value is not None})
    job = _on_example(job) if engine is None else _on_engine(job, engine)
    err, console = Console(stderr=True), Console(width=None if sys.stdout.isatty() else WIDTH)
    labels = job.auto.measured
    limit = f"at most {job.auto.options.budget_seconds:g} s of measuring" + (" per share" if ray else "")
    _say(err, f"{target}: candidates {', '.join(labels)}; {limit}")
    if ray is None:
        logs = Path(tempfile.mkdtemp(prefix="dynaflow-tune-"))
        log = logs / "engine.log"
        with _progress(err) as tell:
            tell(engine or "example", f"starts and measures; its log: {log}")
            table = run(job, engine or "example", log)
        shutil.rmtree(logs)
    else:
        from dynaflow_serving.tune.spread import spread

        with _progress(err) as tell:
            found = spread(job, ray, tell)
        table = merge([(share.job, share.table) for share in found])
    if console.width < WIDTH:
        for line in log_lines(table):
            _say(console, line)
    else:
        console.print(as_table(table))
    if out is not None:
        table.save(out)
        _say(console, f"Written to {out}. To serve by it: options: {{table: {out}}}")
    elif engine is not None:
        path = default_path(table.key)
        table.save(path)
        _say(console, f"Written to {path}, where a start of {engine} with the same settings finds it.")


def _on_example(job: Job) -> Job:
    from dynaflow_serving.capture.examples import EXAMPLES

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


def _on_engine(job: Job, engine: str) -> Job:
    from dynaflow_serving.bench.engines import find_engine

    entry = find_engine(engine)
    if job.compiled is not None:
        entry.compiled(job.compiled)
    model, local = resolve_model(job.target)
    return replace(job, target=model, local=local, engine=engine)


def _absolute(candidate: str) -> str:
    """The path of a strategy file holds in any working directory."""
    return str(Path(candidate).resolve()) if candidate.endswith(".py") else candidate


@contextmanager
def _progress(console: Console) -> Iterator[Tell]:
    """A line each; on a terminal with the time that it has taken so far."""
    if not console.is_terminal:
        yield lambda name, what: _say(console, f"{name}: {what}")
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console) as lines:
        tasks: dict[str, Any] = {}

        def tell(name: str, what: str) -> None:
            if name in tasks:
                lines.update(tasks[name], description=f"{name}: {what}", completed=1)
            else:
                tasks[name] = lines.add_task(f"{name}: {what}", total=1)

        yield tell


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
