"""An engine in a few lines for the tests of the policy: a step's operators sleep, as long as they are told to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from support import manual, program_of

from dynaflow_serving.config import Config
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.policy.bucket import bucket_of
from dynaflow_serving.policy.selector import AutoSelector, build_selector
from dynaflow_serving.policy.side_effects import Facts
from dynaflow_serving.policy.table import Decision, Table, Trial
from dynaflow_serving.policy.tuner import Tuner
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.session import Session

# compute, then network, twice: two micro-batches hide one's network under the other's compute
CHAIN = """
value x batch:0
value a batch:0
value b batch:0
value c batch:0
value d batch:0
inputs x
op c0 compute
  inputs x
  outputs a
op n0 network
  inputs a
  outputs b
op c1 compute
  inputs b
  outputs c
op n1 network
  inputs c
  outputs d
outputs d
"""
BATCH = Batch((8,) * 8)


class Engine:
    """Steps of a program whose operators take `seconds(tokens of the micro-batch)`. `batches`: those it tries."""

    def __init__(
        self,
        seconds: Callable[[int], float],
        batches: Iterable[Batch] = (Batch((8,) * 8),),
        ranks: Ranks | None = None,
        check: str = "never",
        **options: Any,
    ) -> None:
        self.seconds = seconds
        self.ran: list[Batch] = []
        given = {"candidates": ["nanoflow"], "micro_batches": [2], **options}
        config = Config(strategy="auto", options=given, check=check)
        self.session = Session(build_selector(config), config)
        self.plan_cache = self.session.add(
            manual(program_of(CHAIN), **dict.fromkeys(("c0", "n0", "c1", "n1"), self._operator)),
        )
        self._batches = list(batches)
        self.facts = Facts({"model": "chain", "device": "here"})
        self.ranks = ranks or Ranks()

    @property
    def selector(self) -> AutoSelector:
        assert isinstance(self.session.selector, AutoSelector)
        return self.session.selector

    def _operator(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds(len(x)))
        return x + 1

    def batches(self) -> list[Batch]:
        return self._batches

    def run_step(self, batch: Batch) -> None:
        self.ran.append(batch)
        self.step(batch)

    def step(self, batch: Batch) -> torch.Tensor:
        x = torch.zeros(sum(batch.tokens), 1)
        with self.session.step(batch) as step:
            (result,) = self.plan_cache.run([x], step.split, traced=step.to_trace)
            (result,) = step.checked((result,), lambda: self.plan_cache.run_plain([x], len(x)))
        assert torch.equal(result, torch.full_like(result, 4.0))
        return result


def per_token(tokens: int) -> float:
    """Half the work takes half the time."""
    return 0.0002 * tokens


def fixed(tokens: int) -> float:
    """Two halves take twice as long as the whole."""
    return 0.01


def trial(*ratios: float, name: str = "a") -> Trial:
    return Trial(candidate=name, ratios=list(ratios))


def table_for(*decisions: Decision, **key: str) -> Table:
    return Table(key=key, decisions=list(decisions))


def adopted(batch: Batch = BATCH, candidate: str = "nanoflow x2", noise: float = 0.05) -> Decision:
    bucket = bucket_of(batch)
    return Decision(**bucket._asdict(), candidate=candidate, noise=noise, trials=[trial(1.4, name=candidate)])


def tune(engine: Engine) -> Table:
    return Tuner(engine.session, engine.selector, engine, engine.facts, engine.ranks).tune()


def tune_until_adopted(engine: Engine, attempts: int = 4) -> Table:
    """Time is real here: on a busy machine a win may drown in noise, but not every time."""
    found = (tune(engine) for _ in range(attempts))
    return next((table for table in found if table.adopted), table_for())
