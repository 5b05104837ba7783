"""`tune_calls` tunes models that are called, not served: the trials are calls that the user gives.

Contract
- A decision is about batches like the given ones. Other kinds of batches run un-split, with that reason.
- Each call is made several times, so it must have no effect that adds up (an append to a cache).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from dynaflow_serving.core.batch import Batch
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.policy.bucket import bucket_of
from dynaflow_serving.policy.key import machine_key, programs_key, selector_key
from dynaflow_serving.policy.selector import AutoSelector
from dynaflow_serving.policy.side_effects import Facts
from dynaflow_serving.policy.start import start_policy
from dynaflow_serving.policy.table import Table
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.session import Session
from dynaflow_serving.strategies.sequential import Sequential

Call = Callable[[], Any]


class CallTrials:
    """These trials run one of the user's calls per bucket."""

    def __init__(self, calls: Iterable[tuple[Batch, Call]]) -> None:
        self._calls = {bucket_of(batch): (batch, call) for batch, call in calls}

    def batches(self) -> Sequence[Batch]:
        """Return the batches of the calls, the largest first."""
        found = [batch for batch, _ in self._calls.values()]
        return sorted(found, key=lambda batch: len(batch.tokens) * batch.width, reverse=True)

    def run_step(self, batch: Batch) -> None:
        """Make the call of the bucket of `batch`."""
        self._calls[bucket_of(batch)][1]()


def tune_calls(
    session: Session, calls: Iterable[tuple[Batch, Call]], parameters: Iterable[torch.Tensor], key: Mapping[str, str]
) -> Table:
    """Decide by making calls, or read the decisions for `key`, the model and this machine, and serve by them.

    Args:
        session: The calls are its steps.
        calls: The batch of each call, and the call itself.
        parameters: The weights of the model, from which device, dtype and size are taken.
        key: The system and the model, for the key of the table.

    Returns:
        The table of the decisions.

    Raises:
        ConfigError: The strategy is not `auto`, or there are no calls.
        InactiveError: The ranks have different decisions.
    """
    selector = session.selector
    if not isinstance(selector, AutoSelector):
        raise ConfigError(f"strategy {selector.name!r} decides nothing: only strategy 'auto' is tuned")
    trials = CallTrials(calls)
    if not trials.batches():
        raise ConfigError("nothing to tune with: give inputs like those that will come, each of two requests at least")
    for batch in trials.batches():  # the first call captures the graphs
        splits = selector.max_micro_batches > 1 and len(batch.tokens) > 1
        with session.trial(f"{Sequential.name} x2" if splits else selector.whole_planners[0]):
            trials.run_step(batch)
    weights = list(parameters)
    device = weights[0].device if weights else torch.device("cpu")
    group = _group()
    ranks = Ranks(group)
    known = Facts(
        {
            **key,
            **programs_key(session),
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


def _local(tensor: Any) -> torch.Tensor:
    """Return this rank's shard of a DTensor, and any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


def _group() -> Any:
    """Return the group of all ranks for objects on the CPU, or None where torch.distributed is not in use."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
