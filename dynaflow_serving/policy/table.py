"""A table holds the policy's decisions: it is kept in a file, shown at start-up and compared between ranks.

Contract
- A table holds for exactly its `key` (model, device, topology, releases, strategies, ...). `read_table` uses no table
  with another key, and logs the entries that differ.
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
    """A trial is the result of one candidate on one bucket."""

    candidate: str
    predicted: float | None = Field(default=None, description="This is the simulated speed-up over the un-split step.")
    ratios: list[float] = Field(
        default_factory=list, description="Each pair gives the un-split seconds over the candidate's."
    )
    effects: list[str] = Field(default_factory=list, description="The split has these side effects.")
    verdict: str = Field(
        default="", description="This says why it was not timed or not adopted. It is empty for the adopted one."
    )

    @property
    def measured(self) -> float | None:
        """The measured speed-up is the median of the pairs; it is None before there are any."""
        return median(self.ratios) if self.ratios else None


class Decision(_Record):
    """A decision says which candidate a bucket runs under. An empty `candidate` is the un-split step."""

    kind: str
    tokens: int
    requests: int
    candidate: str = ""
    reason: str = ""
    decided: bool = Field(default=True, description="This is false if the budget did not reach the bucket.")
    inferred: bool = Field(default=False, description="It was not measured, but follows a neighbour's.")
    plain_ms: float | None = Field(default=None, description="An un-split step takes so many milliseconds (median).")
    noise: float | None = Field(default=None, description="Un-split steps spread by this share of their time.")
    trials: list[Trial] = Field(default_factory=list)

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.kind, self.tokens, self.requests)

    @property
    def best(self) -> Trial | None:
        """This is the adopted trial, or else the one that came closest."""
        if adopted := [t for t in self.trials if t.candidate == self.candidate]:
            return adopted[0]
        measured = [t for t in self.trials if t.measured is not None]
        ranked = measured or [t for t in self.trials if t.predicted is not None]
        return max(ranked, key=lambda t: t.measured or t.predicted or 0.0, default=None)


class Table(_Record):
    """A table has one decision per bucket, and holds for its `key`."""

    key: dict[str, str]
    decisions: list[Decision]
    seconds: float = Field(default=0.0, description="Tuning took so long.")

    @property
    def adopted(self) -> dict[Bucket, str]:
        """This maps each bucket that is split to its adopted candidate."""
        return {d.bucket: d.candidate for d in self.decisions if d.candidate}

    def save(self, path: Path) -> None:
        """Write the table to `path`, completely or not at all."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


def read_table(path: Path, key: dict[str, str]) -> Table | None:
    """Read the table at `path`. Return None if it does not exist, cannot be read, or has another key than `key`."""
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
    """Say in words where two keys differ; return "" if they are equal. `one` and `other` name where each was found."""
    differing = [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]
    return "; ".join(f"{n}: {first.get(n)!r} {one}, {second.get(n)!r} {other}" for n in differing)


def default_path(key: dict[str, str]) -> Path:
    """Return the file for the table of `key`, below `$XDG_CACHE_HOME/dynaflow_serving/policy` or `~/.cache/...`."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_directory() / "policy" / f"{digest}.json"
