"""Random programs of row-wise and mixing operators, as cases.

Contract
- `random_case(seed, gradients)` returns the same program, inputs and number of micro-batches for the same seed.
- A program has 5 to 30 statements over two arguments of shapes [batch, 4] and [batch, 3, 4], and four weights. It is
  called at two batch sizes between 2 and 40.
- Values are whole numbers in float64: in half of the programs all, in the others until a statement makes them real.
- Whole numbers are compared bit by bit. Operators with jumps (comparisons, sorting,
  rounding) take whole numbers only, so that a difference in the last bit stays one.
- One program in three has row-wise statements only, one has one mixing statement, and one takes them as they come.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.independence.judge import Case
from benchmarks.independence.statements import MIXING, ROW_WISE, STARTS, Value, Writer

WIDTH, LENGTH = 4, 3
STATEMENTS, BATCHES, MICRO_BATCHES = (5, 30), (2, 40), (2, 5)
TRIES = 200


@dataclass(frozen=True)
class RandomProgram:
    """A program as text, and as a case."""

    source: str
    case: Case
    micro_batches: int


class Program(nn.Module):
    """The module of a program: `forward` is given as text."""

    def __init__(self, source: str, generator: torch.Generator) -> None:
        super().__init__()
        for name in ("w0", "w1"):
            self.register_parameter(name, nn.Parameter(_whole(generator, WIDTH, WIDTH, low=-1, high=2)))
        self.register_parameter("scale", nn.Parameter(_whole(generator, WIDTH, low=1, high=3)))
        self.register_buffer("table", _whole(generator, 5, WIDTH, low=-2, high=3))
        space: dict[str, Any] = {"torch": torch, "F": nn.functional}
        exec(compile(source, "random_program.py", "exec"), space)
        self.body: Callable[..., Any] = space["body"]

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.body(self, x, y)


def random_case(seed: int, gradients: bool = False) -> RandomProgram:
    """Return the program of a seed.

    Args:
        seed: Any number.
        gradients: The first argument asks for a gradient.
    """
    rng = random.Random(seed)
    source, whole = random_source(rng)
    generator = torch.Generator().manual_seed(seed)
    sizes = rng.sample(range(BATCHES[0], BATCHES[1] + 1), 2)
    calls = [
        (
            _whole(generator, size, WIDTH, low=-3, high=4).requires_grad_(gradients),
            _whole(generator, size, LENGTH, WIDTH, low=-3, high=4),
        )
        for size in sizes
    ]
    thirds = gradients and ".amax(" in source  # its gradient is shared out among equal values
    case = Case(Program(source, generator), calls, exact=whole and not thirds)
    return RandomProgram(source, case, rng.randint(*MICRO_BATCHES))


def random_source(rng: random.Random) -> tuple[str, bool]:
    """Return a program's text, and whether all its values are whole numbers."""
    writer = Writer(rng, whole_only=rng.random() < 0.5)
    writer.values = [Value("x", (-1, WIDTH), True), Value("y", (-1, LENGTH, WIDTH), True)]
    kind = rng.choice(("row-wise", "one mixing", "any"))
    count = rng.randint(*STATEMENTS)
    mixing_at = rng.randrange(count)
    for number in range(count):
        if kind == "any":
            kinds = MIXING if rng.random() < 0.3 else ROW_WISE
        else:
            kinds = MIXING if kind == "one mixing" and number == mixing_at else ROW_WISE
        for _ in range(TRIES):
            if rng.choice(kinds)(writer, rng.choice(writer.values[-6:])):
                break
    results = [writer.values[-1], *rng.sample(writer.values, min(2, len(writer.values)))]
    lines = [*STARTS, *writer.lines, f"return {', '.join(v.name for v in results)}"]
    return "def body(self, x, y):\n    " + "\n    ".join(lines) + "\n", all(v.whole for v in writer.values)


def _whole(generator: torch.Generator, *shape: int, low: int, high: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator).double()
