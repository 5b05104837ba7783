"""A forward of ours in the place of a module's own, for systems whose models are enabled one at a time.

Contract
- The module keeps our object as an attribute, and is called as before. A model is enabled once.
- `fall_back` decides what becomes of a model that cannot be enabled.
- `conclude` ends a run that was started under DynaFlow: one in which nothing was split is an error.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from dynaflow_serving.config import Config
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.policy.selector import AUTO
from dynaflow_serving.session.session import Session

ATTRIBUTE = "_dynaflow"


def install(module: Any, make: Callable[[], Callable[..., Any]]) -> Any:
    """Replace the forward of `module` by what `make` returns, and return that.

    Raises:
        InactiveError: The module is enabled already.
    """
    if ATTRIBUTE in module.__dict__:
        raise InactiveError("this model is enabled already")
    stock, made = module.forward, make()

    @functools.wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return made(*args, **kwargs)

    module.__dict__.update({ATTRIBUTE: made, "forward": forward})
    return made


def installed_in(module: Any, system: str) -> Any:
    """Return what was installed in `module`; `system` is the name of the integration.

    Raises:
        InactiveError: The model is not enabled.
    """
    made = module.__dict__.get(ATTRIBUTE)
    if made is None:
        raise InactiveError(f"this model is not enabled: call dynaflow_serving.integrations.{system}.enable")
    return made


def fall_back(allowed: bool, error: Exception) -> None:
    """Warn that a model runs without DynaFlow because of `error`, or raise it where that is not `allowed`."""
    if not allowed:
        raise error
    logging.getLogger("dynaflow_serving").warning("DynaFlow is not active (fallback: true): %s", error)


def conclude(config: Config, sessions: Sequence[Session], steps: str, remedy: str) -> str:
    """Return how many steps were split, in words; `steps` is what they are called.

    Raises:
        InactiveError: None was split, and the strategy should have; the message ends with the `remedy`.
    """
    counts = [session.report().steps for session in sessions]
    split, unsplit = sum(c.split for c in counts), sum((Counter(c.unsplit) for c in counts), Counter())
    told = f"{split} {steps} were split" + "".join(f", {n} not: {reason}" for reason, n in unsplit.items())
    may_decline = config.strategy == AUTO or any(s.selector.plans_unsplit("") for s in sessions)
    if not (split or may_decline or config.fallback):
        raise InactiveError(f"DynaFlow was requested (strategy {config.strategy}), but {told}. {remedy}")
    return told
