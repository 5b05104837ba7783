"""Shadow mode: a sampled split step also runs un-split, and the outputs are compared.

Contract
- Which steps are compared follows from the number of split steps, so that all ranks compare the same ones; whether
  they differ is one small collective, so that all stop alike.
- The difference is the greatest absolute one over the greatest magnitude of the un-split output, per tensor; NaN on one
  side only is a difference. The tolerance is the config's, else by dtype (`TOLERANCES`).
- On a mismatch the strategy is stopped for good (steps run un-split, counted with the reason), and a reproducer is
  written: plan, program, config, batch, inputs and both outputs. `dynaflow check FILE` says what it holds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from dynaflow_serving.config import ShadowOptions
from dynaflow_serving.session.observers import Observer
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.step import Step

FORMAT = "dynaflow_serving reproducer 1"
# Kernels tile, and so sum, in another order for another number of rows.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 5e-2, torch.float16: 5e-2}

logger = logging.getLogger("dynaflow_serving")


@dataclass(frozen=True)
class Difference:
    output: int  # place of the tensor among the outputs
    relative: float  # inf: another shape, or NaN on one side
    allowed: float

    def __str__(self) -> str:
        return f"output {self.output} differs by {self.relative:.3g} of its greatest value (allowed: {self.allowed:g})"


class Shadow(Observer):
    """`ranks`: set once the ranks can talk to one another."""

    def __init__(self, options: ShadowOptions, rank: int) -> None:
        self.options, self.rank = options, rank
        self.ranks = Ranks()
        self.comparisons = 0
        self.stopped = ""  # the reason, once outputs have differed

    def veto(self) -> str:
        return self.stopped

    def decided(self, step: Step) -> None:
        if step.number and (step.number - 1) % self.options.every == 0:
            step.to_compare = True

    def compare(self, split: Any, whole: Any, describe: Callable[[], Mapping[str, Any]]) -> bool:
        """Whether the outputs are equal on all ranks; if not, the strategy is stopped.

        Args:
            split, whole: outputs, as pytrees of tensors.
            describe: what the reproducer says of the step.
        """
        self.comparisons += 1
        found = difference(tensors(split), tensors(whole), self.options.tolerance)
        (differs,) = self.ranks.greatest([float(found is not None)])
        if not differs:
            return True
        what = describe()
        path = self._dump(split, whole, found, what)
        self.stopped = "shadow mode: outputs differed from un-split ones"
        logger.error(
            "DynaFlow: strategy %s is STOPPED: a split step's outputs differ from the un-split ones: %s. Reproducer: "
            "%s (dynaflow check shows it)", what.get("strategy"), found or "on another rank", path,
        )  # fmt: skip
        return False

    def _dump(self, split: Any, whole: Any, found: Difference | None, what: Mapping[str, Any]) -> Path:
        folder = Path(self.options.folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"mismatch-step{what.get('step', 0)}-rank{self.rank}.pt"
        content = {
            "format": FORMAT,
            **what,
            "difference": str(found or "on another rank"),
            "split": _plain(split),
            "whole": _plain(whole),
        }
        torch.save(content, path)
        return path


def tensors(outputs: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]


def difference(
    split: Sequence[torch.Tensor], whole: Sequence[torch.Tensor], tolerance: float | None
) -> Difference | None:
    """The first tensor that differs by more than is allowed."""
    for i, (a, b) in enumerate(zip(split, whole, strict=True)):
        allowed = TOLERANCES.get(b.dtype, 0.0) if tolerance is None else tolerance
        relative = relative_difference(a, b)
        if relative > allowed:
            return Difference(i, relative, allowed)
    return None


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The greatest absolute difference over the greatest magnitude of `b`; infinite for another shape or dtype."""
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


def _plain(outputs: Any) -> list[torch.Tensor]:
    """What `torch.load(weights_only=True)` takes."""
    return [t.detach().cpu().clone() for t in tensors(outputs)]
