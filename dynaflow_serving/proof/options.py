"""The parts of the YAML config about proof."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class TraceOptions(BaseModel):
    """Traces of real split steps, for chrome://tracing or Perfetto."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str = Field(description="where the traces go; made if need be")
    every: int = Field(100, ge=1, description="one split step in so many is traced")
    limit: int = Field(20, ge=1, description="how many traces are written at most, per rank")


class ShadowOptions(BaseModel):
    """Split steps that are also run un-split, and compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int = Field(100, ge=1, description="one split step in so many is compared")
    tolerance: float | None = Field(
        None,
        ge=0,
        description="greatest difference, relative to the greatest magnitude of the un-split output; 0: bit for bit; "
        "default: by dtype (float32 1e-4, bfloat16 and float16 5e-2), because kernels sum in another order for another "
        "number of rows",
    )
    folder: str = Field("dynaflow-mismatch", description="where a reproducer goes when outputs differ")
