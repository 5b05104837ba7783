"""What diffusion systems ask of CUDA at import, answered on a machine without.

Contract
- This is for tests and benchmarks on CPUs. `install` changes torch for the whole process.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch


@functools.cache
def install() -> None:
    """Let torchvision be imported where its C library, built for CUDA, cannot be loaded; synchronise nothing."""
    for operator in ("nms", "qnms"):
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        with contextlib.suppress(RuntimeError):  # it is there
            torch.library.define(f"torchvision::{operator}", signature)
    cuda: Any = torch.cuda
    cuda.synchronize = lambda *args, **kwargs: None
