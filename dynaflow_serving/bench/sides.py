"""The sides of a comparison: the stock system, and the system under each strategy.

Contract
- The first side is the stock system. Then come its peers (what users can do without DynaFlow), the sequential
  micro-batches of the first strategy that splits, unless they are left out, and the strategies as the user gave them.
- `--micro-batches` and `--option` change every strategy that has such an option. One that no strategy has is an error.
- A strategy that is given by its name alone has three micro-batches, of at least as many tokens as the system's default
  here says, instead of its own options: those are for GPUs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynaflow_serving.config import Config, load, parse_options
from dynaflow_serving.errors import ConfigError, unknown_name
from dynaflow_serving.policy.selector import build_selector, options_of

STOCK, SEQUENTIAL, AUTO = "stock", "sequential", "auto"
DEFAULT_STRATEGIES = ("comm_overlap",)
MICRO_BATCHES = 3
AUTO_OPTIONS: dict[str, Any] = {"retune": True}  # decisions on disk may be of another link


def side_name(strategy: str, micro_batches: int) -> str:
    """Return a side in words."""
    return strategy if micro_batches < 2 else f"{strategy} x{micro_batches}"


@dataclass(frozen=True)
class Side:
    """One of the systems that take turns.

    Attributes:
        strategy: The name of the strategy, `STOCK`, or the name of a peer.
        config: The config of the strategy; None for the stock system and for peers.
        micro_batches: The greatest number of micro-batches; 1 for stock, 0 where the policy decides it.
    """

    strategy: str
    config: Config | None
    micro_batches: int

    @property
    def name(self) -> str:
        """The side in words; no other side has this name."""
        return side_name(self.strategy, self.micro_batches)

    @property
    def content(self) -> dict[str, Any] | None:
        """The content of the config file, for another process; None for the stock system."""
        return None if self.config is None else self.config.model_dump()

    @property
    def decides(self) -> bool:
        """Whether the policy decides what is split, so that it may split nothing."""
        return self.strategy == AUTO

    @property
    def options(self) -> dict[str, Any]:
        """All options of the strategy, the defaults included."""
        if self.config is None:
            return {}
        options: dict[str, Any] = build_selector(self.config).options.model_dump()
        return options


def make_sides(
    sources: Sequence[str],
    micro_batches: int | None = None,
    options: Sequence[str] = (),
    *,
    min_tokens: int = 1,
    usual: int | None = None,
    peers: Sequence[str] = (),
    sequential: bool = True,
) -> list[Side]:
    """Return the sides in their order.

    Args:
        sources: Names of strategies, or paths of YAML or .py files; empty for `DEFAULT_STRATEGIES`.
        micro_batches: The value of the option of that name; None keeps what a strategy has.
        options: Items of the form NAME=VALUE, the value in YAML.
        min_tokens: The value of that option for strategies that are given by their name.
        usual: The number of micro-batches of strategies that are given by their name, `auto` too; None for
            `MICRO_BATCHES`, where `auto` keeps its own.
        peers: What else runs beside the stock system and the strategies.
        sequential: Whether the sequential micro-batches are a side, where a strategy splits.

    Raises:
        ConfigError: A strategy or an option is not valid, or two strategies are the same.
    """
    changes = parse_options(options)
    if micro_batches is not None:
        changes["micro_batches"] = micro_batches
    configs = [load(source) for source in sources or DEFAULT_STRATEGIES]
    valid = {config.strategy: options_of(config.strategy).model_fields for config in configs}
    for name in changes:
        if not any(name in fields for fields in valid.values()):
            known = {field for fields in valid.values() for field in fields}
            raise ConfigError(unknown_name(f"option of {' and '.join(valid)}", name, known))
    sides = []
    for config in configs:
        mine = {name: value for name, value in changes.items() if name in valid[config.strategy]}
        if config.strategy == AUTO and isinstance(mine.get("micro_batches"), int):
            mine["micro_batches"] = [mine["micro_batches"]]  # the numbers that the policy may choose from
        sides.append(_side(config, mine, min_tokens, usual))
    if sequential and (split := next((s for s in sides if s.micro_batches > 1), None)) is not None:
        sides = [_sequential(split), *(s for s in sides if s.strategy != SEQUENTIAL)]
    found = [*(Side(name, None, 1) for name in (STOCK, *peers)), *sides]
    name, times = Counter(side.name for side in found).most_common(1)[0]
    if times > 1:
        raise ConfigError(f"--strategy {name} is given twice, so it would be compared with itself")
    return found


def _side(config: Config, changes: Mapping[str, Any], min_tokens: int, usual: int | None) -> Side:
    fields = options_of(config.strategy).model_fields
    defaults: dict[str, Any] = {"micro_batches": usual or MICRO_BATCHES, "min_tokens": min_tokens}
    if config.strategy == AUTO:
        defaults = AUTO_OPTIONS if usual is None else {**AUTO_OPTIONS, "micro_batches": [usual]}
    known = {} if config.options else {name: value for name, value in defaults.items() if name in fields}
    config = config.model_copy(update={"options": {**known, **config.options, **changes}})
    selector = build_selector(config)  # what is wrong with it is an error now, before anything starts
    return Side(config.strategy, config, 0 if config.strategy == AUTO else selector.max_micro_batches)


def _sequential(split: Side) -> Side:
    """Return the side that runs as many micro-batches one after the other."""
    assert split.config is not None
    smallest = split.options.get("min_tokens", 1)
    options = {"micro_batches": split.micro_batches, "min_tokens": smallest}
    config = split.config.model_copy(update={"strategy": SEQUENTIAL, "options": options})
    return Side(SEQUENTIAL, config, split.micro_batches)
