"""What this device can do at most, measured in the same run, and the time below which some work cannot take.

Contract
- Bandwidth: a copy of a buffer far larger than the caches, read and write counted. Rate: one large square matrix
  product. Medians; the raw figures go into the results.
- A limit counts weights and cached keys and values once and no activations, so it is a lower bound, never an estimate.
- Unmeasured: tested on a CPU with a fake timer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.timing import Timer, time_in_turn


@dataclass(frozen=True)
class Work:
    """One operator, or several of a kind: operations and bytes of memory that it cannot do without."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Limits:
    bytes_per_s: float
    flops_per_s: float

    def milliseconds(self, work: Sequence[Work], overlapped: bool) -> float:
        """Of all `work`: each at its own limit one after the other, or (overlapped) memory and arithmetic at once."""
        flops, transfer = [w.flops / self.flops_per_s for w in work], [w.bytes / self.bytes_per_s for w in work]
        seconds = max(sum(flops), sum(transfer)) if overlapped else sum(map(max, flops, transfer))
        return 1e3 * seconds


def measure(timer: Timer, seconds: float, device: str, dtype: torch.dtype, side: int = 8192, mib: int = 1024) -> Limits:
    """side: of the square matrices. mib: size of the buffer that is copied."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(mib << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    measured = time_in_turn({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, timer, seconds)
    if measured.failed:
        raise RuntimeError(f"the device's limits cannot be measured: {measured.failed}")
    matmul, copy = (sorted(s)[len(s) // 2] / 1e3 for s in measured.samples.values())
    return Limits(2 * source.numel() / copy, 2 * side**3 / matmul)
