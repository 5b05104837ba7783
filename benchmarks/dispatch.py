"""What a step costs beyond its operators: `python benchmarks/dispatch.py [SYSTEM ...] [--layers N] [--json FILE]`.

The models are Llamas of thin layers (hidden size 64, 16 requests), so that a step takes as long as its operators take
to call. The operators are real, as captured. SYSTEM is one of `SYSTEMS` or how its name begins; the default is all that
this environment can import. Each system runs in a process of its own.

There are four sides:
- stock: the system without DynaFlow;
- un-split: the system with DynaFlow, and a strategy that splits nothing;
- split: the same, and the strategy splits every step;
- by hand: the same, and instead of the plan one loop calls the same operators, one micro-batch after the other, with
  arguments that were cut and computed in an earlier step. A model without a graph has no operators to call: its own
  forward runs once per micro-batch.

Stock and un-split take turns first, one step each per round, then un-split, split and by hand. Requests have the same
lengths in all steps of a round. Ratios are taken within a round, and a figure is their median, with the least and the
greatest:
- un-split / stock: of the whole step, with all that the engine does around the model;
- split / un-split: of the whole step, per micro-batch; then the same of the model's forward alone;
- split / by hand: of the model's forward alone.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from dispatch_systems import MICRO_BATCHES, OURS, REQUESTS, SYSTEMS, WARM, Subject
from rich.console import Console
from rich.table import Table

from dynaflow_serving.bench.environment import has_gpu, machine, no_environment, sglang_environment, vllm_environment
from dynaflow_serving.core.measurement import Spread, in_turn
from dynaflow_serving.session.forward import SplitForward

LAYERS = [8, 32, 80]
STEP, FORWARD = 0, 1
# CPython keeps frames in chunks of 16 KiB. A loop whose calls cross the end of one allocates memory with each call,
# which made one side of vLLM's mode 3 seem 1.4 times as slow. So the rounds begin at different depths.
DEPTHS = 150
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # more of them only add noise
PACKAGES = {"compile": "torch", "vllm": "vllm", "sglang": "sglang"}


# -- measuring ---------------------------------------------------------------------------------------------------
class ForwardTimer:
    """The seconds that the model's forward took in the latest step with DynaFlow."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds = clock, 0.0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Time every `SplitForward` in this block."""
        stock = SplitForward.__call__

        def timed(forward: SplitForward, *args: Any, **kwargs: Any) -> Any:
            begin = self.clock()
            try:
                return stock(forward, *args, **kwargs)
            finally:
                self.seconds = self.clock() - begin

        SplitForward.__call__ = timed  # type: ignore[method-assign]
        try:
            yield
        finally:
            SplitForward.__call__ = stock  # type: ignore[method-assign]


@dataclass(frozen=True)
class Row:
    """One system with so many layers; ratios as the module's docstring defines them."""

    system: str
    layers: int
    operators: int
    stock_ms: Spread
    unsplit_over_stock: Spread
    split_over_unsplit: Spread
    split_over_unsplit_forward: Spread
    split_over_by_hand: Spread


Times = dict[str, list[tuple[float, float]]]  # side -> seconds of each step, and of the model's forward in it


def measure(system: str, layers: int, rounds: int, clock: Callable[[], float]) -> Row:
    """Return the figures of a system, which is started twice, for half of the rounds each.

    Where both sides have weights of their own, those of the side that starts first lie better in memory: two stock
    engines of vLLM with 32 layers differ by 1 to 2 % this way. So each side starts first once.
    """
    with_stock: Times = defaultdict(list)
    ours: Times = defaultdict(list)
    operators = 0
    for ours_first in (False, True):
        with SYSTEMS[system](layers, rounds, ours_first) as subject:
            session = subject.session
            operators = sum(len(cache.captured.program.operators) for cache in session.plan_caches)
            take_turns(subject, ("stock", "un-split"), rounds // 2, clock, with_stock)
            session.counts.reset()
            take_turns(subject, OURS, rounds // 2, clock, ours)
            assert session.counts.split == 2 * (WARM + rounds // 2), session.counts.unsplit
        gc.collect()
    return Row(
        system,
        layers,
        operators,
        Spread.of_values(1e3 * step for step, _ in with_stock["stock"]),
        _ratio(with_stock["un-split"], with_stock["stock"], STEP),
        _ratio(ours["split"], ours["un-split"], STEP, MICRO_BATCHES),
        _ratio(ours["split"], ours["un-split"], FORWARD, MICRO_BATCHES),
        _ratio(ours["split"], ours["by hand"], FORWARD),
    )


def take_turns(subject: Subject, sides: Sequence[str], rounds: int, clock: Callable[[], float], times: Times) -> None:
    """Run one step of each side per round, and add what counts to `times`."""
    timer = ForwardTimer(clock)
    gc.collect()
    gc.disable()
    try:
        with timer.installed():
            for number in range(WARM + rounds):
                for side in in_turn(sides, number):
                    step = functools.partial(at_depth, number * 37 % DEPTHS, subject.use_side(side))
                    begin = clock()
                    step()
                    if number >= WARM:
                        times[side].append((clock() - begin, timer.seconds))
    finally:
        gc.enable()


def at_depth(depth: int, step: Callable[[], Any]) -> None:
    """Call `step` so many frames further down."""
    if depth:
        at_depth(depth - 1, step)
    else:
        step()


def _ratio(
    times: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]], which: int, factor: int = 1
) -> Spread:
    return Spread.of_ratios(a[which] / b[which] / factor for a, b in zip(times, others, strict=True))


# -- the command ----------------------------------------------------------------------------------------------------
def rows_here(system: str, layers: Sequence[int], rounds: int, cpu: bool) -> list[Row]:
    """Measure one system in this process."""
    clock = time.thread_time if cpu else time.perf_counter
    return [measure(system, number, rounds, clock) for number in layers]


def rows_of_child(system: str, layers: Sequence[int], rounds: int, cpu: bool) -> list[dict[str, Any]]:
    """Measure one system in a process of its own, with the environment that the bench gives such a process."""
    environment = {"vllm": vllm_environment, "sglang": sglang_environment}.get(system.partition("-")[0], no_environment)
    variables = environment(1, gpu=has_gpu(), compiled=False, local_model=True)
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "rows.json", Path(folder) / "log"
        command = [sys.executable, __file__, system, "--here", "--json", str(out), "--rounds", str(rounds)]
        command += [word for number in layers for word in ("--layers", str(number))] + ["--cpu"] * cpu
        with log.open("w") as stream:
            environ = {**variables, **ONE_THREAD, **os.environ}
            done = subprocess.run(command, env=environ, stdout=stream, stderr=stream)
        if done.returncode:
            raise SystemExit(f"{system} failed:\n{log.read_text()}")
        rows: list[dict[str, Any]] = json.loads(out.read_text())
        return rows


def available(named: Sequence[str]) -> list[str]:
    """Return the systems whose names begin with one of `named`; without names, all that can be imported."""
    if unknown := [name for name in named if not any(s.startswith(name) for s in SYSTEMS)]:
        raise typer.BadParameter(f"no system begins with {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
    if named:
        return [s for s in SYSTEMS if any(s.startswith(name) for name in named)]
    return [s for s in SYSTEMS if importlib.util.find_spec(PACKAGES[s.partition("-")[0]])]


def main(
    systems: Annotated[list[str] | None, typer.Argument(help="Names, or how they begin.")] = None,
    layers: Annotated[list[int] | None, typer.Option(help="The number of thin layers; again for more.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds that count.")] = 40,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    cpu: Annotated[bool, typer.Option(help="Take processor time, where a machine is not quiet.")] = False,
    here: Annotated[bool, typer.Option(help="Measure one system in this process.")] = False,
) -> None:
    """Measure what a step costs beyond its operators."""
    chosen, layers = available(systems or []), layers or LAYERS
    if here:
        assert json_file is not None
        json_file.write_text(json.dumps([asdict(row) for row in rows_here(chosen[0], layers, rounds, cpu)]))
        return
    rows: list[dict[str, Any]] = []
    for system in chosen:
        rows += rows_of_child(system, layers, rounds, cpu)
        Console(width=160).print(table(rows))
    if json_file:
        command = shlex.join(["python", "benchmarks/dispatch.py", *sys.argv[1:]])
        json_file.write_text(json.dumps({"command": command, "machine": machine(), "rows": rows}, indent=1) + "\n")


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the figures of all rows so far."""
    result = Table(title=f"{REQUESTS} tokens a step, {MICRO_BATCHES} micro-batches; median (min - max) of rounds")
    columns = {
        "stock ms": ("stock_ms", 2),
        "un-split / stock": ("unsplit_over_stock", 3),
        "split / un-split": ("split_over_unsplit", 3),
        "the same, forward": ("split_over_unsplit_forward", 3),
        "split / by hand": ("split_over_by_hand", 3),
    }
    for name in ("system", "layers", "operators", *columns):
        result.add_column(name, justify="left" if name == "system" else "right")
    for row in rows:
        cells = [
            f"{row[key]['median']:.{digits}f} ({row[key]['min']:.{digits}f} - {row[key]['max']:.{digits}f})"
            for key, digits in columns.values()
        ]
        result.add_row(row["system"], str(row["layers"]), str(row["operators"]), *cells)
    return result


if __name__ == "__main__":
    typer.run(main)
