"""Where the tokens are in every value, and whether the graph treats them independently.

Contract
- A dimension whose size is the token symbol is the token axis; a size k * tokens is local to its
  micro-batch; any other dependence on the symbol, two token axes, or a result without a token axis
  that was computed from tokens, means the graph mixes tokens and must not be split.
- Operators that keep the shape but mix along the axis (softmax, cumsum, sort, flip ...) are known by name.
- The reason names the node: `reason` is what `Program.unsplittable` reports.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import sympy
import torch
from torch import fx

from dynaflow_serving.annotations import CALLS, function_names, region_of
from dynaflow_serving.ir import Scope, Value
from dynaflow_serving.partition.effects import fake_value

_MIXES_ALONG_DIM = {
    "softmax": -1, "_softmax": -1, "log_softmax": -1, "_log_softmax": -1, "cumsum": 0, "cumprod": 0, "sort": -1,
    "argsort": -1, "flip": 0, "roll": 0, "cummax": 0, "cummin": 0, "logcumsumexp": 0, "index_select": 0,
    "gather": 0, "topk": -1,
}  # fmt: skip
_POSITIONS = ("arange", "linspace")
_BATCH_STATISTICS = ("batch_norm", "_native_batch_norm_legit", "native_batch_norm")


def expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


class Axes:
    """Scope and axis of values, for the token symbols `tokens` (several may stand for one count)."""

    def __init__(self, tokens: Set[Any]) -> None:
        self.tokens = tokens
        self.reason = ""

    def value(self, name: str, fake: Any, storage: str = "", derived: bool = True) -> Value:
        """Describe one value; `derived` says whether it was computed from tokens."""
        if isinstance(fake, torch.SymInt):
            expr = expression(fake)
            if expr in self.tokens:
                return Value(name, Scope.TOKENS)
            return Value(name, Scope.LOCAL if self._free(expr) else Scope.SHARED)
        if not isinstance(fake, torch.Tensor):
            return Value(name, Scope.LOCAL if derived else Scope.SHARED)
        dims = [d for d, size in enumerate(fake.shape) if self._free(expression(size))]
        if len(dims) == 1 and expression(fake.shape[dims[0]]) in self.tokens:
            return Value(name, Scope.BATCH, dims[0], storage)
        return Value(name, Scope.LOCAL if dims or derived else Scope.SHARED, None, storage)

    def check(self, node: fx.Node, derived: bool) -> None:
        """Note in `reason` if `node` mixes tokens. Opaque regions with a context answer for themselves."""
        fake = fake_value(node)
        if self.reason or node.op not in CALLS or (region_of(node) or {}).get("context"):
            return
        for item in fake if isinstance(fake, tuple | list) else [fake]:
            if isinstance(item, torch.Tensor):
                self._check_shape(node, item, derived)
        names = function_names(node)
        for name, default in _MIXES_ALONG_DIM.items():
            if name in names:
                self._check_dim(node, name, default)
        if names & {*_BATCH_STATISTICS} and derived:
            self.reason = f"{node.name} computes statistics over the batch"
        if names & {*_POSITIONS} and self._has_axis(fake):
            self.reason = f"{node.name} numbers the tokens of the batch"
        if {"getitem", "index"} & names and len(node.args) > 1 and self._indexes_axis(node):
            self.reason = f"{node.name} picks tokens by a tensor index"

    def _check_shape(self, node: fx.Node, fake: torch.Tensor, derived: bool) -> None:
        sizes = [e for e in map(expression, fake.shape) if self._free(e)]
        if derived and not sizes:
            self.reason = f"{node.name} ({_target(node)}) reduces or contracts over the token axis"
        elif len(sizes) > 1:
            self.reason = f"{node.name} ({_target(node)}) relates tokens to tokens: shape {tuple(fake.shape)}"
        elif sizes and not any((sizes[0] / t).is_Integer for t in self.tokens):
            self.reason = f"{node.name} ({_target(node)}) has {sizes[0]} rows, not a multiple of the tokens"

    def _check_dim(self, node: fx.Node, name: str, default: int) -> None:
        source = fake_value(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if not isinstance(source, torch.Tensor) or not self._has_axis(source):
            return
        position = 2 if name in ("roll", "topk") else 1
        dim: Any = node.kwargs.get("dim", node.kwargs.get("dims", default))
        if len(node.args) > position:
            dim = node.args[position]
        dims = dim if isinstance(dim, tuple | list) else (dim,)
        if any(self._free(expression(source.shape[d])) for d in dims if isinstance(d, int)):
            self.reason = f"{node.name} ({name}) mixes tokens along the token axis"

    def _indexes_axis(self, node: fx.Node) -> bool:
        source = fake_value(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        index = node.args[1]
        indices = index if isinstance(index, tuple | list) else (index,)
        if not isinstance(source, torch.Tensor):
            return False
        for d, i in enumerate(indices[: source.dim()]):
            by_tensor = isinstance(i, fx.Node) and isinstance(fake_value(i), torch.Tensor)
            if by_tensor and self._free(expression(source.shape[d])):
                return True
        return False

    def _has_axis(self, fake: Any) -> bool:
        return isinstance(fake, torch.Tensor) and any(self._free(expression(s)) for s in fake.shape)

    def _free(self, expr: Any) -> bool:
        return bool(expr.free_symbols & self.tokens)


def _target(node: fx.Node) -> str:
    return max(function_names(node), key=len, default=str(node.target))
