"""In shadow mode a sampled split step also runs un-split, and the outputs are compared.

Contract
- The number of split steps decides which steps are compared, so all ranks compare the same ones. They exchange the
  result in one small collective, so all stop alike.
- A tensor's difference is the greatest absolute difference over the greatest magnitude of the un-split output. NaN on
  one side only is a difference.
- The tolerance is the config's, or else depends on the dtype (`TOLERANCES`).
- A mismatch stops the strategy for good: steps run un-split, and are counted with the reason.
- A mismatch also writes a reproducer with plan, program, options, batch, inputs and both outputs. `dynaflow check FILE`
  shows its content.
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
# Kernels tile differently for another number of rows, and so sum in another order.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 5e-2, torch.float16: 5e-2}

logger = logging.getLogger("dynaflow_serving")


@dataclass(frozen=True)
class Difference:
    """One output differs by more than is allowed.

    Attributes:
        output: The place of the tensor among the outputs.
        relative: The relative difference; infinite for another shape, or for NaN on one side.
        allowed: The tolerance.
    """

    output: int
    relative: float
    allowed: float

    def __str__(self) -> str:
        return f"output {self.output} differs by {self.relative:.3g} of its greatest value (allowed: {self.allowed:g})"


class Shadow(Observer):
    """This observer samples split steps, compares them, and vetoes further splits after a mismatch.

    Attributes:
        ranks: The ranks that stop alike; they are set once the ranks can talk to one another.
        comparisons: The number of comparisons so far.
        stopped: The reason why the strategy is stopped, or "".
    """

    def __init__(self, options: ShadowOptions, rank: int) -> None:
        """Sample by `options`; `rank` names the files of this worker."""
        self.options, self.rank = options, rank
        self.ranks = Ranks()
        self.comparisons = 0
        self.stopped = ""

    def veto(self) -> str:
        return self.stopped

    def decided(self, step: Step) -> None:
        if step.number and (step.number - 1) % self.options.every == 0:
            step.to_compare = True

    def compare(self, split: Any, whole: Any, describe: Callable[[], Mapping[str, Any]]) -> bool:
        """Return whether the outputs are equal on all ranks, and stop the strategy if they are not.

        Args:
            split: The outputs of the split run, a pytree of tensors.
            whole: The outputs of the un-split run, a pytree of tensors.
            describe: This returns the facts about the step that the reproducer holds.
        """
        self.comparisons += 1
        found = difference(tensors(split), tensors(whole), self.options.tolerance)
        (differs,) = self.ranks.greatest([float(found is not None)])
        if not differs:
            return True
        facts = describe()
        path = self._write_reproducer(split, whole, found, facts)
        self.stopped = "shadow mode: outputs differed from un-split ones"
        logger.error(
            "DynaFlow: strategy %s is STOPPED: a split step's outputs differ from the un-split ones: %s. Reproducer: "
            "%s (dynaflow check shows it)", facts.get("strategy"), found or "on another rank", path,
        )  # fmt: skip
        return False

    def _write_reproducer(self, split: Any, whole: Any, found: Difference | None, facts: Mapping[str, Any]) -> Path:
        folder = Path(self.options.folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"mismatch-step{facts.get('step', 0)}-rank{self.rank}.pt"
        content = {
            "format": FORMAT,
            **facts,
            "difference": str(found or "on another rank"),
            "split": _plain(split),
            "whole": _plain(whole),
        }
        torch.save(content, path)
        return path


def tensors(outputs: Any) -> list[torch.Tensor]:
    """Return the tensors in the pytree `outputs`, in order."""
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]


def difference(
    split: Sequence[torch.Tensor], whole: Sequence[torch.Tensor], tolerance: float | None
) -> Difference | None:
    """Return the first tensor that differs by more than is allowed, or None. `tolerance` None is that of the dtype."""
    for i, (a, b) in enumerate(zip(split, whole, strict=True)):
        allowed = TOLERANCES.get(b.dtype, 0.0) if tolerance is None else tolerance
        relative = relative_difference(a, b)
        if relative > allowed:
            return Difference(i, relative, allowed)
    return None


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


def _plain(outputs: Any) -> list[torch.Tensor]:
    """Return the outputs in a form that `torch.load(weights_only=True)` takes."""
    return [t.detach().cpu().clone() for t in tensors(outputs)]
