"""A `WorkerReport` tells another process what a worker has done.

Contract
- A report is plain data: one side calls `model_dump(mode="json")`, the other `WorkerReport.model_validate`.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class _Report(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StepReport(_Report):
    """A worker has run so many steps."""

    split: int = Field(default=0, description="So many steps ran as micro-batches.")
    unsplit: dict[str, int] = Field(default={}, description="So many steps ran whole, by reason.")


class ProgramReport(_Report):
    """A captured program has these plans."""

    program: str = Field(description="This is the text of the Program.")
    plans: list[str] = Field(description="These are the texts of its Plans. The un-split ones come first.")


class WorkerReport(_Report):
    """A worker tells `dynaflow bench` and `dynaflow explain` what it has done."""

    strategy: str
    mode: str = Field(description="This says how the engine compiles.")
    steps: StepReport = StepReport()
    plan_hash: str = Field(
        default="", description="This is the digest of the newest plan with micro-batches, or empty."
    )
    executors: list[dict[str, Any]] = []
    programs: list[ProgramReport] = []
    policy: dict[str, Any] | None = Field(default=None, description="This is the policy's table, where there is one.")
    timelines: list[dict[str, Any]] = Field(
        default=[], description="These belong to the latest traced step, one per graph."
    )
