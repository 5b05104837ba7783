"""Where the tokens are in every value, and whether the graph treats them independently.

Contract
- A dimension whose size is the token symbol is the token axis, and so is one of size k * tokens where the k
  rows of a token are adjacent (`rows`), as after a reshape; where they are not (two copies of the batch, one
  after the other), and where tokens are numbered to address each one's own data, a value is local to its
  micro-batch. Any other dependence on the symbol, two token axes, or a result without a token axis
  that was computed from tokens, means the graph mixes tokens and must not be split.
- Operators that keep the shape but mix along the axis (softmax, cumsum, attention, flip ...) are known by
  name; so are reshapes across the axis, and arithmetic with the number of tokens. An operator that is
  opaque (a custom kernel) is trusted to treat tokens independently.
- The reason names the node: `reason` is what `Program.unsplittable` reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from dynaflow_serving.capture.fx.matching import region_of
from dynaflow_serving.capture.fx.rows import RESHAPES, Rows
from dynaflow_serving.capture.fx.symbols import expression, fake_value
from dynaflow_serving.core.program import Scope, Value
from dynaflow_serving.strategy.rules import CALLS, function_names

# Operators that keep the shape but mix along a dimension: name -> (position of that argument, default; None: all).
_MIXES_ALONG_DIM: dict[str, tuple[int, int | None]] = {
    "softmax": (1, -1), "_softmax": (1, -1), "log_softmax": (1, -1), "_log_softmax": (1, -1), "softmin": (1, -1),
    "glu": (1, -1), "cumsum": (1, 0), "cumprod": (1, 0), "cummax": (1, 0), "cummin": (1, 0), "logcumsumexp": (1, 0),
    "sort": (1, -1), "argsort": (1, -1), "msort": (9, 0), "topk": (2, -1), "flip": (1, None), "fliplr": (9, 1),
    "flipud": (9, 0), "roll": (2, None), "index_select": (1, 0), "gather": (1, 0), "take_along_dim": (2, None),
    "scatter": (1, 0), "scatter_add": (1, 0), "scatter_reduce": (1, 0), "index_add": (1, 0), "index_copy": (1, 0),
    "index_fill": (1, 0), "renorm": (2, None), "fft_fft": (2, -1), "fft_ifft": (2, -1), "normalize": (2, 1),
}  # fmt: skip
_MIXES_LAST = {"triu": 2, "tril": 2, "scaled_dot_product_attention": 2}  # in the last so many dimensions
_MIXES_FROM = {  # from this dimension on
    "group_norm": 1, "instance_norm": 1, "conv1d": 2, "conv2d": 2, "conv3d": 2, "convolution": 2, "interpolate": 2,
    "avg_pool1d": 2, "avg_pool2d": 2, "max_pool1d": 2, "max_pool2d": 2,
}  # fmt: skip
_ARITHMETIC = {
    "add", "sub", "mul", "div", "truediv", "floordiv", "pow", "rsub", "iadd", "isub", "imul", "itruediv", "__truediv__",
}  # fmt: skip
_POSITIONS = ("arange", "linspace")
_BATCH_STATISTICS = ("batch_norm", "_native_batch_norm_legit", "native_batch_norm")


class Axes:
    """Scope and axis of values, for the token symbols `tokens` (several may stand for one count)."""

    def __init__(self, tokens: Set[Any], rows: Mapping[str, int] | None = None) -> None:
        """`rows`: see `Rows`."""
        self.tokens = tokens
        self.reason = ""
        self.rows = Rows(tokens, rows)

    def value(self, name: str, fake: Any, storage: str = "", derived: bool = True, node: str = "") -> Value:
        """Describe one value; `derived` says whether it was computed from tokens, `node` is its node's name."""
        if isinstance(fake, torch.SymInt):
            if rows := self.rows.per_token(fake):
                return Value(name, Scope.TOKENS, rows=rows)
            return Value(name, Scope.LOCAL if self._free(expression(fake)) else Scope.SHARED)
        if not isinstance(fake, torch.Tensor):
            return Value(name, Scope.LOCAL if derived else Scope.SHARED)
        dims = [d for d, size in enumerate(fake.shape) if self._free(expression(size))]
        if len(dims) == 1 and node not in self.rows.numbers:
            rows = self.rows.per_token(fake.shape[dims[0]])
            if rows == 1 or (rows and rows == self.rows.adjacent.get(node)):
                return Value(name, Scope.BATCH, dims[0], rows, storage)
        return Value(name, Scope.LOCAL if dims or derived else Scope.SHARED, storage=storage)

    def check_graph(self, graph: fx.GraphModule) -> None:
        """`check` every node of `graph`."""
        derived: set[fx.Node] = set()
        for n in graph.graph.nodes:
            if n.op == "placeholder":
                fake = fake_value(n)
                sizes = fake.shape if isinstance(fake, torch.Tensor) else ()
                if any(expression(s).free_symbols & self.tokens for s in sizes):
                    derived.add(n)
            elif any(a in derived for a in n.all_input_nodes):
                self.check(n, derived=True)
                if not isinstance(fake_value(n), torch.SymInt | int):
                    derived.add(n)
            else:
                self.check(n, derived=False)

    def check(self, node: fx.Node, derived: bool) -> None:
        """Note in `reason` if `node` mixes tokens. Opaque regions with a context answer for themselves."""
        fake = fake_value(node)
        if self.reason or node.op not in CALLS or (region_of(node) or {}).get("context"):
            return
        for item in fake if isinstance(fake, tuple | list) else [fake]:
            if isinstance(item, torch.Tensor):
                self._check_shape(node, item, derived)
        names = {n if n.startswith("__") else n.rstrip("_") for n in function_names(node)}
        self.rows.follow(node, names)
        self._check_dims(node, names)
        if names & RESHAPES:
            self._check_reshape(node, fake)
        if names & _ARITHMETIC and isinstance(fake, torch.Tensor) and any(map(self._counts, node.args)):
            self.reason = f"{node.name} ({_target(node)}) computes with the number of tokens"
        if names & {*_BATCH_STATISTICS} and derived:
            self.reason = f"{node.name} computes statistics over the batch"
        if names & {*_POSITIONS} and self.rows.has_axis(fake) and not self.rows.address_own(node):
            self.reason = f"{node.name} numbers the tokens of the batch"
        if {"getitem", "index"} & names and len(node.args) > 1 and self._indexes_axis(node):
            self.reason = f"{node.name} picks tokens by a tensor index"

    def _check_shape(self, node: fx.Node, fake: torch.Tensor, derived: bool) -> None:
        sizes = [e for e in map(expression, fake.shape) if self._free(e)]
        if derived and not sizes:
            self.reason = f"{node.name} ({_target(node)}) reduces or contracts over the token axis"
        elif len(sizes) > 1:
            self.reason = f"{node.name} ({_target(node)}) relates tokens to tokens: shape {tuple(fake.shape)}"
        elif sizes and not any((sizes[0] / t).is_integer for t in self.tokens):
            self.reason = f"{node.name} ({_target(node)}) has {sizes[0]} rows, not a multiple of the tokens"

    def _check_dims(self, node: fx.Node, names: Set[str]) -> None:
        source = fake_value(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if not isinstance(source, torch.Tensor) or not self.rows.has_axis(source):
            return
        rank = source.dim()
        dims: list[int] = []
        for name in names & _MIXES_ALONG_DIM.keys():
            position, default = _MIXES_ALONG_DIM[name]
            given: Any = node.kwargs.get("dim", node.kwargs.get("dims", node.args[position : position + 1] or default))
            if name == "flip" and len(node.args) > 1:
                given = node.args[1:]
            flat = pytree.tree_leaves(given)
            dims += range(rank) if flat in ([], [None]) else [d for d in flat if isinstance(d, int)]
        for name in names & _MIXES_LAST.keys():
            dims += range(max(0, rank - _MIXES_LAST[name]), rank)
        for name in names & _MIXES_FROM.keys():
            dims += range(_MIXES_FROM[name], rank)
        if names & {"layer_norm", "rms_norm"} and len(node.args) > 1:
            dims += range(rank - len(pytree.tree_leaves(node.args[1])), rank)
        if any(self._free(expression(source.shape[d])) for d in dims if -rank <= d < rank):
            self.reason = f"{node.name} ({_target(node)}) mixes tokens along the token axis"

    def _check_reshape(self, node: fx.Node, fake: Any) -> None:
        """A reshape keeps tokens apart if as many elements lie outside the token axis before as after."""
        source = fake_value(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if isinstance(source, torch.Tensor) and isinstance(fake, torch.Tensor):
            outside = {self.rows.outside(t) for t in (source, fake) if self.rows.has_axis(t)}
            untiles = {n.name for n in node.all_input_nodes} & self.rows.tiled and node.name not in self.rows.tiled
            if len(outside) > 1 or untiles:
                self.reason = f"{node.name} ({_target(node)}) reshapes across the token axis"

    def _counts(self, argument: Any) -> bool:
        fake = fake_value(argument) if isinstance(argument, fx.Node) else None
        return isinstance(fake, torch.SymInt | torch.SymFloat) and self._free(fake.node.expr)

    def _indexes_axis(self, node: fx.Node) -> bool:
        source = fake_value(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        index = node.args[1]
        indices = index if isinstance(index, tuple | list) else (index,)
        if not isinstance(source, torch.Tensor):
            return False
        for d, i in enumerate(indices[: source.dim()]):
            by_tensor = isinstance(i, fx.Node) and isinstance(fake_value(i), torch.Tensor)
            if by_tensor and i.name not in self.rows.numbers and self._free(expression(source.shape[d])):
                return True
        return False

    def _free(self, expr: Any) -> bool:
        return bool(expr.free_symbols & self.tokens)


def _target(node: fx.Node) -> str:
    return max(function_names(node), key=len, default=str(node.target))


def derived_nodes(graph: fx.GraphModule, given: list[bool]) -> set[fx.Node]:
    """The nodes of a piece that follow from its placeholders where `given`."""
    holders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    derived = {p for p, yes in zip(holders, given, strict=True) if yes}
    for n in graph.graph.nodes:
        if any(a in derived for a in n.all_input_nodes):
            derived.add(n)
    return derived
