"""`load_reproducer` reads the file that the check wrote when values differed (`dynaflow check FILE.pt`).

Contract
- A file is loaded as data only (`weights_only`), so nothing in it is run. Any other file is a `ConfigError`.
- A row is an index on an output's token axis. The program tells this axis, or that there is none (a sum over tokens),
  where its outputs match those in the file. Otherwise it is the first axis that is as long as the batch.
- Without a token axis, rows are not attributed to micro-batches.
"""

from __future__ import annotations

import json
import pickle
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch

from dynaflow_serving.core.parse import parse_plan, parse_program
from dynaflow_serving.core.plan import ActionKind, Plan
from dynaflow_serving.core.program import Program, Scope
from dynaflow_serving.errors import ConfigError, TextError
from dynaflow_serving.session.check import FORMAT
from dynaflow_serving.session.difference import relative_difference

NEEDED = (
    "step", "strategy", "options", "tokens", "bounds", "programs", "plans", "difference", "operator", "split", "whole",
)  # fmt: skip
WORST = 5


@dataclass(frozen=True)
class Row:
    """One row of an output differs.

    Attributes:
        output: The place of the tensor among the outputs.
        row: The index on the token axis.
        micro_batch: The micro-batch of the row, or None if it is unknown.
        request: The request of the row, or None if it is unknown.
        apart: The greatest absolute difference in the row.
        split: The value of the split run where the difference is greatest.
        whole: The value of the un-split run in the same place.
    """

    output: int
    row: int
    micro_batch: int | None
    request: int | None
    apart: float
    split: float
    whole: float

    @property
    def cells(self) -> tuple[str, ...]:
        """These are the fields as text, for a table."""
        where = (str(i) if i is not None else "unknown" for i in (self.micro_batch, self.request))
        return (str(self.output), str(self.row), *where, *(f"{x:.6g}" for x in (self.apart, self.split, self.whole)))


@dataclass(frozen=True)
class Output:
    """One output tensor is given as the split run and as the un-split run made it.

    Attributes:
        index: The place of the tensor among the outputs.
        split: The tensor of the split run.
        whole: The tensor of the un-split run.
        axis: The token axis, or None if it is unknown.
        rows: The number of rows per token.
        bounds: The token offsets of the micro-batches.
        requests: The token offsets of the requests.
    """

    index: int
    split: torch.Tensor
    whole: torch.Tensor
    axis: int | None
    rows: int
    bounds: tuple[int, ...]
    requests: tuple[int, ...]

    @property
    def comparable(self) -> bool:
        """This says whether both tensors have the same shape."""
        return self.split.shape == self.whole.shape

    @cached_property
    def apart(self) -> torch.Tensor:
        """The absolute differences, [rows, rest], are infinite where one side alone is NaN or infinite."""
        a, b = (self._by_row(t) for t in (self.split, self.whole))
        same = (a == b) | (a.isnan() & b.isnan())
        return torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=float("inf"), posinf=float("inf")))

    def _by_row(self, tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.to(torch.float64)
        return (wide.movedim(self.axis or 0, 0) if wide.dim() else wide.reshape(1)).unsqueeze(-1).flatten(1)

    @cached_property
    def differing(self) -> list[int]:
        """These rows have any difference."""
        found: list[int] = self.apart.any(1).nonzero().flatten().tolist() if self.apart.numel() else []
        return found

    def micro_batch(self, row: int) -> int | None:
        """Return the micro-batch of `row`, or None if the token axis is unknown."""
        return None if self.axis is None else bisect_right(self.bounds, row // self.rows) - 1

    def row(self, row: int) -> Row:
        """Describe `row` by its greatest difference."""
        at = int(self.apart[row].argmax())
        request = None if self.axis is None else bisect_right(self.requests, row // self.rows) - 1
        values = (float(self._by_row(t)[row, at]) for t in (self.split, self.whole))
        return Row(self.index, row, self.micro_batch(row), request, float(self.apart[row, at]), *values)

    @property
    def cells(self) -> tuple[str, ...]:
        """This is the comparison as text, for a table."""
        kind = (str(self.index), str(list(self.whole.shape)), str(self.whole.dtype).removeprefix("torch."))
        if not self.comparable:
            return (*kind, f"split has {list(self.split.shape)}", "-", "-", "-")
        greatest = float(self.apart.max()) if self.apart.numel() else 0.0
        parts = sorted({m for m in map(self.micro_batch, self.differing) if m is not None})
        where = ", ".join(map(str, parts)) if self.axis is not None else "unknown"
        differ = f"{len(self.differing)} of {len(self.apart)}"
        return (*kind, f"{greatest:.6g}", f"{relative_difference(self.split, self.whole):.3g}", differ, where or "none")


@dataclass(frozen=True)
class Reproducer:
    """A reproducer holds the content of a file, with the programs and plans parsed."""

    content: dict[str, Any]
    plans: tuple[tuple[Program, Plan], ...]

    @property
    def difference(self) -> str:
        """The check reported this difference."""
        return str(self.content["difference"])

    @property
    def facts(self) -> dict[str, str]:
        """These facts about the step are in words, by name."""
        c = self.content
        bounds = c["bounds"]
        parts = (f"{i}: tokens {a}..{b - 1} ({b - a})" for i, (a, b) in enumerate(pairwise(bounds)))
        found = {
            "strategy": str(c["strategy"]),
            "options": json.dumps(c["options"]),
            "split step": str(c["step"]),
            "first operator that differs": c["operator"],
            "torch": str(c.get("torch", "unknown")),
            "batch": f"{len(c['tokens'])} requests, {sum(c['tokens'])} new tokens: {_short(c['tokens'])}",
            "micro-batches": "; ".join(parts),
        }
        if c.get("context"):
            found["context"] = _short(c["context"])
        return found

    @cached_property
    def outputs(self) -> list[Output]:
        """These are the outputs of both runs, with their token axes."""
        c = self.content
        found = []
        places = self._token_axes(len(c["whole"]))
        requests = (0, *accumulate(c["tokens"]))
        for i, (split, whole) in enumerate(zip(c["split"], c["whole"])):
            axis, rows = places[i] or _guessed(whole, c["bounds"][-1])
            if axis is not None and (axis >= whole.dim() or whole.shape[axis] != rows * c["bounds"][-1]):
                axis, rows = _guessed(whole, c["bounds"][-1])
            found.append(Output(i, split, whole, axis, rows, tuple(c["bounds"]), requests))
        return found

    def worst_rows(self) -> list[Row]:
        """Return the rows with the greatest differences, over all outputs."""
        rows = [row for output in self.outputs if output.comparable for row in _worst(output)]
        return sorted(rows, key=lambda r: -r.apart)[:WORST]

    @property
    def kernels(self) -> dict[str, str]:
        """This maps each replacement kernel to the operators that it replaces, in words."""
        found: dict[str, list[str]] = {}
        for _, plan in self.plans:
            for action in plan.actions:
                if action.kind is ActionKind.REPLACE:
                    found.setdefault(action.kernel, []).append(" + ".join(action.operators))
        return {kernel: _short(list(dict.fromkeys(names))) for kernel, names in found.items()}

    def _token_axes(self, outputs: int) -> list[tuple[int | None, int] | None]:
        """Return (token axis, rows per token) of each output, or None where no program tells it."""
        if len(self.plans) == 1 and len(self.plans[0][0].outputs) == outputs:
            program = self.plans[0][0]
            values = [program.values[name] for name in program.outputs]
            known = (Scope.BATCH, Scope.PARTIAL)  # a sum has no token axis, whatever its shape is
            return [(v.axis, v.rows) if v.scope in known else None for v in values]
        return [None] * outputs


def load_reproducer(path: Path) -> Reproducer:
    """Read the reproducer at `path`.

    Raises:
        ConfigError: The file is not a reproducer, or it is incomplete.
        TextError: A program or a plan in it cannot be parsed.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as e:
        raise ConfigError(f"{path} is not a reproducer: it cannot be loaded ({_first_line(e)})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(
            f"{path} is not a reproducer: such a file has format {FORMAT!r} and is written to the folder of the "
            "config's 'check' when a split step differs from an un-split one"
        )
    if missing := [key for key in NEEDED if key not in content]:
        raise ConfigError(f"{path} is an incomplete reproducer: it lacks {', '.join(missing)}")
    try:
        plans = zip(content["programs"], content["plans"], strict=True)
        return Reproducer(content, tuple((parse_program(a), parse_plan(b)) for a, b in plans))
    except (TextError, ValueError) as e:
        raise TextError(f"{path}: {e}") from None


def _worst(output: Output) -> Iterator[Row]:
    """Yield the rows of `output` that differ most."""
    if not output.apart.numel():
        return
    per_row = output.apart.max(1).values
    for row in per_row.argsort(descending=True, stable=True)[:WORST].tolist():
        if per_row[row] > 0:
            yield output.row(row)


def _guessed(tensor: torch.Tensor, tokens: int) -> tuple[int | None, int]:
    """Return the first axis that is as long as the batch, or None, and one row per token."""
    axes = [axis for axis, size in enumerate(tensor.shape) if size == tokens]
    return (axes[0], 1) if axes else (None, 1)


def _short(values: list[Any]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return shown if len(values) <= 8 else f"{shown}, ... ({len(values)} in all)"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
