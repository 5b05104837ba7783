"""The loads: the requests that are sent to the servers.

Contract
- The engine's own tool sends a load. It also draws arrival times and, for "random", lengths and tokens.
- "sharegpt" is a file in ShareGPT's own format, made here: log-normal lengths, text of the standard library. Nothing
  is downloaded.
- Every pass has a seed of its own, so that no prompt is found in a prefix cache; both servers get the same passes.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynaflow_serving.errors import ConfigError, unknown_name

DATASETS = {
    "random": "lengths uniform between half and one and a half of their mean, random tokens",
    "sharegpt": "lengths log-normal (sigma 1) about their mean, as ShareGPT's conversations; text made locally",
}
SHORTEST, LONGEST = 4, 1024  # tokens; vLLM's tool drops ShareGPT conversations outside of this
SIGMA = 1.0
SEEDS_OF_A_LOAD = 1000

Spans = Callable[[str], Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Load:
    """The requests of a pass.

    Attributes:
        dataset: A key of `DATASETS`.
        requests: The number of requests.
        input_len: The mean length of a prompt, in tokens.
        output_len: The mean length of an output, in tokens.
        rate: Requests per second, as a Poisson process; inf sends all at once.
    """

    dataset: str
    requests: int
    input_len: int
    output_len: int
    rate: float

    @property
    def name(self) -> str:
        """The load in words."""
        return f"{self.dataset}, {'all at once' if math.isinf(self.rate) else f'{self.rate:g}/s'}"

    def facts(self) -> dict[str, Any]:
        """Return plain data for JSON, which has no infinity."""
        return {**asdict(self), "rate": "inf" if math.isinf(self.rate) else self.rate, "name": self.name}


def make_loads(
    datasets: Sequence[str], rates: Sequence[float], requests: int, input_len: int, output_len: int
) -> list[Load]:
    """Return each dataset at each rate, in the given order, each once.

    Raises:
        ConfigError: A dataset is unknown, or a rate or a length is not valid.
    """
    for dataset in datasets:
        if dataset not in DATASETS:
            raise ConfigError(unknown_name("load", dataset, DATASETS))
    for rate in rates:
        if not rate > 0:
            raise ConfigError(f"--rate {rate:g}: requests per second, more than 0; inf sends all at once")
    if "sharegpt" in datasets and not (_fits(input_len) and _fits(output_len)):
        raise ConfigError(
            f"--load sharegpt: mean lengths of {input_len} and {output_len} tokens; valid: {SHORTEST} to "
            f"{LONGEST // 2}, because the tools drop longer conversations ({LONGEST} tokens). --load random takes any "
            "length."
        )
    pairs = itertools.product(dict.fromkeys(datasets), dict.fromkeys(rates))
    return [
        Load(dataset=dataset, requests=requests, input_len=input_len, output_len=output_len, rate=rate)
        for dataset, rate in pairs
    ]


def _fits(mean: int) -> bool:
    return SHORTEST <= mean <= LONGEST // 2


def seed_of_pass(base: int, load: int, number: int) -> int:
    """Return the seed of pass `number` of the load with that index; no other pass of the benchmark has it."""
    return SEEDS_OF_A_LOAD * (base + load) + number


def lengths(load: Load, seed: int) -> list[tuple[int, int]]:
    """Return the prompt tokens and the output tokens of each ShareGPT-like conversation."""
    draw = random.Random(seed)
    return [(_length(draw, load.input_len), _length(draw, load.output_len)) for _ in range(load.requests)]


def _length(draw: random.Random, mean: int) -> int:
    drawn = draw.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA)
    return min(max(round(drawn), SHORTEST), LONGEST)


class ShareGPT:
    """Writes ShareGPT-like files.

    Args:
        text: The text that conversations are cut from.
        spans: Returns where each token of a text begins and ends.
    """

    def __init__(self, text: str, spans: Spans) -> None:
        self._text, self._spans = text, spans(text)

    def write(self, path: Path, load: Load, seed: int) -> None:
        """Write the conversations of one pass of a load."""
        draw = random.Random(seed)
        conversations = [
            {
                "id": str(number),
                "conversations": [
                    {"from": "human", "value": self._piece(draw, prompt)},
                    {"from": "gpt", "value": self._piece(draw, output)},
                ],
            }
            for number, (prompt, output) in enumerate(lengths(load, seed))
        ]
        path.write_text(json.dumps(conversations))

    def _piece(self, draw: random.Random, tokens: int) -> str:
        """Return text of about so many tokens: words at its ends may be cut, and tokenised otherwise."""
        first = draw.randrange(len(self._spans) - tokens)
        return self._text[self._spans[first][0] : self._spans[first + tokens - 1][1]]


def sharegpt_for(model: str) -> ShareGPT:
    """Return a writer with the model's own tokenizer; transformers comes with the engine."""
    from transformers import AutoTokenizer

    from dynaflow_serving.bench.tiny_models import standard_library

    tokenizer = AutoTokenizer.from_pretrained(model)

    def spans(text: str) -> Sequence[tuple[int, int]]:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        found: Sequence[tuple[int, int]] = encoded["offset_mapping"]
        return found

    return ShareGPT("\n".join(standard_library()[:20]), spans)
