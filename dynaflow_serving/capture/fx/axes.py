"""Where the tokens are in every value of a graph, and whether the graph treats them independently.

Contract
- `independence` proves that; `Axes` says which inputs are cut, and describes the values of the Program by the proof.
- A dimension whose size is the token symbol is the token axis of an input. So is a dimension of size k * tokens where
  the k rows of a token are known to be adjacent.
- A value is local to its micro-batch where it numbers the tokens, or holds the batch several times.
- `reason` names the node that may mix tokens; it becomes `Program.unsplittable`. Sizes alone then say where tokens are.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dynaflow_serving.capture.fx.matching import region_of
from dynaflow_serving.capture.fx.symbols import depends, expression, fake_value, hint, rows_per_token
from dynaflow_serving.capture.independence import TOKENS, Cut, Placement, Proof, Total, Whole, prove
from dynaflow_serving.core.program import Scope, Value


class Axes:
    """Describes the values of a graph.

    Attributes:
        reason: Why the graph cannot be split, or "".
    """

    def __init__(
        self,
        stitched: fx.GraphModule,
        pieces: Mapping[str, fx.GraphModule],
        tokens: Set[Any],
        adjacent: bool = False,
        shared: Set[str] = frozenset(),
    ) -> None:
        """Prove what can be proved.

        Args:
            stitched: The graph, whose `call_module` nodes are its operators.
            pieces: submodule -> its graph.
            tokens: The token symbols; several may stand for one count.
            adjacent: Whether an input with k rows per token has them side by side.
            shared: Inputs that all micro-batches share, although their sizes are that of the batch.
        """
        self._tokens, self._adjacent, self._shared = tokens, adjacent, shared
        inputs = [n for n in stitched.graph.nodes if n.op == "placeholder"]
        subclass = next((n for n in inputs if is_traceable_wrapper_subclass(fake_value(n))), None)
        if subclass is not None:
            kind = type(fake_value(subclass)).__name__
            self._proof = Proof(f"{subclass.name} is a {kind}: only level='aot' sees the operators on its parts")
        else:
            placements = {n: self._input(n.name, fake_value(n)) for n in inputs}
            self._proof = prove(stitched, pieces, placements, self._fake, _trusted)
        self.reason = self._proof.reason

    def value(self, name: str, node: Any, storage: str = "") -> Value:
        """Describe one value.

        Args:
            name: The name of the value.
            node: The node that computes it, or a constant.
            storage: The value whose memory it shares; "" for memory of its own.
        """
        fake = fake_value(node) if isinstance(node, fx.Node) else node
        if isinstance(fake, torch.Tensor):
            assert isinstance(node, fx.Node)
            return self._tensor(name, fake, self._proof.placement(node) or self._by_size(fake), storage)
        if isinstance(fake, torch.SymInt) and (rows := rows_per_token(fake, self._tokens)):
            return Value(name, Scope.TOKENS, rows=rows)
        first, second = self._proof.values.get(node, (fake, fake)) if isinstance(node, fx.Node) else (fake, fake)
        varies = depends(fake, self._tokens) if isinstance(fake, torch.SymInt) else repr(first) != repr(second)
        return Value(name, Scope.LOCAL if varies else Scope.SHARED)

    def _tensor(self, name: str, fake: torch.Tensor, placement: Placement | None, storage: str) -> Value:
        match placement:
            case Whole():
                return Value(name, Scope.SHARED, storage=storage)
            case Cut(dim, copies=1, numbered=0) if rows := rows_per_token(fake.shape[dim], self._tokens):
                return Value(name, Scope.BATCH, dim, rows, storage)
            case Total(mean):
                return Value(name, Scope.PARTIAL, storage=storage, mean=mean)
        return Value(name, Scope.LOCAL, storage=storage)

    def _input(self, name: str, fake: Any) -> Placement | None:
        if not isinstance(fake, torch.Tensor) or name in self._shared:
            return Whole()
        placement = self._by_size(fake)
        several = isinstance(placement, Cut) and rows_per_token(fake.shape[placement.dim], self._tokens) > 1
        return None if several and not self._adjacent else placement

    def _by_size(self, fake: torch.Tensor) -> Placement | None:
        """Return the placement that sizes suggest; None if they suggest none."""
        dims = [d for d, size in enumerate(fake.shape) if depends(size, self._tokens)]
        if not dims:
            return Whole()
        return Cut(dims[0]) if len(dims) == 1 and rows_per_token(fake.shape[dims[0]], self._tokens) else None

    def _fake(self, node: fx.Node, mode: FakeTensorMode, tokens: int) -> Any:
        """Return the value of an input for a number of tokens."""
        fake = fake_value(node)
        if isinstance(fake, torch.SymInt):
            return self._number(fake, tokens)
        if not isinstance(fake, torch.Tensor):
            return fake
        if node.name in self._shared:
            traced: Any = next(size for size in fake.shape if isinstance(size, torch.SymInt))
            tokens = hint(next(iter(self._tokens)), traced.node.shape_env)
        whole = max(tokens, TOKENS[0])  # a few tokens are a micro-batch, which is a view of the batch
        sizes, strides = ([self._number(s, whole) for s in numbers] for numbers in (fake.shape, fake.stride()))
        with mode:
            view = torch.empty_strided(sizes, strides, dtype=fake.dtype, device=fake.device)
            for dim, size in enumerate(fake.shape):
                view = view.narrow(dim, 0, self._number(size, tokens))
            return view

    def _number(self, size: Any, tokens: int) -> int:
        found = expression(size)
        others = {s: hint(s, size.node.shape_env) for s in found.free_symbols - self._tokens}
        return int(found.subs({**dict.fromkeys(self._tokens, tokens), **others}))


def _trusted(node: fx.Node) -> bool:
    """Whether an annotation vouches for the node: an engine's operator with context."""
    return bool((region_of(node) or {}).get("context"))
