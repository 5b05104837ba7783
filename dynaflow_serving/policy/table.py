"""What the policy decided, and for what it holds: kept in a file, shown at start-up, compared between ranks.

Contract
- A table holds for exactly its `key` (model, device, topology, engine and our version, strategies, ...): `load` does
  not use another one's, and says which entries differ.
- The file is plain JSON, complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dynaflow_serving.files import cache_directory, write_text
from dynaflow_serving.policy.bucket import Bucket

logger = logging.getLogger("dynaflow_serving")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Trial(_Record):
    """One candidate on one bucket."""

    candidate: str
    predicted: float | None = Field(default=None, description="speed-up over the un-split step; simulated")
    ratios: list[float] = Field(default_factory=list, description="un-split seconds over candidate's, pair by pair")
    effects: list[str] = Field(default_factory=list, description="side effects of this split")
    verdict: str = Field(default="", description="why it was not timed, or not adopted; empty for the adopted one")

    @property
    def measured(self) -> float | None:
        """Median of the pairs."""
        return median(self.ratios) if self.ratios else None


class Decision(_Record):
    """What a bucket runs under: `candidate`, "" for the un-split step."""

    kind: str
    tokens: int
    requests: int
    candidate: str = ""
    reason: str = ""
    decided: bool = Field(default=True, description="false: the budget did not reach it")
    plain_ms: float | None = Field(default=None, description="an un-split step, median")
    noise: float | None = Field(default=None, description="relative spread of un-split steps")
    trials: list[Trial] = Field(default_factory=list)

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.kind, self.tokens, self.requests)

    @property
    def best(self) -> Trial | None:
        """The adopted trial, else the one that came closest."""
        if adopted := [t for t in self.trials if t.candidate == self.candidate]:
            return adopted[0]
        measured = [t for t in self.trials if t.measured is not None]
        ranked = measured or [t for t in self.trials if t.predicted is not None]
        return max(ranked, key=lambda t: t.measured or t.predicted or 0.0, default=None)


class Table(_Record):
    key: dict[str, str]
    decisions: list[Decision]
    seconds: float = Field(default=0.0, description="spent on tuning")

    @property
    def adopted(self) -> dict[Bucket, str]:
        return {d.bucket: d.candidate for d in self.decisions if d.candidate}

    def save(self, path: Path) -> None:
        write_text(path, self.model_dump_json(indent=1) + "\n")


def load(path: Path, key: dict[str, str]) -> Table | None:
    """The table at `path`, if there is one and it is for `key`."""
    try:
        table = Table.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        logger.warning("DynaFlow: the policy table %s cannot be read and is not used: %s", path, error)
        return None
    if found := differences(table.key, key, "there", "here"):
        logger.warning("DynaFlow: the policy table %s is stale and not used: %s", path, found)
        return None
    return table


def differences(first: Mapping[str, str], second: Mapping[str, str], one: str, other: str) -> str:
    """Where two keys differ, in words; "" where they do not."""
    differing = [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]
    return "; ".join(f"{n}: {first.get(n)!r} {one}, {second.get(n)!r} {other}" for n in differing)


def default_path(key: dict[str, str]) -> Path:
    """Where the table for `key` is kept: `$XDG_CACHE_HOME/dynaflow_serving/policy`, else under `~/.cache`."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_directory() / "policy" / f"{digest}.json"
