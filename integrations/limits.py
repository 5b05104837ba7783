"""These functions are common to the limits of all serving engines.

Contract
- An engine's own `limits` collects causes. Each is a phrase, with the remedy where there is one.
- `refuse` raises all causes together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dynaflow_serving.config import Config
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.strategy.selector import Selector


def refuse(engine: str, config: Config, causes: Iterable[str]) -> None:
    """Raise all `causes`, if there are any; `engine` is its name for people.

    Raises:
        InactiveError: There are causes.
    """
    if listed := "; ".join(causes):
        raise InactiveError(
            f"DynaFlow was requested (strategy {config.strategy}) but cannot be active: {listed}. "
            f"Change these, or remove the dynaflow option; with 'fallback: true' {engine} runs without it."
        )


def rank_causes(selector: Selector, ranks: int) -> list[str]:
    """Return a cause if the strategy needs more tensor-parallel ranks. A policy refuses candidates when it decides."""
    if len(selector.candidates) > 1 or ranks >= (least := selector.strategy(selector.candidates[0]).fewest_ranks):
        return []
    return [
        f"strategy {selector.name!r} needs {least} tensor-parallel ranks or more, and there is {ranks} (add ranks, or "
        "choose another strategy)"
    ]


def context_causes(config: Config, selector: Selector, device: str) -> list[str]:
    """Return a cause if the strategy needs streams for operators with context, and the executor has threads."""
    threads = device == "cpu" and config.executor != "sequential"
    if len(selector.candidates) > 1 or not threads:
        return []
    if not selector.strategy(selector.candidates[0]).context_on_streams:
        return []
    return [
        f"strategy {selector.name!r} runs attention on a stream of its own, which the worker threads of a CPU cannot "
        "(choose another strategy; executor: sequential runs its order on one stream)"
    ]


def unsplit_causes(engine: str, selector: Selector) -> list[str]:
    """Return a cause for each candidate of `strategy: auto` that only orders un-split steps."""
    if len(selector.candidates) == 1:
        return []
    found = [candidate for candidate in selector.candidates if selector.plans_unsplit(candidate)]
    return [f"candidate {c!r} never splits, and un-split steps run as {engine} runs them (leave it out)" for c in found]


def unsupported(found: Mapping[str, object], verb: str = "is") -> list[str]:
    """Return a cause for each feature that is there; `verb` follows its name."""
    return [f"{name} {verb} not supported yet" for name, present in found.items() if present]


def executor_causes(engine: str, config: Config, device: str) -> list[str]:
    """Return the causes in the type of the device, the executor and its graphs."""
    if device not in ("cpu", "cuda"):
        return [f"device {device!r} is not supported (cpu and cuda are)"]
    if config.executor not in ("auto", "sequential", device):
        return [f"executor {config.executor!r} does not fit device {device!r} (set executor: auto)"]
    if config.graph != "off":
        return [f"graph {config.graph!r}: attention reads metadata that {engine} makes anew each step (set graph: off)"]
    return []
