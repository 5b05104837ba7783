"""The registry that `@register_strategy("name")` fills; `dynaflow_serving.strategies` looks names up in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dynaflow_serving.errors import ConfigError
from dynaflow_serving.strategy.base import OpScheduler

S = TypeVar("S", bound=OpScheduler)

STRATEGIES: dict[str, type[OpScheduler]] = {}


def register_strategy(name: str) -> Callable[[type[S]], type[S]]:
    """Make a strategy available to configs as `name`: a decorator of its class.

    Raises:
        ConfigError: another class has that name.
    """

    def register(cls: type[S]) -> type[S]:
        known = STRATEGIES.setdefault(name, cls)
        if known is not cls and known.__qualname__ != cls.__qualname__:
            raise ConfigError(f"two strategies are called {name!r}: {known.__qualname__}, {cls.__qualname__}")
        STRATEGIES[name] = cls
        cls.name = name
        return cls

    return register
