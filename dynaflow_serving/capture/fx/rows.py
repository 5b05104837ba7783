"""The rows that a token has along its axis, and whether they are adjacent, so that a value can be cut and merged.

Contract
- `adjacent` holds nodes whose token axis has k * tokens rows, k > 1, where those of one token are side by side. A
  reshape of (tokens, k, ...) to (tokens * k, ...) makes such rows. A cut at a multiple of k is a cut between tokens.
- `tiled` holds nodes whose rows are known not to be adjacent (two copies of the batch, one after the other).
- `numbers` holds nodes that number the tokens only to address each token's own row, as transformers' attention masks
  do (`mask[batch_index, position]`). They mean the same in every micro-batch, and only there.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from dynaflow_serving.capture.fx.symbols import expression, fake_value
from dynaflow_serving.strategy.rules import function_names

RESHAPES = {"view", "reshape", "flatten", "unflatten", "_unsafe_view", "ravel", "view_copy"}
_KEEPS_NUMBERS = {"slice", "unsqueeze", "view", "expand", "_to_copy", "to", "alias", "getitem"}


class Rows:
    """Follows the rows of tokens through a graph."""

    def __init__(self, tokens: Set[Any], known: Mapping[str, int] | None = None) -> None:
        """Start a graph.

        Args:
            tokens: the token symbols.
            known: `adjacent` of inputs, such as the saved values of a backward graph.
        """
        self.tokens = tokens
        self.adjacent: dict[str, int] = dict(known or {})
        self.tiled: set[str] = set()
        self.numbers: set[str] = set()

    def has_axis(self, fake: Any) -> bool:
        """Whether a size of a tensor depends on the number of tokens."""
        return isinstance(fake, torch.Tensor) and any(self._depends(s) for s in fake.shape)

    def per_token(self, size: Any) -> int:
        """Return k for a size of k * tokens, and 0 for any other size."""
        ratios = [ratio for t in self.tokens if (ratio := expression(size) / t).is_Integer]
        return int(ratios[0]) if ratios else 0

    def outside(self, fake: torch.Tensor) -> Any:
        """Return the product of the sizes before the token axis."""
        sizes = list(fake.shape)
        axis = next(d for d, size in enumerate(sizes) if self._depends(size))
        return sympy.Mul(*map(expression, sizes[:axis]))

    def follow(self, node: fx.Node, names: Set[str]) -> None:
        """Note whether the rows of `node`'s result are adjacent.

        A reshape puts the rows of a token side by side. Any other operator that keeps their number keeps their order;
        `axes` refuses those that do not. An operator that multiplies their number tiles them.
        """
        fake = fake_value(node)
        inputs = {a.name: k for a in node.all_input_nodes if (k := self._rows_of(a)) > 1}
        rows = self._rows_of(node) if isinstance(fake, torch.Tensor) else max(inputs.values(), default=0)
        if rows < 2:
            return
        if inputs.keys() & self.tiled:
            self.tiled.add(node.name)
        elif names & RESHAPES and isinstance(fake, torch.Tensor):
            source = fake_value(_node(node.args[0]))
            known = inputs.keys() <= self.adjacent.keys() and self.has_axis(source)
            if known and self.outside(source) == self.outside(fake):
                self.adjacent[node.name] = rows
        elif not inputs:
            # A new buffer (torch.empty) holds no token's rows yet.
            if any(self._rows_of(a) for a in node.all_input_nodes):
                self.tiled.add(node.name)
        elif all(self.adjacent.get(name) == k == rows for name, k in inputs.items()):
            self.adjacent[node.name] = rows

    def address_own(self, node: fx.Node) -> bool:
        """Whether `node`, an arange over the tokens, is used for nothing but to index each token's own row."""
        whole = not node.kwargs.get("step") and (len(node.args) == 1 or (len(node.args) == 2 and node.args[0] == 0))
        if not whole or "arange" not in function_names(node) or self._rows_of(node) != 1:
            return False
        found, stack = {node}, [node]
        while stack:
            carrier = stack.pop()
            for user in carrier.users:
                if self._indexes_with(user, carrier) or user in found:
                    continue
                tensors = [n for n in user.all_input_nodes if isinstance(fake_value(n), torch.Tensor)]
                if not function_names(user) & _KEEPS_NUMBERS or tensors != [carrier] or self._rows_of(user) != 1:
                    return False
                found.add(user)
                stack.append(user)
        self.numbers |= {n.name for n in found}
        return True

    def _indexes_with(self, user: fx.Node, carrier: fx.Node) -> bool:
        """Whether `user` indexes a value with `carrier` at the value's token axis, and only there."""
        if not function_names(user) & {"index", "getitem"} or user.args[0] is carrier or len(user.args) < 2:
            return False
        source, index = fake_value(_node(user.args[0])), user.args[1]
        if not isinstance(source, torch.Tensor) or not isinstance(index, tuple | list):
            return False
        at = [d for d, i in enumerate(index) if i is carrier]
        return len(at) == 1 and at[0] < source.dim() and self.per_token(source.shape[at[0]]) == 1

    def _rows_of(self, node: fx.Node) -> int:
        """Return the rows per token of a tensor with one token axis, or of a tuple that `adjacent` knows; else 0."""
        fake = fake_value(node)
        if not isinstance(fake, torch.Tensor):
            return self.adjacent.get(node.name, 0)
        sizes = [s for s in fake.shape if self._depends(s)]
        return self.per_token(sizes[0]) if len(sizes) == 1 else 0

    def _depends(self, size: Any) -> bool:
        return bool(expression(size).free_symbols & self.tokens)


def _node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument
