"""The fake values of a graph's nodes, and the symbols in their sizes.

Contract
- A token symbol is a sympy symbol that stands for the number of tokens of the batch. Several may stand for one number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx


def fake_value(node: fx.Node) -> Any:
    """Return the fake tensor or symbolic size that tracing left on `node` (AOT: val, Dynamo: example_value)."""
    return node.meta.get("val", node.meta.get("example_value"))


def expression(size: Any) -> Any:
    """Return a size as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def depends(size: Any, tokens: Set[Any]) -> bool:
    """Whether a size depends on the number of tokens."""
    return bool(expression(size).free_symbols & tokens)


def hint(symbol: Any, shape_env: Any) -> int:
    """Return the size that a symbol stood for while tracing."""
    look_up = getattr(shape_env, "optimization_hint", None) or shape_env.size_hint  # torch 2.12 renamed it
    return int(look_up(symbol))


def has_tokens(fake: Any, tokens: Set[Any]) -> bool:
    """Whether a size of a tensor depends on the number of tokens."""
    return isinstance(fake, torch.Tensor) and any(depends(size, tokens) for size in fake.shape)


def rows_per_token(size: Any, tokens: Set[Any]) -> int:
    """Return k for a size of k * tokens, and 0 for any other size."""
    ratios = [ratio for t in tokens if (ratio := expression(size) / t).is_Integer]
    return int(ratios[0]) if ratios else 0


def input_symbols(gm: fx.GraphModule) -> set[Any]:
    """Return all symbols in the inputs' sizes: the token symbols, where only the number of tokens is dynamic."""
    symbols: set[Any] = set()
    for n in gm.graph.nodes:
        if n.op == "placeholder":
            fake = fake_value(n)
            sizes = fake.shape if isinstance(fake, torch.Tensor) else [fake] if isinstance(fake, torch.SymInt) else []
            symbols |= {s for size in sizes for s in expression(size).free_symbols}
    return symbols


def batch_symbols(gm: fx.GraphModule, batch_dim: int) -> set[Any]:
    """Return the symbol that most inputs have at `batch_dim`: the token symbol, where other sizes are dynamic too."""
    count: Counter[Any] = Counter()
    for n in gm.graph.nodes:
        if n.op == "placeholder":
            fake = fake_value(n)
            if isinstance(fake, torch.Tensor) and fake.dim() > batch_dim:
                expr = expression(fake.shape[batch_dim])
                if expr.is_Symbol:
                    count[expr] += 1
    return {count.most_common(1)[0][0]} if count else set()
