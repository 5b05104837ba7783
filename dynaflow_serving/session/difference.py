"""What counts as a difference between the values of a split run and those of an un-split one.

Contract
- A tensor's difference is the greatest absolute difference over the greatest magnitude of the un-split value. NaN on
  one side only is a difference.
- The tolerance is the config's, or else depends on the dtype (`TOLERANCES`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

# Kernels tile differently for another number of rows, and so sum in another order.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 5e-2, torch.float16: 5e-2}


@dataclass(frozen=True)
class Difference:
    """One value differs by more than is allowed.

    Attributes:
        what: The value in words, such as "output 0".
        relative: The relative difference; infinite for another shape, or for NaN on one side.
        allowed: The tolerance.
    """

    what: str
    relative: float
    allowed: float

    def __str__(self) -> str:
        return f"{self.what} differs by {self.relative:.3g} of its greatest value (allowed: {self.allowed:g})"


def tensors(outputs: Any) -> list[torch.Tensor]:
    """Return the tensors in the pytree `outputs`, in order; of a DTensor, this rank's shard."""
    return [local(t) for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]


def local(tensor: Any) -> Any:
    """Return this rank's shard of a DTensor, whose comparison would communicate, and any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def difference(
    split: Sequence[torch.Tensor], whole: Sequence[torch.Tensor], tolerance: float | None, names: Sequence[str] = ()
) -> Difference | None:
    """Return the first tensor that differs by more than is allowed, or None.

    Args:
        split: The tensors of the split run.
        whole: The tensors of the un-split run.
        tolerance: The relative difference that is allowed; None for that of the dtype.
        names: The last tensors have these names in words. The others are the outputs.
    """
    outputs = [f"output {i}" for i in range(len(whole) - len(names))]
    for what, a, b in zip((*outputs, *names), split, whole, strict=True):
        allowed = tolerance_of(b, tolerance)
        relative = relative_difference(a, b)
        if relative > allowed:
            return Difference(what, relative, allowed)
    return None


def tolerance_of(tensor: torch.Tensor, tolerance: float | None) -> float:
    """Return `tolerance`, or that of the tensor's dtype for None."""
    return TOLERANCES.get(tensor.dtype, 0.0) if tolerance is None else tolerance


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the greatest absolute difference over the greatest magnitude of `b`.

    It is infinite for another shape or dtype, for NaN on one side only, and where `b` alone is all zero.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(a, b):
        return 0.0
    wide = torch.float64 if a.dtype is torch.float64 else torch.float32
    a, b = a.detach().to(wide), b.detach().to(wide)
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    apart = (a - b).nan_to_num(0.0).abs().max()
    greatest = b.nan_to_num(0.0).abs().max()
    return float(apart / greatest) if greatest > 0 else float("inf")
