"""The defaults of a benchmark: the settings that depend on the device.

Contract
- A default is stated in the output of the command that uses it.
"""

from __future__ import annotations

from dynaflow_serving.bench.environment import has_gpu


def default_dtype() -> str:
    """Return float32 on a CPU, because ties of bfloat16 flip there, and the model's own dtype on a GPU."""
    return "auto" if has_gpu() else "float32"


def default_compiled() -> bool:
    """Whether engines compile: on a GPU, as they serve there, and not on a CPU, where it only takes long to start."""
    return has_gpu()
