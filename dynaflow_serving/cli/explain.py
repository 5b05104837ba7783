"""`dynaflow explain`: what a strategy makes of a model and a batch.

Contract
- TARGET is an embedded example (no engine needed) or a model, which an engine runs for one step with exactly the
  given batch. The command then shows the engine's own report.
- The picture is first: which operators run beside which. --full adds the text of Program and Plan.
- A batch that is not split is an answer, not an error: the command prints the reason, and what to change. A picture or
  a trace of it is an error, for there is no plan to show.
- --svg, --html and --trace run the plan: an example here, a model in its engine. What they need is checked before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynaflow_serving.cli.options import (
    MicroBatchesOption,
    OptionOption,
    StrategyOption,
    TensorParallelOption,
    command_line,
    configure,
)
from dynaflow_serving.cli.output import show
from dynaflow_serving.errors import ConfigError

if TYPE_CHECKING:
    from dynaflow_serving.picture.explanation import Explanation

TargetArgument = Annotated[str, typer.Argument(help="Embedded example (llama, moe, dit), or model directory.")]
TokensOption = Annotated[
    str, typer.Option("--batch", "-b", metavar="N,N,...", help="Tokens of each request of the step.")
]
EngineOption = Annotated[str, typer.Option(help="Engine that runs a model directory.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="For a model directory. Default: float32 on CPU, auto on GPU.", show_default=False)
]
SVGOption = Annotated[
    Path | None, typer.Option(help="Run the plan and draw its timeline, measured and predicted, to this file.")
]
HTMLOption = Annotated[Path | None, typer.Option(help="The same as a page, with the operators' times and the plan.")]
TraceOption = Annotated[
    Path | None, typer.Option(help="Run the plan and write the measured Chrome trace to this file.")
]
FullOption = Annotated[
    bool, typer.Option("--full", help="All rows, then the program and the plan as text, which `dynaflow check` reads.")
]


BackwardOption = Annotated[
    bool,
    typer.Option("--backward", help="An example's backward pass, too, as autograd runs it where there is no graph."),
]


@dataclass(frozen=True)
class Files:
    """The files to write beside the text; None is not wanted."""

    svg: Path | None
    html: Path | None
    trace: Path | None

    @property
    def wanted(self) -> list[Path]:
        return [path for path in (self.svg, self.html, self.trace) if path is not None]


def explain(
    target: TargetArgument,
    batch: TokensOption = "64,64,8,1",
    strategy: StrategyOption = None,
    micro_batches: MicroBatchesOption = None,
    option: OptionOption = None,
    engine: EngineOption = "vllm",
    dtype: DtypeOption = None,
    tensor_parallel: TensorParallelOption = 1,
    svg: SVGOption = None,
    html: HTMLOption = None,
    trace: TraceOption = None,
    full: FullOption = False,
    backward: BackwardOption = False,
) -> None:
    """Show what runs beside what on which stream, for a model, a batch and a strategy."""
    from dynaflow_serving.capture.examples import EXAMPLES
    from dynaflow_serving.picture.explanation import DEFAULT_CONFIG, explain_example, explain_model
    from dynaflow_serving.picture.overview import overview

    tokens = parse_batch(batch)
    config = configure(strategy or DEFAULT_CONFIG, micro_batches, option)
    files = Files(svg=svg, html=html, trace=trace)
    _assert_can_write(files)
    measured = bool(files.wanted)
    if target in EXAMPLES:
        if tensor_parallel > 1 or dtype:
            raise ConfigError("--tensor-parallel and --dtype are for model directories, not for embedded examples")
        explanation = explain_example(target, tokens, config, measured=measured, backward=backward)
    elif backward:
        raise ConfigError("--backward is for embedded examples: the report of a training run shows its own")
    elif Path(target).is_dir():
        explanation = explain_model(target, tokens, config, engine, dtype, tensor_parallel, measured=measured)
    else:
        raise ConfigError(
            f"target {target!r} is neither an embedded example ({', '.join(EXAMPLES)}) nor a model directory"
        )
    show(overview(explanation, full=full))
    if files.wanted:
        _write(files, explanation)


def parse_batch(text: str) -> tuple[int, ...]:
    """Read the tokens of each request, such as `64,64,8,1`.

    Raises:
        ConfigError: The text is not of this form.
    """
    try:
        tokens = tuple(int(part) for part in text.split(","))
    except ValueError:
        tokens = ()
    if not tokens or min(tokens) < 1:
        raise ConfigError(f"--batch {text!r} is not a list of token counts such as 64,64,8,1 (each at least 1)")
    return tokens


def _assert_can_write(files: Files) -> None:
    from dynaflow_serving.picture.figure import assert_can_draw

    if files.svg or files.html:
        assert_can_draw(*(("jinja2",) if files.html else ()))
    for path in files.wanted:
        if path.is_dir():
            raise ConfigError(f"{str(path)!r} is a folder: give the name of a file")
    if len(set(files.wanted)) < len(files.wanted):
        raise ConfigError("--svg, --html and --trace must be different files")


def _write(files: Files, explanation: Explanation) -> None:
    from dynaflow_serving.files import write_text

    if not explanation.comparisons:
        raise ConfigError(
            f"--svg, --html and --trace show a plan, and this batch is not split: {explanation.split.reason}"
        )
    for path, content in _contents(files, explanation):
        write_text(path, content)
        print(f"wrote {path}")


def _contents(files: Files, explanation: Explanation) -> Iterator[tuple[Path, str]]:
    """Yield each file with its content; pictures and traces of several programs are numbered."""
    from dynaflow_serving.core.timeline import chrome_trace
    from dynaflow_serving.picture.figure import draw
    from dynaflow_serving.picture.page import render

    comparisons, caption = explanation.comparisons, explanation.caption
    if files.html is not None:
        yield files.html, render(comparisons, caption, command_line())
    for i, comparison in enumerate(comparisons):
        suffix = f"-program{i}" if len(comparisons) > 1 else ""
        if files.svg is not None:
            yield (
                files.svg.with_stem(files.svg.stem + suffix),
                draw(comparison.shown, comparison.tokens, caption.title, caption.text),
            )
        if files.trace is not None:
            path = files.trace.with_stem(files.trace.stem + suffix)
            yield path, json.dumps(chrome_trace(comparison.measured)) + "\n"
