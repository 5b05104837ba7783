"""`dynaflow simulate`: how long a step would take on hardware that is not at hand.

Contract
- Every output, the JSON and the trace included, says `simulated`; the assumptions are in the docs of
  `dynaflow_serving.simulate` and in its YAML files.
- The strategy is the real one: its thresholds apply, and where it does not split, the reason is printed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from dynaflow_serving.cli.options import MicroBatchesOption, OptionOption, StrategyOption, configure
from dynaflow_serving.errors import ConfigError

if TYPE_CHECKING:
    from dynaflow_serving.config import Config
    from dynaflow_serving.simulate import Row, Topology
    from dynaflow_serving.strategy.base import OpScheduler

MICRO_BATCHES = (2, 3, 4)  # compared where the user names no number


def simulate(
    model: Annotated[str, typer.Argument(help="Shipped shape such as llama-3-8b, or a YAML file.")],
    batch: Annotated[
        str,
        typer.Option(
            "--batch", "-b", metavar="[Nx]TOKENS[@CONTEXT],...",
            help="Requests of the step of one data-parallel rank: 8x1024 prefills, 128x1@2048 decodes, or both.",
        ),
    ] = "8x1024",
    strategy: StrategyOption = "nanoflow",
    micro_batches: MicroBatchesOption = None,
    option: OptionOption = None,
    device: Annotated[str, typer.Option(help="h100, h200, b200, or a YAML file.")] = "h100",
    link: Annotated[str, typer.Option(help="In a node: nvlink4, nvlink5, pcie5, ..., or a YAML file.")] = "nvlink4",
    network: Annotated[str, typer.Option(help="Between nodes: eth100, eth200, eth400, or a YAML file.")] = "eth400",
    per_node: Annotated[int, typer.Option(min=1, help="Ranks of a node.")] = 8,
    tp: Annotated[int, typer.Option("--tp", "--tensor-parallel", min=1, help="Ranks of a tensor-parallel group.")] = 1,
    ep: Annotated[int, typer.Option("--ep", min=1, help="Ranks that experts are spread over.")] = 1,
    dp: Annotated[int, typer.Option("--dp", min=1, help="Tensor-parallel groups, each with such a batch.")] = 1,
    imbalance: Annotated[float, typer.Option(min=1, help="Rows of the busiest rank's experts over the mean.")] = 1.0,
    graphs: Annotated[
        bool, typer.Option("--graphs/--no-graphs", help="Whether CUDA graphs spare the host the issuing.")
    ] = True,
    timeline: Annotated[bool, typer.Option("--timeline", help="Draw the first layers of the last schedule.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Write the last schedule's Chrome trace here.")] = None,
) -> None:  # fmt: skip
    """Simulate one step: un-split, sequential micro-batches, and the strategy's plan. No GPU needed, none measured."""
    from dynaflow_serving.bench.result import is_small
    from dynaflow_serving.core.timeline import chrome_trace
    from dynaflow_serving.simulate import Device, Link, Shape, Topology, compare, find, parse_requests
    from dynaflow_serving.simulate.picture import strip

    requests = parse_requests(batch)
    config = configure(strategy or "nanoflow", micro_batches, option)
    shape = find(Shape, model)
    try:
        topology = Topology(
            device=find(Device, device), link=find(Link, link), network=find(Link, network),
            per_node=per_node, tp=tp, ep=ep, dp=dp, imbalance=imbalance,
        )  # fmt: skip
    except ValidationError as e:
        raise ConfigError("; ".join(str(item["msg"]).removeprefix("Value error, ") for item in e.errors())) from None
    compared = compare(shape, topology, requests, _variants(config), graphs)
    rows = list({(r.schedule, r.tokens, r.timeline.plan.digest): r for r in compared}.values())
    if json_path is not None:
        facts = {"model": shape.model_dump(), "topology": topology.model_dump(), "batch": batch, "graphs": graphs}
        result = {
            "simulated": True, **facts, "strategy": config.model_dump(), "rows": [row.as_dict() for row in rows]
        }  # fmt: skip
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    if trace is not None:
        trace.write_text(json.dumps(chrome_trace(rows[-1].timeline)) + "\n")
    out = Console()
    where = f"{shape.name} on {_name(topology)}, {len(requests.tokens)} requests a rank"
    out.print(table(where, rows))
    for reason in dict.fromkeys(row.reason for row in rows if row.reason):
        small = " (-o min_tokens=1 splits it)" if is_small(reason) else ""
        _say(out, f"one micro-batch: {reason}{small}")
    if config.streams:
        _say(out, "the config's streams (priority, sm_share) are not simulated")
    if timeline:
        _say(out, f"{rows[-1].schedule}, {len(rows[-1].tokens)} micro-batches\n{strip(rows[-1].timeline)}")
    _say(out, "All figures are simulated (roofline estimates of one rank; all ranks alike), none is measured.")


def table(title: str, rows: list[Row]) -> Table:
    from dynaflow_serving.core.program import Resource
    from dynaflow_serving.simulate.scenario import busy

    result = Table(title=f"simulated: {title}", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    result.add_column("schedule", no_wrap=True)
    for column in ("tokens", "ms", "speed-up", "overlap", "network\nalone, ms", "busy, %\ncmp mem net"):
        result.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        t = row.timeline
        times = f"{t.makespan * 1e3:.4g}", f"{row.speed_up:.2f}x", f"{t.overlap:.0%}", f"{t.exposed_network * 1e3:.4g}"
        used = " ".join(f"{100 * busy(t, r):3.0f}" for r in Resource)
        result.add_row(row.schedule, _tokens(row.tokens), *times, used)
    return result


def _variants(config: Config) -> list[OpScheduler]:
    """The strategy with each number of micro-batches, unless it has no such option or the user gave one; of one that
    chooses among candidates, these."""
    strategy = config.build()
    if strategy.candidates != ("",):
        return [strategy.of(candidate) for candidate in strategy.candidates]
    if "micro_batches" not in type(strategy.options).model_fields or "micro_batches" in config.options:
        return [strategy]
    return [config.model_copy(update={"options": config.options | {"micro_batches": n}}).build() for n in MICRO_BATCHES]


def _tokens(tokens: tuple[int, ...]) -> str:
    """`4096 x2`, or `3072 2048 3072`."""
    return f"{tokens[0]} x{len(tokens)}" if len(set(tokens)) == 1 < len(tokens) else " ".join(map(str, tokens))


def _name(t: Topology) -> str:
    over = f", {t.network.name} between nodes" if t.world > t.per_node else ""
    return f"{t.world} x {t.device.name} ({t.link.name}{over}), tp={t.tp} ep={t.ep} dp={t.dp}"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
