"""Where the tokens are in every value, and whether the graph treats them independently.

Contract
- A dimension whose size is the token symbol is the token axis. So is a dimension of size k * tokens where the k rows of
  a token are adjacent (`rows`), as after a reshape.
- A value is local to its micro-batch where the rows of a token are not adjacent (two copies of the batch, one after the
  other). So are numbers of the tokens that only address each token's own data.
- A graph that mixes tokens must not be split. It mixes them if a size depends on the token symbol in any other way, if
  a value has two token axes, or if a result that was computed from tokens has none.
- Operators that keep the shape but mix along the axis (softmax, cumsum, attention, flip ...) are known by name
  (`mixing`). Reshapes across the axis and arithmetic with the number of tokens are refused too.
- An opaque operator (a custom kernel) is trusted to treat tokens independently.
- `reason` names the node that mixes tokens; it becomes `Program.unsplittable`.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import fx

from dynaflow_serving.capture.fx.matching import region_of
from dynaflow_serving.capture.fx.mixing import mixed_dims
from dynaflow_serving.capture.fx.rows import RESHAPES, Rows
from dynaflow_serving.capture.fx.symbols import expression, fake_value
from dynaflow_serving.core.program import Scope, Value
from dynaflow_serving.strategy.rules import CALLS, function_names

_ARITHMETIC = {
    "add", "sub", "mul", "div", "truediv", "floordiv", "pow", "rsub", "iadd", "isub", "imul", "itruediv", "__truediv__",
}  # fmt: skip
_POSITIONS = {"arange", "linspace"}
_BATCH_STATISTICS = {"batch_norm", "_native_batch_norm_legit", "native_batch_norm"}
_INDEXING = {"getitem", "index"}


class Axes:
    """Describes values, and notes the first node that mixes tokens."""

    def __init__(self, tokens: Set[Any], rows: Mapping[str, int] | None = None) -> None:
        """Start a graph.

        Args:
            tokens: the token symbols; several may stand for one count.
            rows: inputs that are known to have several adjacent rows per token, see `Rows`.
        """
        self.tokens = tokens
        self.reason = ""
        self.rows = Rows(tokens, rows)

    def value(self, name: str, fake: Any, storage: str = "", derived: bool = True, node: str = "") -> Value:
        """Describe one value.

        Args:
            name: of the value.
            fake: its fake value.
            storage: the value whose memory it shares; "" for memory of its own.
            derived: whether it was computed from tokens.
            node: the name of its node.
        """
        if isinstance(fake, torch.SymInt):
            if rows := self.rows.per_token(fake):
                return Value(name, Scope.TOKENS, rows=rows)
            return Value(name, Scope.LOCAL if self._depends(fake) else Scope.SHARED)
        if not isinstance(fake, torch.Tensor):
            return Value(name, Scope.LOCAL if derived else Scope.SHARED)
        dims = [d for d, size in enumerate(fake.shape) if self._depends(size)]
        if len(dims) == 1 and node not in self.rows.numbers:
            rows = self.rows.per_token(fake.shape[dims[0]])
            if rows == 1 or (rows and rows == self.rows.adjacent.get(node)):
                return Value(name, Scope.BATCH, dims[0], rows, storage)
        return Value(name, Scope.LOCAL if dims or derived else Scope.SHARED, storage=storage)

    def check_graph(self, graph: fx.GraphModule) -> None:
        """Check every node of `graph`."""
        derived: set[fx.Node] = set()
        for n in graph.graph.nodes:
            if n.op == "placeholder":
                if self.rows.has_axis(fake_value(n)):
                    derived.add(n)
            elif any(a in derived for a in n.all_input_nodes):
                self.check(n, derived=True)
                if not isinstance(fake_value(n), torch.SymInt | int):
                    derived.add(n)
            else:
                self.check(n, derived=False)

    def check(self, node: fx.Node, derived: bool) -> None:
        """Note in `reason` if `node` mixes tokens. An annotated operator with context is trusted.

        Args:
            node: a node whose arguments have been checked.
            derived: whether an argument was computed from tokens.
        """
        if self.reason or node.op not in CALLS or (region_of(node) or {}).get("context"):
            return
        names = {n if n.startswith("__") else n.rstrip("_") for n in function_names(node)}
        self.rows.follow(node, names)
        problems = (
            self._index_problem(node, names),
            self._number_problem(node, names, derived),
            self._reshape_problem(node, names),
            self._dims_problem(node, names),
            self._shape_problem(node, derived),
        )
        self.reason = next(filter(None, problems), "")

    def _shape_problem(self, node: fx.Node, derived: bool) -> str:
        fake = fake_value(node)
        problem = ""
        for item in fake if isinstance(fake, tuple | list) else [fake]:
            if not isinstance(item, torch.Tensor):
                continue
            sizes = [expression(size) for size in item.shape if self._depends(size)]
            if derived and not sizes:
                problem = f"{node.name} ({_target(node)}) reduces or contracts over the token axis"
            elif len(sizes) > 1:
                problem = f"{node.name} ({_target(node)}) relates tokens to tokens: shape {tuple(item.shape)}"
            elif sizes and not any((sizes[0] / t).is_integer for t in self.tokens):
                problem = f"{node.name} ({_target(node)}) has {sizes[0]} rows, not a multiple of the tokens"
        return problem

    def _dims_problem(self, node: fx.Node, names: set[str]) -> str:
        source = _first_argument(node)
        if source is None or not any(self._depends(source.shape[d]) for d in mixed_dims(node, names, source)):
            return ""
        return f"{node.name} ({_target(node)}) mixes tokens along the token axis"

    def _reshape_problem(self, node: fx.Node, names: set[str]) -> str:
        """A reshape keeps tokens apart if as many elements lie outside the token axis before as after."""
        source, fake = _first_argument(node), fake_value(node)
        if not names & RESHAPES or source is None or not isinstance(fake, torch.Tensor):
            return ""
        outside = {self.rows.outside(t) for t in (source, fake) if self.rows.has_axis(t)}
        tiled = self.rows.tiled
        regroups = node.name not in tiled and any(n.name in tiled for n in node.all_input_nodes)
        return f"{node.name} ({_target(node)}) reshapes across the token axis" if len(outside) > 1 or regroups else ""

    def _number_problem(self, node: fx.Node, names: set[str], derived: bool) -> str:
        """Whether `node` computes with the number of tokens, or numbers them."""
        fake = fake_value(node)
        if names & _POSITIONS and self.rows.has_axis(fake) and not self.rows.address_own(node):
            return f"{node.name} numbers the tokens of the batch"
        if names & _BATCH_STATISTICS and derived:
            return f"{node.name} computes statistics over the batch"
        if names & _ARITHMETIC and isinstance(fake, torch.Tensor) and any(map(self._is_count, node.args)):
            return f"{node.name} ({_target(node)}) computes with the number of tokens"
        return ""

    def _is_count(self, argument: Any) -> bool:
        fake = fake_value(argument) if isinstance(argument, fx.Node) else None
        return isinstance(fake, torch.SymInt | torch.SymFloat) and bool(fake.node.expr.free_symbols & self.tokens)

    def _index_problem(self, node: fx.Node, names: set[str]) -> str:
        source = _first_argument(node)
        if not names & _INDEXING or source is None or len(node.args) < 2:
            return ""
        index = node.args[1]
        indices = index if isinstance(index, tuple | list) else (index,)
        for size, i in zip(source.shape, indices):
            by_tensor = isinstance(i, fx.Node) and isinstance(fake_value(i), torch.Tensor)
            if by_tensor and i.name not in self.rows.numbers and self._depends(size):
                return f"{node.name} picks tokens by a tensor index"
        return ""

    def _depends(self, size: Any) -> bool:
        return bool(expression(size).free_symbols & self.tokens)


def _first_argument(node: fx.Node) -> torch.Tensor | None:
    """Return the fake value of the first argument, if that is a tensor."""
    fake = fake_value(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    return fake if isinstance(fake, torch.Tensor) else None


def _target(node: fx.Node) -> str:
    return max(function_names(node), key=len, default=str(node.target))


def derived_nodes(graph: fx.GraphModule, given: list[bool]) -> set[fx.Node]:
    """Return the nodes of a piece that are computed from the placeholders for which `given` is true."""
    holders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    derived = {p for p, yes in zip(holders, given, strict=True) if yes}
    for n in graph.graph.nodes:
        if any(a in derived for a in n.all_input_nodes):
            derived.add(n)
    return derived
