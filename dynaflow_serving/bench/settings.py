"""The settings of a benchmarked engine, and its requests.

Contract
- `EngineSettings` is all that a child process is told; it survives JSON (`asdict`, `EngineSettings(**...)`).
- Both engines of a comparison get the same settings, but for `dynaflow`.
- `requests_of_pass` is a pure function of its arguments: both engines see the same requests in the same order.
- The lengths are the same in every pass, so that passes compare. The tokens differ, so that no pass finds the prompts
  of an earlier one in the engine's prefix cache.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EngineSettings:
    """The settings that an engine is started with."""

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
    """The requests of a pass, which are all sent at once.

    Their lengths in tokens are uniform between half and one and a half of `input_len` and `output_len`.
    """

    requests: int
    input_len: int
    output_len: int
    seed: int = 0

    def lengths(self) -> list[tuple[int, int]]:
        """Return the prompt tokens and the output tokens of each request."""
        draw = random.Random(self.seed)
        return [(_around(draw, self.input_len), _around(draw, self.output_len)) for _ in range(self.requests)]

    @property
    def longest(self) -> int:
        """The most tokens of a request, prompt and output together."""
        return max(prompt + output for prompt, output in self.lengths())


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and the number of tokens to generate."""

    prompt: list[int]
    output_len: int


def requests_of_pass(traffic: Traffic, vocabulary: int, number: int) -> list[Request]:
    """Return the requests of a pass.

    Args:
        traffic: Their number and lengths.
        vocabulary: The token ids of prompts are below this.
        number: The number of the pass; 0 is the warm-up.
    """
    draw = random.Random(f"{traffic.seed}/{number}")
    return [
        Request([draw.randrange(vocabulary) for _ in range(prompt)], output) for prompt, output in traffic.lengths()
    ]


def _around(draw: random.Random, mean: int) -> int:
    return draw.randint(max(1, mean - mean // 2), mean + mean // 2)
