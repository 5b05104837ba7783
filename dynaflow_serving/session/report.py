"""What one worker did, as it crosses processes.

Contract
- Plain data: `model_dump(mode="json")` on one side, `WorkerReport.model_validate` on the other.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class _Report(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StepReport(_Report):
    split: int = Field(default=0, description="steps that ran as micro-batches")
    unsplit: dict[str, int] = Field(default={}, description="reason -> steps that ran whole")


class ProgramReport(_Report):
    program: str = Field(description="text of the Program")
    plans: list[str] = Field(description="texts of its Plans, un-split first")


class WorkerReport(_Report):
    strategy: str
    mode: str = Field(description="how the engine compiles")
    steps: StepReport = StepReport()
    plan_hash: str = Field(
        default="", description="digest of the newest plan with micro-batches; empty if there is none"
    )
    executors: list[dict[str, Any]] = []
    programs: list[ProgramReport] = []
    policy: dict[str, Any] | None = Field(default=None, description="the policy's table, where it decides")
    timelines: list[dict[str, Any]] = Field(default=[], description="of the latest traced step, one per graph")
