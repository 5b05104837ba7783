"""Strategies and their registry.

Contract
- `@register_strategy("name")` on an `OpScheduler` makes it available in YAML and on the command line.
- Other packages contribute through the entry-point group `dynaflow_serving.strategies`; a single file is
  named in YAML by its path (`strategy: my_strategy.py`).
- An unknown name is a `ConfigError` that lists the valid ones.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from dynaflow_serving.config import checked_options
from dynaflow_serving.errors import ConfigError, unknown_name
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.registry import STRATEGIES

SHIPPED = (
    "branches", "comet", "comm_overlap", "dual_batch", "flux", "fused_norms", "nanoflow", "prefill_decode",
    "round_robin", "sequential", "token_weave",
)  # fmt: skip


@cache
def _load_all() -> None:
    for name in SHIPPED:
        importlib.import_module(f"{__name__}.{name}")

    for point in entry_points(group="dynaflow_serving.strategies"):
        point.load()


def strategy_names() -> list[str]:
    _load_all()
    return sorted(STRATEGIES)


def get_strategy(name: str) -> type[OpScheduler]:
    """The class registered as `name`, or the one that the file `name` (ending in .py) registers."""
    _load_all()
    if name.endswith(".py"):
        return _from_file(Path(name))
    if name not in STRATEGIES:
        raise ConfigError(unknown_name("strategy", name, STRATEGIES) + " A path to a .py file works too.")
    return STRATEGIES[name]


def build_strategy(name: str, options: Mapping[str, Any]) -> OpScheduler:
    """Make the strategy called `name`, and try its splits.

    Raises:
        ConfigError: the name or an option is not valid, or `split` is wrong.
    """
    cls = get_strategy(name)
    strategy = cls(checked_options(cls.Options, options, cls.name))
    strategy.check_splits()
    return strategy


def _from_file(path: Path) -> type[OpScheduler]:
    if not path.is_file():
        raise ConfigError(f"strategy file {str(path)!r} does not exist")
    before = dict(STRATEGIES)
    spec = importlib.util.spec_from_file_location(f"{__name__}.file.{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"strategy file {str(path)!r} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where pydantic looks up the types of options
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        STRATEGIES.clear()
        STRATEGIES.update(before)
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"strategy file {str(path)!r} cannot be imported: {type(e).__name__}: {e}") from e
    new = [cls for name, cls in STRATEGIES.items() if before.get(name) is not cls]
    if len(new) != 1:
        raise ConfigError(f"strategy file {str(path)!r} must register one strategy, it registers {len(new)}")
    return new[0]
