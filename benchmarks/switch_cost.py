"""The cost of suspending a model at a border and going on: greenlets against threads, and both under `EagerCapture`.

    python benchmarks/switch_cost.py [--json FILE]

Every row is microseconds per border: out of the computation, and back into it. It is the median of rounds in which the
cases take turns, with the least and the greatest. `border, un-split` is the cost of a border's wrapper in an un-split
step.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from rich.console import Console
from rich.table import Table
from torch import nn

from dynaflow_serving.capture.eager import EagerCapture
from dynaflow_serving.capture.eager.frames import Frame
from dynaflow_serving.capture.eager.state import TorchState
from dynaflow_serving.core.batch import Signature
from dynaflow_serving.core.measurement import Spread, in_turn
from dynaflow_serving.core.program import Resource
from dynaflow_serving.session.plan_cache import no_context
from dynaflow_serving.strategy.rules import SplitModule
from dynaflow_serving.strategy.selector import FixedStrategy

BORDERS = 200


class Border(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Chain(nn.Module):
    """Nothing but borders: what is measured is ours."""

    def __init__(self) -> None:
        super().__init__()
        self.borders = nn.ModuleList(Border() for _ in range(BORDERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for border in self.borders:
            x = border(x)
        return x


def bare_greenlet() -> Callable[[], None]:
    def body() -> None:
        parent = getcurrent().parent
        assert parent is not None
        for _ in range(BORDERS):
            parent.switch()

    def run() -> None:
        computation = greenlet(body)
        for _ in range(BORDERS + 1):
            computation.switch()

    return run


def bare_thread() -> Callable[[], None]:
    """Two locks hand control back and forth: the least that a thread per micro-batch needs (vLLM's ubatching)."""

    def run() -> None:
        there, back = threading.Lock(), threading.Lock()
        there.acquire()
        back.acquire()

        def body() -> None:
            for _ in range(BORDERS):
                there.acquire()
                back.release()

        thread = threading.Thread(target=body)
        thread.start()
        for _ in range(BORDERS):
            there.release()
            back.acquire()
        thread.join()

    return run


def frames(enter: Callable[[], Any] | None = None) -> Callable[[], None]:
    """A `Frame`, which also keeps torch's state apart; in another state than the driver's, if `enter` is given."""
    model = Chain()
    made = EagerCapture(model.forward, model, (SplitModule("Border", "border"),))
    made.attach()
    x = torch.zeros(2)

    def body(x: torch.Tensor) -> torch.Tensor:
        if enter is None:
            return model.forward(x)
        with enter():
            return model.forward(x)

    def run() -> None:
        frame = Frame(body, made.borders.by_target, 2)
        call = frame.start((x,), {})
        while call is not None:
            call = frame.advance(x)

    return run


def planned() -> Callable[[], None]:
    """One micro-batch of a recorded model under its plan, less the same borders called un-split."""
    from dynaflow_serving.executor import get_executor
    from dynaflow_serving.session.plan_cache import PlanCache
    from dynaflow_serving.strategies import get_strategy

    model = Chain()
    rule = SplitModule("Border", "attention", Resource.MEMORY, context=True)
    made = EagerCapture(model.forward, model, (rule,), {"attention": "kv"})
    made.attach()
    for tokens in (4, 6):
        made.record(tokens, (torch.zeros(tokens, 2),), {})
    assert made.captured is not None
    plan = (
        PlanCache(made.captured, FixedStrategy(get_strategy("sequential")()), get_executor("cpu"))
        .prepare(Signature(2))
        .run
    )
    x = torch.zeros(8, 2)

    def run() -> None:
        made.run(plan, (0, 4, 8), (x,), {}, no_context)

    return run


def unsplit(attached: bool) -> Callable[[], None]:
    model = Chain()
    if attached:
        EagerCapture(model.forward, model, (SplitModule("Border", "border"),)).attach()
    x = torch.zeros(2)
    return lambda: model.forward(x)  # type: ignore[func-returns-value]


def state() -> Callable[[], None]:
    def run() -> None:
        for _ in range(BORDERS):
            TorchState.now()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    cases: dict[str, tuple[Callable[[], None], int]] = {
        "greenlet, bare": (bare_greenlet(), BORDERS),
        "thread, bare (two locks)": (bare_thread(), BORDERS),
        "look at torch's state": (state(), BORDERS),
        "frame (greenlet + state)": (frames(), BORDERS),
        "frame in a state of its own (inference mode)": (frames(torch.inference_mode), BORDERS),
        "plan, 2 micro-batches (frame, checks, call)": (planned(), 2 * BORDERS),
        "stock call of a module, no border": (unsplit(False), BORDERS),
        "border, un-split": (unsplit(True), BORDERS),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    with torch.no_grad():
        for number in range(options.rounds):
            for name in in_turn(list(cases), number):
                run, borders = cases[name]
                begin = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - begin) / borders * 1e6)
    table = Table(title=f"us per border, {BORDERS} borders, {options.rounds} rounds, {os.cpu_count()} CPUs")
    for column in ("case", "median", "min", "max"):
        table.add_column(column, justify="left" if column == "case" else "right")
    figures = {name: Spread.of_values(values).as_dict() for name, values in times.items()}
    for name, spread in figures.items():
        table.add_row(name, *(f"{value:.2f}" for value in spread.values()))
    Console().print(table)
    if options.json:
        result = {"unit": "us per border", "cpus": os.cpu_count(), "cases": figures}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
