"""A `WorkerReport` tells another process what a worker has done.

Contract
- A report is plain data: one side calls `model_dump(mode="json")`, the other `WorkerReport.model_validate`.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dynaflow_serving.session.plan_cache import PlanCache


class _Report(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StepReport(_Report):
    """A worker has run so many steps."""

    split: int = Field(default=0, description="So many steps ran as micro-batches.")
    unsplit: dict[str, int] = Field(default={}, description="So many steps ran whole, by reason.")


class CheckReport(_Report):
    """Split steps were compared with un-split ones."""

    steps: int = Field(description="So many split steps were compared.")
    seconds: float = Field(description="The un-split runs and the comparisons took so long.")
    refused: list[str] = Field(default=[], description="Values differed here, so that nothing is split any more.")

    def __str__(self) -> str:
        told = f"split steps compared with un-split ones: {self.steps}, {self.seconds:.2f} s"
        return told + (f"; REFUSED: {'; '.join(self.refused)}" if self.refused else "")


class ProgramReport(_Report):
    """A captured program has these plans."""

    program: str = Field(description="This is the text of the Program.")
    plans: list[str] = Field(description="These are the texts of its Plans. The un-split ones come first.")


class WorkerReport(_Report):
    """A worker tells `dynaflow bench` and `dynaflow explain` what it has done."""

    strategy: str
    mode: str = Field(description="This says how the engine compiles.")
    steps: StepReport = StepReport()
    check: CheckReport | None = Field(default=None, description="This is missing with `check: never`.")
    plan_hash: str = Field(
        default="", description="This is the digest of the newest plan with micro-batches, or empty."
    )
    executors: list[dict[str, Any]] = []
    programs: list[ProgramReport] = []
    policy: dict[str, Any] | None = Field(default=None, description="This is the policy's table, where there is one.")
    timelines: list[dict[str, Any]] = Field(
        default=[], description="These belong to the latest traced step, one per graph."
    )


def program_reports(plan_cache: PlanCache) -> list[ProgramReport]:
    """Report a program with its plans, and the backward passes of these."""
    forward = ProgramReport(
        program=plan_cache.captured.program.to_text(), plans=[p.to_text() for p in plan_cache.plans]
    )
    backward = list(plan_cache.backward.values())
    programs = {program.digest: program.to_text() for program, _ in backward}
    return [forward] + [
        ProgramReport(program=text, plans=[plan.to_text() for program, plan in backward if program.digest == digest])
        for digest, text in programs.items()
    ]
