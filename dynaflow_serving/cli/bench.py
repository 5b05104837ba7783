"""`dynaflow bench`: a system against itself, stock and under strategies, in turn.

Contract
- The sides are the stock system, sequential micro-batches, and each --strategy. All do the same work; outputs are
  compared.
- --link runs them on two emulated nodes. --load or --rate put servers under load instead, the stock one and one under
  the strategy, and write a report of latencies.
- A run that split nothing, whose outputs differ or whose requests failed writes its files. It then ends with exit
  code 1 and the reason.
- The output and the files say what was chosen for the user: model, strategy, dtype, compilation.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from dynaflow_serving.cli.options import (
    CompiledOption,
    JSONOption,
    MaxBatchedTokensOption,
    MicroBatchesOption,
    OptionOption,
    command_line,
)
from dynaflow_serving.cli.output import progress_bar, say, say_on_stderr, show
from dynaflow_serving.errors import ConfigError

if TYPE_CHECKING:
    from dynaflow_serving.bench.benchmark import Comparison
    from dynaflow_serving.bench.sides import Side

LOADS, RATES = ("random", "sharegpt"), (8.0, float("inf"))

SystemArgument = Annotated[
    str, typer.Argument(help="System to benchmark: torch, transformers, megatron, xdit, fastvideo, vllm or sglang.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="PATH",
        help="Model directory, Hugging Face name, or model made here (llama, llama_1024, qwen3, mixtral, qwen3_moe); "
        "for torch PATH.py:FUNCTION, which returns (model, inputs); for megatron tp, tp_sp, ep, or a YAML file of "
        "settings; for xdit wan, wan_ring, flux. Default: llama, with --link llama_1024; tp; wan.",
    ),
]
StrategiesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--strategy",
        "-s",
        metavar="NAME|FILE",
        help="Strategy name, YAML config, or .py strategy file; may be repeated. Default: comm_overlap.",
        show_default=False,
    ),
]
PairsOption = Annotated[int, typer.Option(min=1, help="Counted rounds, in which each side runs one pass.")]
RanksOption = Annotated[
    int | None,
    typer.Option(
        "--tensor-parallel", "-tp", "--tp", min=1, help="Ranks. Default: 1, with --link 2.", show_default=False
    ),
]
StartsOption = Annotated[int, typer.Option(min=1, help="Starts of all sides, each with its rounds.")]
DtypeOption = Annotated[str | None, typer.Option(help="Default: float32 on CPU, auto on GPU.")]
RequestsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Requests of a pass; without --rate, all at once. The batch of torch, transformers; for xdit, fastvideo "
        "the rows of a guidance pair, or of flux's call. Default: 30; 2; 1.",
        show_default=False,
    ),
]
InputLenOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Mean prompt length, tokens (half to 1.5 times); for xdit, fastvideo the tokens of a video. Default: 96; "
        "1280.",
        show_default=False,
    ),
]
OutputLenOption = Annotated[int, typer.Option(min=1, help="Mean output length, tokens (half to 1.5 times).")]
SeedOption = Annotated[int, typer.Option(help="Seed of the prompts and their lengths.")]
LinkOption = Annotated[
    list[float] | None,
    typer.Option(
        metavar="MBIT",
        help="Run on two emulated nodes, joined by a link of so many megabit per second (0: no limit); may be "
        "repeated.",
        show_default=False,
    ),
]
TCPDefaultsOption = Annotated[
    bool,
    typer.Option("--tcp-defaults", help="With --link: TCP and the queue as the kernel has them, which flatters us."),
]
TrainingOption = Annotated[
    bool, typer.Option("--training", help="torch, transformers: a pass is forward and backward (megatron: always).")
]
OneNodeOption = Annotated[
    bool,
    typer.Option("--one-node", help="With --link: also the stock engine and auto on this machine alone, one rank."),
]
SequentialOption = Annotated[
    bool, typer.Option(help="Also run the sequential micro-batches of the first strategy that splits.")
]
HTMLOption = Annotated[Path | None, typer.Option("--html", help="Write a page with the figures drawn to this file.")]
LoadOption = Annotated[
    list[str] | None,
    typer.Option(help="Servers under load: random or sharegpt; may be repeated. Default: both.", show_default=False),
]
RateOption = Annotated[
    list[float] | None,
    typer.Option(
        help="Servers under load: requests per second (inf: all at once); may be repeated. Default: 8 and inf.",
        show_default=False,
    ),
]


def bench(
    system: SystemArgument,
    model: ModelOption = None,
    strategy: StrategiesOption = None,
    micro_batches: MicroBatchesOption = None,
    option: OptionOption = None,
    pairs: PairsOption = 3,
    starts: StartsOption = 1,
    tensor_parallel: RanksOption = None,
    dtype: DtypeOption = None,
    compiled: CompiledOption = None,
    requests: RequestsOption = None,
    input_len: InputLenOption = None,
    output_len: OutputLenOption = 8,
    max_batched_tokens: MaxBatchedTokensOption = None,
    seed: SeedOption = 0,
    link: LinkOption = None,
    tcp_defaults: TCPDefaultsOption = False,
    one_node: OneNodeOption = False,
    sequential: SequentialOption = True,
    training: TrainingOption = False,
    json_path: JSONOption = None,
    html: HTMLOption = None,
    load: LoadOption = None,
    rate: RateOption = None,
) -> None:
    """Compare a system with itself: stock, sequential micro-batches and each strategy, in turn, several rounds."""
    from dynaflow_serving.bench.benchmark import Asked, Comparison, least_tokens, make_traffic, usual_micro_batches
    from dynaflow_serving.bench.engines import peers_of
    from dynaflow_serving.bench.sides import make_sides

    if tcp_defaults and not link:
        raise ConfigError("--tcp-defaults is about the emulated link: add --link MBIT")
    asked = Asked(
        system=system, model=model, pairs=pairs, tensor_parallel=tensor_parallel, dtype=dtype, compiled=compiled,
        traffic=make_traffic(system, model, requests, input_len, output_len, seed),
        max_batched_tokens=max_batched_tokens, links=tuple(dict.fromkeys(link or ())), tcp_defaults=tcp_defaults,
        training=training, starts=starts, command=command_line(),
    )  # fmt: skip
    sides = make_sides(
        strategy or [], micro_batches, option or [],
        min_tokens=least_tokens(system), usual=usual_micro_batches(system, model), peers=peers_of(system, model),
        sequential=sequential,
    )  # fmt: skip
    comparison = Comparison(asked, sides)
    alone = comparison.on_one_node() if one_node else None
    if load or rate:
        _compare_under_load(comparison, load or list(LOADS), rate or list(RATES), json_path, html)
    else:
        _compare(comparison, alone, json_path, html)


def _compare(comparison: Comparison, alone: Comparison | None, json_path: Path | None, html: Path | None) -> None:
    """Compare, and show it; `alone` is a comparison on one node, which comes after the other."""
    from dynaflow_serving.bench.link import ONE_NODE, enter, open_link
    from dynaflow_serving.bench.measure import measure, merged, stages
    from dynaflow_serving.bench.page import assert_can_draw
    from dynaflow_serving.bench.report import conclusions, remark, tables
    from dynaflow_serving.bench.result import record, write_json
    from dynaflow_serving.bench.traces import traced

    if html is not None:
        assert_can_draw()
    asked = comparison.asked
    if asked.links:
        enter()
    _say_what_is_chosen(comparison)
    rates, pairs = asked.links or (0.0,), asked.pairs
    with _work_folder() as work:
        if html is not None:
            comparison.sides = traced(comparison.sides, work / "traces")
        with open_link(asked.tcp_defaults) if asked.links else nullcontext() as joined:
            runners = [comparison.runner(work / f"start{number}", joined) for number in range(asked.starts)]
            last = alone.runner(work / "one-node", None) if alone else None
            ends = asked.starts * stages(runners[0], rates, pairs)
            ends += stages(last, (ONE_NODE,), pairs) if last else 0
            with progress_bar(ends) as tell:
                parts = merged([measure(runner, rates, pairs, joined, tell) for runner in runners])
                parts += measure(last, (ONE_NODE,), pairs, None, tell) if last else []
        result = record(parts, comparison.facts(runners[0]))
        if json_path is not None:
            write_json(json_path, result)
        if html is not None:
            _write_page(html, result, comparison.sides, work / "traces")
        notes = [*conclusions(result), remark(result), *result["notes"]]
        _conclude(tables(result), notes, result["failures"], work)


def _write_page(html: Path, result: Mapping[str, Any], sides: Sequence[Side], traces: Path) -> None:
    """Write the page, with one real step of each strategy that split one."""
    from dynaflow_serving.bench.page import Picture, render
    from dynaflow_serving.bench.traces import read_steps
    from dynaflow_serving.files import write_text
    from dynaflow_serving.picture.comparison import ShownTimeline
    from dynaflow_serving.picture.figure import draw

    steps = []
    for step in read_steps(sides, traces):
        drawing = draw([ShownTimeline.among("one step, measured", [step.timeline])], step.tokens)
        steps.append(Picture(step.side, drawing))
    write_text(html, render(result, steps))
    say_on_stderr(f"wrote {html}")


def _compare_under_load(
    comparison: Comparison, loads: list[str], rates: list[float], json_path: Path | None, html: Path | None
) -> None:
    from dynaflow_serving.bench.report import CPU_SERVERS
    from dynaflow_serving.bench.result import write_json
    from dynaflow_serving.bench.serving.loads import make_loads
    from dynaflow_serving.bench.serving.record import record
    from dynaflow_serving.bench.serving.report import assert_can_report, render
    from dynaflow_serving.bench.serving.run import serve_in_turn
    from dynaflow_serving.bench.serving.table import tables
    from dynaflow_serving.files import write_text

    comparison.assert_can_serve()
    if html is not None:
        assert_can_report()
    traffic = comparison.asked.traffic
    made = make_loads(loads, rates, traffic.requests, traffic.input_len, traffic.output_len)
    _say_what_is_chosen(comparison)
    with _work_folder() as work:
        serving = comparison.serving(made, traffic.seed, work)
        with progress_bar(serving.stages) as tell:
            served = serve_in_turn(serving, tell)
        result = record(serving, served, comparison.serving_facts(traffic.seed))
        if json_path is not None:
            write_json(json_path, result)
        if html is not None:
            write_text(html, render(result))
        _conclude(tables(result), ["" if comparison.gpu else CPU_SERVERS, *result["notes"]], result["failures"], work)


def _say_what_is_chosen(comparison: Comparison) -> None:
    for side in comparison.sides:
        if side.config is None:
            continue
        options = ", ".join(f"{name}={value}" for name, value in side.options.items()) or "no options"
        say_on_stderr(f"strategy {side.strategy}: {options}")
    say_on_stderr(f"model {comparison.model or 'of this command'}; {comparison.chosen}")


@contextmanager
def _work_folder() -> Iterator[Path]:
    """Make a folder for logs. It stays only if an error names it."""
    work = Path(tempfile.mkdtemp(prefix="dynaflow-bench-"))
    try:
        yield work
    except typer.Exit:
        raise  # a verdict, which names the logs
    except BaseException as error:
        if str(work) not in str(error):
            shutil.rmtree(work)
        raise
    shutil.rmtree(work)


def _conclude(tables: Iterable[RenderableType], notes: Sequence[str], problems: Sequence[str], work: Path) -> None:
    """Print the tables, what to know about them, and the verdict. Only a failed run keeps its logs."""
    show(tables)
    for note in filter(None, notes):
        say(f"\n{note}")
    for problem in problems:
        say_on_stderr(f"dynaflow: FAILED: {problem} (logs: {work})")
    if problems:
        raise typer.Exit(1)
