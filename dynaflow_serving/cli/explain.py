"""`dynaflow explain`: what a strategy makes of a model and a batch.

Contract
- TARGET is an embedded example (no engine needed) or a model, which an engine runs for one step with exactly the
  given batch; what is printed is then the engine's own report.
- A batch that is not split is an answer, not an error: the reason is printed, with what to change. A picture or a
  trace of it is an error, for there is no plan to show.
- --svg, --html and --trace run the plan: an example here, a model in its engine. What they need is checked before.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynaflow_serving.cli.options import MicroBatchesOption, OptionOption, StrategyOption
from dynaflow_serving.core.parse import parse_plan
from dynaflow_serving.errors import ConfigError

if TYPE_CHECKING:
    from dynaflow_serving.config import Config
    from dynaflow_serving.picture.comparison import Comparison


@dataclass(frozen=True)
class Files:
    """What to write beside the text; None: not wanted."""

    svg: Path | None
    html: Path | None
    trace: Path | None

    @property
    def wanted(self) -> list[Path]:
        return [path for path in (self.svg, self.html, self.trace) if path is not None]


def explain(
    target: Annotated[str, typer.Argument(help="Embedded example (llama, moe, dit), or model directory.")],
    batch: Annotated[
        str, typer.Option("--batch", "-b", metavar="N,N,...", help="Tokens of each request of the step.")
    ] = "64,64,8,1",
    strategy: StrategyOption = None,
    micro_batches: MicroBatchesOption = None,
    option: OptionOption = None,
    engine: Annotated[str, typer.Option(help="Engine that runs a model directory.")] = "vllm",
    dtype: Annotated[str | None, typer.Option(help="Of a model directory; float32 on CPU, auto on GPU.")] = None,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", "-tp", min=1, help="Ranks.")] = 1,
    svg: Annotated[
        Path | None, typer.Option(help="Run the plan and draw its timeline, measured and predicted, to this file.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="The same as a page, with the operators' times and the plan.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Run the plan and write the measured Chrome trace to this file.")
    ] = None,
) -> None:
    """Print the Program, the split of a batch, and the Plan as text and as a grid of actions and streams."""
    from dynaflow_serving.bench.defaults import DEFAULT_CONFIG
    from dynaflow_serving.capture.examples import EXAMPLES
    from dynaflow_serving.cli.options import configure

    tokens = parse_batch(batch)
    config = configure(strategy or DEFAULT_CONFIG, micro_batches, option)
    files = Files(svg, html, trace)
    _assert_can_write(files)
    if target in EXAMPLES:
        if tensor_parallel > 1 or dtype:
            raise ConfigError("--tensor-parallel and --dtype are for model directories, not for embedded examples")
        _explain_example(target, tokens, config, files)
    elif Path(target).is_dir():
        _explain_model(target, tokens, config, engine, dtype, tensor_parallel, files)
    else:
        raise ConfigError(
            f"target {target!r} is neither an embedded example ({', '.join(EXAMPLES)}) nor a model directory"
        )


def parse_batch(text: str) -> tuple[int, ...]:
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


def _explain_example(name: str, tokens: tuple[int, ...], config: Config, files: Files) -> None:
    from dynaflow_serving.capture.examples import HIDDEN, example_capture
    from dynaflow_serving.core.batch import Batch
    from dynaflow_serving.core.program import Resource
    from dynaflow_serving.executor import get_executor
    from dynaflow_serving.picture.measure import RUNS, example_inputs, measured_and_predicted
    from dynaflow_serving.session.plan_cache import PlanCache

    capture = example_capture(name)
    executor = get_executor(config.executor if files.wanted else "sequential", options=config if files.wanted else None)
    plan_cache = PlanCache(capture, config.build(), executor)
    split = plan_cache.decide(Batch(tokens))
    print(capture.program.to_text())
    _print_split(tokens, split)
    if len(split.micro_batches) > 1 or plan_cache.strategy.schedules_unsplit:
        _print_plan(plan_cache.prepare(split.signature).plan)
    elif files.wanted:
        raise _nothing_to_show(split.reason)
    if files.wanted:
        inputs = example_inputs(capture.program, len(capture.constants), sum(tokens), HIDDEN)
        comparison = measured_and_predicted(plan_cache, split, inputs)
        executor.close()
        network = any(o.resource is Resource.NETWORK for o in capture.program.operators)
        stand_ins = ("Network operators are stand-ins on this machine: they move nothing",) if network else ()
        _write(
            files, [comparison], f"example {name}", RUNS, f"executor {executor.name}, one thread a stream", stand_ins
        )


def _explain_model(
    model: str,
    tokens: tuple[int, ...],
    config: Config,
    engine: str,
    dtype: str | None,
    tensor_parallel: int,
    files: Files,
) -> None:
    from dynaflow_serving.bench.one_step import one_step
    from dynaflow_serving.core.batch import Batch
    from dynaflow_serving.picture.engine import RUNS, compare_in_engine
    from dynaflow_serving.strategy.splitting import whole

    comparisons: list[Comparison] = []
    if files.wanted:
        report, comparisons = compare_in_engine(engine, model, tokens, config, dtype, tensor_parallel)
    else:
        report = one_step(engine, model, tokens, config, dtype, tensor_parallel)
    for program in report["programs"]:
        print(program["program"])
    # The engine may order its requests anew, so the cut is asked of the strategy only where the engine split.
    if not report["steps"]["split"]:
        reason = "; ".join(report["steps"]["unsplit"]) or "the engine counted no step"
        _print_split(tokens, whole(Batch(tokens), reason))
        if files.wanted:
            raise _nothing_to_show(reason)
        return
    _print_split(tokens, config.build().split(Batch(tokens)))
    for program in report["programs"]:
        for text in program["plans"]:
            plan = parse_plan(text)
            if plan.micro_batches > 1:
                _print_plan(plan)
    if files.wanted:
        ranks = f", rank 0 of {tensor_parallel}" if tensor_parallel > 1 else ""
        _write(files, comparisons, Path(model).resolve().name, RUNS, f"{engine}{ranks}, mode {report['mode']}")


def _nothing_to_show(reason: str) -> ConfigError:
    return ConfigError(f"--svg, --html and --trace show a plan, and this batch is not split: {reason}")


def _write(
    files: Files, comparisons: Sequence[Comparison], what: str, runs: int, where: str, notes: tuple[str, ...] = ()
) -> None:
    """notes: what else to know about the figures."""
    import torch

    from dynaflow_serving.bench.environment import device_name
    from dynaflow_serving.core.timeline import chrome_trace
    from dynaflow_serving.files import write_text
    from dynaflow_serving.picture.figure import draw
    from dynaflow_serving.picture.page import Caption, render

    first = comparisons[0]
    parts = f"{len(first.tokens)} micro-batches of {', '.join(map(str, first.tokens))} tokens"
    parts = parts if len(first.tokens) > 1 else f"{first.tokens[0]} tokens, not split"
    measured = f"Measured on {device_name()}; {where}; torch {torch.__version__}; the median one of {runs} runs"
    if first.engine_step is not None:
        notes = (f"The whole step in the engine, not traced: {first.engine_step}", *notes)
    if any(s.kind.value == "replace" for s in first.measured.plan.actions):
        notes += ("A replacement kernel is predicted as the sum of the operators that it replaces",)
    caption = Caption(f"{what}: {first.measured.plan.strategy}, {parts}", (measured, *notes))
    if files.html is not None:
        write_text(files.html, render(comparisons, caption, shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])))
        print(f"wrote {files.html}")
    for i, comparison in enumerate(comparisons):
        suffix = f"-program{i}" if len(comparisons) > 1 else ""
        if files.svg is not None:
            path = files.svg.with_stem(files.svg.stem + suffix)
            write_text(path, draw(comparison, caption.title, caption.text))
            print(f"wrote {path}")
        if files.trace is not None:
            path = files.trace.with_stem(files.trace.stem + suffix)
            write_text(path, json.dumps(chrome_trace(comparison.measured)) + "\n")
            print(f"wrote {path}")


def _print_split(tokens: tuple[int, ...], split: Any) -> None:
    from dynaflow_serving.bench.result import is_small

    print(f"split of {len(tokens)} requests, {sum(tokens)} tokens")
    if len(split.micro_batches) == 1:
        print(f"  not split: {split.reason}")
        if is_small(split.reason):
            print("  to split it: lower the strategy's threshold (-o min_tokens=1), or try a larger --batch")
        return
    for i, part in enumerate(split.micro_batches):
        (r0, r1), (t0, t1) = part.requests, part.tokens
        print(f"  micro-batch {i}: requests {r0}..{r1 - 1}, tokens {t0}..{t1 - 1} ({t1 - t0})")
    for earlier, later in split.depends:
        print(f"  micro-batch {later} reads the KV cache that {earlier} writes")
    print()


def _print_plan(plan: Any) -> None:
    from dynaflow_serving.core.grid import grid

    print(plan.to_text())
    print(f"plan {plan.digest}, action by stream")
    print(grid(plan))
