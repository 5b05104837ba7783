"""What a run uses when it is not told: the strategy, and the settings that depend on the device."""

from __future__ import annotations

from pathlib import Path

from dynaflow_serving.bench.environment import has_gpu

DEFAULT_CONFIG = Path(__file__).with_name("default.yaml")


def default_dtype() -> str:
    """float32 on a CPU, because ties of bfloat16 flip there; the model's own on a GPU."""
    return "auto" if has_gpu() else "float32"


def default_compiled() -> bool:
    """Compiled on a GPU, as the engine serves; not on a CPU, where it only takes long to start."""
    return has_gpu()
