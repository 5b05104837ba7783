"""What a benchmark runs: the engine's settings and the requests.

Contract
- `EngineSettings` is all that a child process is told; it survives JSON (`asdict`, `EngineSettings(**...)`).
- Both engines of a comparison get the same settings, but for `dynaflow`.
- `requests_of_pass` is a pure function of its arguments: both engines see the same requests in the same order.
  Lengths are the same in every pass, so that passes compare; tokens differ, so that no pass finds the prompts of
  an earlier one in the engine's prefix cache.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EngineSettings:
    model: str
    dtype: str = "auto"
    tensor_parallel: int = 1
    compiled: bool = True
    max_model_len: int | None = None
    max_batched_tokens: int | None = None  # None: the engine's default
    seed: int = 0
    memory_share: float | None = 0.9  # of each GPU, for this engine; None: the engine's default
    as_server: bool = False  # limits that are not given are those of the engine's server, where it has others offline
    dynaflow: dict[str, Any] | None = None  # content of a config file; None: the stock engine


@dataclass(frozen=True)
class Traffic:
    """`requests` at a time; lengths in tokens, uniform between half and one and a half of the given mean."""

    requests: int
    input_len: int
    output_len: int
    seed: int = 0

    def lengths(self) -> list[tuple[int, int]]:
        """(prompt tokens, output tokens) of each request."""
        draw = random.Random(self.seed)
        return [(_around(draw, self.input_len), _around(draw, self.output_len)) for _ in range(self.requests)]

    @property
    def longest(self) -> int:
        return max(prompt + output for prompt, output in self.lengths())


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    output_len: int


def requests_of_pass(traffic: Traffic, vocabulary: int, number: int) -> list[Request]:
    """The requests of pass `number` (0 is the warm-up)."""
    draw = random.Random(f"{traffic.seed}/{number}")
    return [
        Request([draw.randrange(vocabulary) for _ in range(prompt)], output) for prompt, output in traffic.lengths()
    ]


def _around(draw: random.Random, mean: int) -> int:
    return draw.randint(max(1, mean - mean // 2), mean + mean // 2)
