"""Operators that write their result straight into a preallocated merge buffer (paper, section 5: zero-copy).

Contract
- A variant is offered only where the producing call has an `out=` form with the same arithmetic, or,
  with `copy=True`, by a final `copy_` that a compiler is expected to fuse into the producer.
- A buffer's shape depends on the number of tokens only, and it is laid out in memory like the tensor that it
  stands for: a later `view` of the graph holds for the strides of that layout. So is what a merge copies.
"""

from __future__ import annotations

import copy as copying
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

# Dynamo-level callables with an `out=` form of the same arithmetic.
_OUT_FORMS: dict[Any, Any] = {
    operator.add: torch.add, operator.mul: torch.mul, operator.sub: torch.sub, operator.truediv: torch.div,
    operator.matmul: torch.matmul, torch.add: torch.add, torch.mul: torch.mul, torch.sub: torch.sub,
    torch.matmul: torch.matmul, torch.mm: torch.mm, torch.sin: torch.sin, torch.cos: torch.cos,
    torch.tanh: torch.tanh, torch.exp: torch.exp, torch.sigmoid: torch.sigmoid,
}  # fmt: skip


def permutation(fake: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions from the greatest stride to the least, of a dense tensor where that is not their own order."""
    if not torch._prims_common.is_non_overlapping_and_dense_or_false(fake):
        return None
    dims = tuple(range(fake.dim()))
    order = tuple(sorted(dims, key=lambda d: (-_hint(fake.stride(d)), d)))
    return order if order != dims else None


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def merger(axis: int, order: tuple[int, ...]) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """A function parts -> their concatenation along `axis`, laid out in `order`."""
    inverse = tuple(order.index(d) for d in range(len(order)))

    def merge(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([p.permute(order) for p in parts], order.index(axis)).permute(inverse)

    return merge


def buffer_maker(fake: Any, axis: int, rows: int) -> Callable[[int], torch.Tensor] | None:
    """A function tokens -> empty tensor like `fake`; None if another dimension is symbolic, or if the parts of
    a permuted buffer would not be dense."""
    if not isinstance(fake, torch.Tensor):
        return None
    other = [s for d, s in enumerate(fake.shape) if d != axis]
    if any(isinstance(s, torch.SymInt) and not s.node.is_constant() for s in other):
        return None
    order = permutation(fake)
    if order is not None and order[0] != axis:
        return None
    before, after = [int(s) for s in fake.shape[:axis]], [int(s) for s in fake.shape[axis + 1 :]]
    dtype, device = fake.dtype, fake.device

    def make(tokens: int) -> torch.Tensor:
        shape = (*before, tokens * rows, *after)
        if order is not None:
            return torch.empty_permuted(shape, order, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device=device)

    return make


def into_variant(piece: fx.GraphModule, ports: list[int], copy: bool) -> tuple[Callable[..., Any], set[int]]:
    """A copy of `piece` with a buffer argument for each of the outputs `ports` that can be written in
    place; returns it and those outputs."""
    graph = copying.deepcopy(piece.graph)
    output = next(n for n in graph.nodes if n.op == "output")
    results = output.args[0]
    listed = list(results) if isinstance(results, tuple | list) else [results]
    last = next((n for n in reversed(graph.nodes) if n.op == "placeholder"), None)
    done = set()
    for port in ports:
        node = listed[port]
        form = _out_form(node)
        if listed.count(node) > 1 or (form is None and not copy):
            continue
        place = graph.inserting_after(last) if last is not None else graph.inserting_before(next(iter(graph.nodes)))
        with place:
            last = graph.placeholder(f"into_{port}")
        last.meta = dict(node.meta)
        if form is not None:
            node.target, node.op = form, "call_function"
            node.kwargs = {**node.kwargs, "out": last}
        else:
            with graph.inserting_before(output):
                listed[port] = graph.call_method("copy_", (last, node))
                listed[port].meta = dict(node.meta)
        done.add(port)
    if not done:
        return piece, done
    output.args = (tuple(listed) if isinstance(results, tuple | list) else listed[0],)
    graph.lint()
    return fx.GraphModule(piece, graph), done


def _out_form(node: fx.Node) -> Any:
    """The `out=` form of the call, or None: an `out` overload of an ATen operator, or a torch function."""
    if node.op != "call_function" or "out" in node.kwargs:
        return None
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        packet = target.overloadpacket
        for name in ("out", f"{target._overloadname}_out"):
            if name in packet.overloads() and _same_arguments(target, getattr(packet, name)):
                return getattr(packet, name)
        return None
    return _OUT_FORMS.get(target)


def _same_arguments(plain: torch._ops.OpOverload, out: torch._ops.OpOverload) -> bool:
    if len(plain._schema.returns) != 1 or plain._schema.is_mutable:
        return False
    if plain._schema.returns[0].alias_info is not None:
        return False  # a view: nothing is computed
    names = [a.name for a in out._schema.arguments]
    return names == [*(a.name for a in plain._schema.arguments), "out"]
