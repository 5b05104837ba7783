"""What runs on the two ranks of `test_check_ranks`: importable there by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from check_support import WIDTH, Model, WithKernel, compiled_with, kernel_of
from rounding import integers, with_integer_weights
from torch.distributed._functional_collectives import all_reduce


class Reduced(Model):
    """Its first block is all-reduced, so its steps need both ranks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](all_reduce(self.layers[0](x), "sum", dist.group.WORLD))  # type: ignore[no-any-return]


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@torch.no_grad()
def step_with_a_wrong_rank(folder: str, wrong_ranks: list[int]) -> dict[str, Any]:
    """Run three steps, of which `wrong_ranks` compute the second block wrongly where the batch is split."""
    log = Lines()
    logging.getLogger("dynaflow_serving").addHandler(log)
    torch.manual_seed(0)
    model = with_integer_weights(Reduced())
    factor = 1.001 if dist.get_rank() in wrong_ranks else 1.0
    compiled = compiled_with(WithKernel(kernel_of(model.layers[1], factor)), model, "aot", {"folder": folder})
    equal = []
    for size in (8, 8, 12):
        x = integers(size, WIDTH)
        equal.append(torch.equal(compiled(x), model(x)))
    session = compiled.session
    logging.getLogger("dynaflow_serving").removeHandler(log)
    return {
        "equal": equal,
        "split": session.counts.split,
        "unsplit": dict(session.counts.unsplit),
        "steps": session.check.steps if session.check else 0,
        "log": log.lines,
        "files": len(list(Path(folder).glob(f"*-rank{session.rank}.pt"))),
    }


def all_scenarios(folder: str) -> list[dict[str, Any]]:
    """One start of the ranks for all tests: each takes seconds to import torch."""
    return [step_with_a_wrong_rank(f"{folder}/{i}", ranks) for i, ranks in enumerate(([], [1], [0, 1]))]
