"""The registry that `@register_strategy("name")` fills; `dynaflow_serving.strategies` looks names up in it."""

from __future__ import annotations

from collections.abc import Callable

from dynaflow_serving.errors import ConfigError
from dynaflow_serving.strategy.base import OpScheduler

STRATEGIES: dict[str, type[OpScheduler]] = {}


def register_strategy(name: str) -> Callable[[type[OpScheduler]], type[OpScheduler]]:
    def register(cls: type[OpScheduler]) -> type[OpScheduler]:
        known = STRATEGIES.setdefault(name, cls)
        if known is not cls and known.__qualname__ != cls.__qualname__:
            raise ConfigError(f"two strategies are called {name!r}: {known.__qualname__}, {cls.__qualname__}")
        STRATEGIES[name] = cls
        cls.name = name
        return cls

    return register
