"""The policy for models that are called, not served: trials are calls that the user gives.

Contract
- A decision is about batches like the given ones; other kinds run un-split, with that reason.
- Each call is made several times, so it must have no effect that adds up (an append to a cache).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from dynaflow_serving.core.batch import Batch
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.policy.bucket import bucket_of
from dynaflow_serving.policy.effects import Facts
from dynaflow_serving.policy.selector import AutoSelector
from dynaflow_serving.policy.start import start_policy
from dynaflow_serving.policy.table import Table
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.session import Session
from dynaflow_serving.strategies.sequential import Sequential
from dynaflow_serving.strategy.selector import Selector

Call = Callable[[], Any]


class CallTrials:
    def __init__(self, calls: Iterable[tuple[Batch, Call]]) -> None:
        self._calls = {bucket_of(batch): (batch, call) for batch, call in calls}

    def batches(self) -> Sequence[Batch]:
        found = [batch for batch, _ in self._calls.values()]
        return sorted(found, key=lambda batch: len(batch.tokens) * batch.width, reverse=True)

    def run(self, batch: Batch) -> None:
        self._calls[bucket_of(batch)][1]()


def tune_calls(
    session: Session, calls: Iterable[tuple[Batch, Call]], parameters: Iterable[torch.Tensor], key: Mapping[str, str]
) -> Table:
    """Decide by calling, or read what was decided for `key`, the model, and this machine.

    Raises `ConfigError` if the strategy is not 'auto' or there are no calls, `InactiveError` for ranks that differ.
    """
    selector = session.selector
    if not isinstance(selector, AutoSelector):
        raise ConfigError(f"strategy {selector.name!r} decides nothing: only strategy 'auto' is tuned")
    trials = CallTrials(calls)
    if not trials.batches():
        raise ConfigError("nothing to tune with: give inputs like those that will come, each of two requests at least")
    with session.trial(f"{Sequential.name} x2"):
        for batch in trials.batches():  # captures the graphs
            trials.run(batch)
    weights = list(parameters)
    device = weights[0].device if weights else torch.device("cpu")
    group = _group()
    ranks = Ranks(group)
    known = Facts(
        {
            **key,
            "programs": " ".join(c.captured.program.digest for c in session.plan_caches),
            "dtype": str(weights[0].dtype) if weights else "",
            "ranks": str(ranks.size),
            **machine_key(device.type),
            **selector_key(selector),
        },
        weight_bytes=sum(t.numel() * t.element_size() for t in map(_local, weights)),
    )
    start_policy(session, trials, lambda: known, ranks)
    assert selector.table is not None
    return selector.table


def machine_key(device_type: str) -> dict[str, str]:
    """What the speed of every model depends on."""
    device = torch.cuda.get_device_name() if device_type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "threads": str(torch.get_num_threads()) if device_type == "cpu" else "",
        "torch": torch.__version__,
        "dynaflow_serving": version("dynaflow-serving"),
    }


def selector_key(selector: Selector) -> dict[str, str]:
    """What the candidates are, and by which rule they are adopted; where a table is kept, or how long it may take to
    make, changes no decision."""
    made = {c: selector.strategy(c).options.model_dump(mode="json") for c in selector.candidates}
    rule = selector.options.model_dump(include={"min_gain", "straddle", "min_collective_kib"})
    return {"candidates": json.dumps(made, sort_keys=True), "rule": json.dumps(rule, sort_keys=True)}


def _local(tensor: Any) -> torch.Tensor:
    """This rank's shard of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


def _group() -> Any:
    """The group of all ranks, for objects on the CPU; None without one."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
