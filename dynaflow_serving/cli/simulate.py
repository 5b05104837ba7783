"""`dynaflow simulate`: a plan's time on hardware that is not at hand.

Contract
- Every output, the JSON and the trace included, says `simulated`. The docs of `dynaflow_serving.simulate` and its YAML
  files list the assumptions.
- The strategy is the real one: its thresholds apply, and where it does not split, the reason is printed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynaflow_serving.cli.options import (
    JSONOption,
    MicroBatchesOption,
    OptionOption,
    StrategyOption,
    TensorParallelOption,
    configure,
)
from dynaflow_serving.cli.output import say

if TYPE_CHECKING:
    from rich.table import Table

    from dynaflow_serving.simulate.scenario import SimulatedSchedule

ShapeArgument = Annotated[str, typer.Argument(help="Shipped shape such as llama-3-8b, or a YAML file.")]
RequestsOption = Annotated[
    str,
    typer.Option(
        "--batch",
        "-b",
        metavar="[Nx]TOKENS[@CONTEXT],...",
        help="Requests of the step of one data-parallel rank: 8x1024 prefills, 128x1@2048 decodes, or both.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="h100, h200, b200, or a YAML file.")]
LinkOption = Annotated[str, typer.Option(help="In a node: nvlink4, nvlink5, pcie5, ..., or a YAML file.")]
NetworkOption = Annotated[str, typer.Option(help="Between nodes: eth100, eth200, eth400, or a YAML file.")]
PerNodeOption = Annotated[int, typer.Option(min=1, help="Ranks of a node.")]
ExpertParallelOption = Annotated[int, typer.Option("--ep", min=1, help="Ranks that experts are spread over.")]
DataParallelOption = Annotated[int, typer.Option("--dp", min=1, help="Tensor-parallel groups, each with such a batch.")]
ImbalanceOption = Annotated[float, typer.Option(min=1, help="Rows of the busiest rank's experts over the mean.")]
GraphsOption = Annotated[
    bool, typer.Option("--graphs/--no-graphs", help="Whether CUDA graphs spare the host the issuing.")
]
TimelineOption = Annotated[bool, typer.Option("--timeline", help="Draw the first layers of the last schedule.")]
TraceOption = Annotated[
    Path | None, typer.Option("--trace", help="Write the last schedule's Chrome trace to this file.")
]


def simulate(
    model: ShapeArgument,
    batch: RequestsOption = "8x1024",
    strategy: StrategyOption = "nanoflow",
    micro_batches: MicroBatchesOption = None,
    option: OptionOption = None,
    device: DeviceOption = "h100",
    link: LinkOption = "nvlink4",
    network: NetworkOption = "eth400",
    per_node: PerNodeOption = 8,
    tp: TensorParallelOption = 1,
    ep: ExpertParallelOption = 1,
    dp: DataParallelOption = 1,
    imbalance: ImbalanceOption = 1.0,
    graphs: GraphsOption = True,
    timeline: TimelineOption = False,
    json_path: JSONOption = None,
    trace: TraceOption = None,
) -> None:
    """Simulate one step: un-split, sequential micro-batches, and the strategy's plan. No GPU needed, none measured."""
    from rich.console import Console

    from dynaflow_serving.core.timeline import chrome_trace
    from dynaflow_serving.files import write_text
    from dynaflow_serving.policy.selector import build_selector
    from dynaflow_serving.simulate.catalogue import find
    from dynaflow_serving.simulate.device import make_topology
    from dynaflow_serving.simulate.model import Shape
    from dynaflow_serving.simulate.picture import strip
    from dynaflow_serving.simulate.scenario import Scenario, parse_requests, variants

    config = configure(strategy or "nanoflow", micro_batches, option)
    scenario = Scenario(
        shape=find(Shape, model),
        topology=make_topology(device, link, network, per_node=per_node, tp=tp, ep=ep, dp=dp, imbalance=imbalance),
        batch=parse_requests(batch),
        graphs=graphs,
    )
    schedules = scenario.simulate(variants(build_selector(config), config))
    last = schedules[-1]
    if json_path is not None:
        write_text(json_path, json.dumps(scenario.as_dict(batch, config, schedules), indent=1) + "\n")
    if trace is not None:
        write_text(trace, json.dumps(chrome_trace(last.timeline)) + "\n")
    Console().print(_table(scenario.title, schedules))
    _print_notes(schedules, streams=bool(config.streams))
    if timeline:
        say(f"{last.schedule}, {len(last.tokens)} micro-batches\n{strip(last.timeline)}")
    say("All figures are simulated (roofline estimates of one rank; all ranks alike), none is measured.")


def _print_notes(schedules: list[SimulatedSchedule], *, streams: bool) -> None:
    """Print why batches are not split, and what of the config is not simulated."""
    from dynaflow_serving.bench.result import is_small

    for reason in dict.fromkeys(s.reason for s in schedules if s.reason):
        advice = " (-o min_tokens=1 splits it)" if is_small(reason) else ""
        say(f"one micro-batch: {reason}{advice}")
    if streams:
        say("the config's streams (priority, sm_share) are not simulated")


def _table(title: str, schedules: list[SimulatedSchedule]) -> Table:
    from rich import box
    from rich.table import Table

    from dynaflow_serving.core.program import Resource
    from dynaflow_serving.simulate.scenario import busy

    table = Table(title=f"simulated: {title}", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("schedule", no_wrap=True)
    for column in ("tokens", "ms", "speed-up", "overlap", "network\nalone, ms", "busy, %\ncmp mem net"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in schedules:
        t = row.timeline
        table.add_row(
            row.schedule,
            _tokens(row.tokens),
            f"{t.makespan * 1e3:.4g}",
            f"{row.speed_up:.2f}x",
            f"{t.overlap:.0%}",
            f"{t.exposed_network * 1e3:.4g}",
            " ".join(f"{100 * busy(t, r):3.0f}" for r in Resource),
        )
    return table


def _tokens(tokens: tuple[int, ...]) -> str:
    """Write `4096 x2` for equal micro-batches, else `3072 2048 3072`."""
    if len(tokens) > 1 and len(set(tokens)) == 1:
        return f"{tokens[0]} x{len(tokens)}"
    return " ".join(map(str, tokens))
