"""The physical limits of this device, measured in the same run, and the least time that some work can take.

Contract
- The bandwidth is that of a copy of a buffer far larger than the caches, with reads and writes counted. The rate is
  that of one large square matrix product. Both are medians.
- A limit counts weights and cached keys and values once and no activations, so it is a lower bound, never an estimate.
- The code is unmeasured on a GPU: its tests run on a CPU with a fake timer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.timing import Timer, time_in_turn


@dataclass(frozen=True)
class Work:
    """The operations and the bytes of memory that one operator, or several of a kind, cannot do without."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Limits:
    """The most that a device can do."""

    bytes_per_s: float
    flops_per_s: float

    def milliseconds(self, work: Sequence[Work], overlapped: bool) -> float:
        """Return the least time of all work.

        Args:
            work: The operators.
            overlapped: Whether memory and arithmetic run at once, or each operator at its own limit one after another.
        """
        flops, transfer = [w.flops / self.flops_per_s for w in work], [w.bytes / self.bytes_per_s for w in work]
        seconds = max(sum(flops), sum(transfer)) if overlapped else sum(map(max, flops, transfer))
        return 1e3 * seconds


def measure(timer: Timer, seconds: float, device: str, dtype: torch.dtype, side: int = 8192, mib: int = 1024) -> Limits:
    """Measure the limits.

    Args:
        timer: Measures the calls.
        seconds: The time for it.
        device: The device.
        dtype: The dtype of the product.
        side: The side of the square matrices.
        mib: The size of the buffer that is copied.

    Raises:
        RuntimeError: One of the two cannot run.
    """
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(mib << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    measured = time_in_turn({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, timer, seconds)
    if measured.failed:
        raise RuntimeError(f"the device's limits cannot be measured: {measured.failed}")
    matmul, copy = (sorted(s)[len(s) // 2] / 1e3 for s in measured.samples.values())
    return Limits(2 * source.numel() / copy, 2 * side**3 / matmul)
