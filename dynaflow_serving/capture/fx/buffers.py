"""Operators that write their result straight into a preallocated merge buffer (paper, section 5: zero-copy).

Contract
- A variant is offered where the call that makes the result has an `out=` form with the same arithmetic. With
  `copy=True` it is offered elsewhere too, by a final `copy_` that a compiler is expected to fuse into the producer.
- A buffer's shape depends on the number of tokens only.
- A buffer has the memory layout of the tensor that it stands for: a later `view` of the graph holds for those strides.
  The result of a merge that copies has it too.
"""

from __future__ import annotations

import copy as copying
import operator
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dynaflow_serving.capture.fx.symbols import fake_value
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.program import Operator

# Dynamo-level callables with an `out=` form of the same arithmetic.
_OUT_FORMS: dict[Any, Any] = {
    operator.add: torch.add, operator.mul: torch.mul, operator.sub: torch.sub, operator.truediv: torch.div,
    operator.matmul: torch.matmul, torch.add: torch.add, torch.mul: torch.mul, torch.sub: torch.sub,
    torch.matmul: torch.matmul, torch.mm: torch.mm, torch.sin: torch.sin, torch.cos: torch.cos,
    torch.tanh: torch.tanh, torch.exp: torch.exp, torch.sigmoid: torch.sigmoid,
}  # fmt: skip


def result_of(graph: fx.GraphModule) -> Any:
    """Return what a graph returns: nodes, constants, and structures of them."""
    return next(n for n in graph.graph.nodes if n.op == "output").args[0]


def result_list(graph: fx.GraphModule) -> list[Any]:
    """Return the results of a piece as a list."""
    results = result_of(graph)
    return list(results) if isinstance(results, tuple | list) else [results]


def own_code(piece: Any) -> Callable[..., Any]:
    """Return the function that runs `piece`, past the calls that `nn.Module` and torch.fx put around it.

    Args:
        piece: A graph, or what an engine has compiled from one, which is called as it is.
    """
    function: Callable[..., Any] = piece
    if isinstance(piece, fx.GraphModule):
        _ = piece.code  # a lazy module, as Dynamo makes them, has a `forward` of its own only once this was read
        function = piece.forward
    return function


def add_into_variants(
    capture: CapturedProgram,
    copy: bool = False,
    only: Set[str] | None = None,
    build: Callable[[fx.GraphModule], Callable[..., Any]] = own_code,
) -> None:
    """Let operators write outputs into given buffers, where that is possible.

    Args:
        capture: is changed: `into`, `buffers`, and `Operator.into` in its Program.
        copy: whether a final copy will do where there is no `out=` form.
        only: names of the operators; None for all.
        build: graph of a variant -> its function.
    """
    program = capture.program
    capture.into.clear()
    operators = []
    for op in program.operators:
        makers = _buffer_makers(capture, op) if only is None or op.name in only else {}
        variant, done = _into_variant(capture.pieces[op.name], list(makers), copy)
        if done:
            capture.into[op.name] = build(variant)
        capture.buffers.update({op.outputs[i]: maker for i, maker in makers.items()})
        operators.append(replace(op, into=tuple(op.outputs[i] for i in makers if i in done)))
    capture.program = replace(program, operators=tuple(operators))


def _buffer_makers(capture: CapturedProgram, op: Operator) -> dict[int, Callable[[int], torch.Tensor]]:
    """Return output -> function that makes its buffer, for the outputs of `op` with a storage of their own."""
    results = result_list(capture.pieces[op.name])
    makers = {}
    for i, name in enumerate(op.outputs):
        value = capture.program.values[name]
        if value.axis is not None and value.storage in capture.program.own_storages:
            maker = buffer_maker(fake_value(results[i]), value.axis, value.rows)
            if maker is not None:
                makers[i] = maker
    return makers


def _into_variant(piece: fx.GraphModule, ports: list[int], copy: bool) -> tuple[fx.GraphModule, set[int]]:
    """Copy `piece`, with a buffer argument for each of the outputs `ports` that can be written in place.

    Returns:
        The variant, and the outputs that it writes into buffers.
    """
    graph = copying.deepcopy(piece.graph)
    output = next(n for n in graph.nodes if n.op == "output")
    results = output.args[0]
    listed = list(results) if isinstance(results, tuple | list) else [results]
    done = set()
    for port in ports:
        node = listed[port]
        form = _out_form(node)
        if listed.count(node) > 1 or (form is None and not copy):
            continue
        buffer = _add_placeholder(graph, f"into_{port}")
        buffer.meta = dict(node.meta)
        if form is not None:
            node.target, node.op = form, "call_function"
            node.kwargs = {**node.kwargs, "out": buffer}
        else:
            with graph.inserting_before(output):
                listed[port] = graph.call_method("copy_", (buffer, node))
                listed[port].meta = dict(node.meta)
        done.add(port)
    if not done:
        return piece, done
    output.args = (tuple(listed) if isinstance(results, tuple | list) else listed[0],)
    graph.lint()
    return fx.GraphModule(piece, graph), done


def _add_placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """Add an argument after the others."""
    last = next((n for n in reversed(graph.nodes) if n.op == "placeholder"), None)
    place = graph.inserting_before(next(iter(graph.nodes))) if last is None else graph.inserting_after(last)
    with place:
        return graph.placeholder(name)


def permutation(fake: torch.Tensor) -> tuple[int, ...] | None:
    """Return the dimensions from the greatest stride to the least; None if they are in order, or not dense."""
    if not torch._prims_common.is_non_overlapping_and_dense_or_false(fake):
        return None
    dims = tuple(range(fake.dim()))
    order = tuple(sorted(dims, key=lambda d: (-_hint(fake.stride(d)), d)))
    return order if order != dims else None


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def merger(axis: int, order: tuple[int, ...]) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """Return a function parts -> their concatenation along `axis`, laid out in `order`."""
    inverse = tuple(order.index(d) for d in range(len(order)))

    def merge(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([p.permute(order) for p in parts], order.index(axis)).permute(inverse)

    return merge


def buffer_maker(fake: Any, axis: int, rows: int) -> Callable[[int], torch.Tensor] | None:
    """Return a function tokens -> empty tensor like `fake`.

    None is returned if another dimension is symbolic, or if the parts of a buffer would not be dense: `out=` forms and
    compiled code count on the strides of a tensor of its own.
    """
    if not isinstance(fake, torch.Tensor):
        return None
    other = [s for d, s in enumerate(fake.shape) if d != axis]
    if any(isinstance(s, torch.SymInt) and not s.node.is_constant() for s in other):
        return None
    if not torch._prims_common.is_non_overlapping_and_dense_or_false(fake):
        return None
    order = permutation(fake)
    if axis != (0 if order is None else order[0]):
        return None
    before, after = [int(s) for s in fake.shape[:axis]], [int(s) for s in fake.shape[axis + 1 :]]
    dtype, device = fake.dtype, fake.device

    def make(tokens: int) -> torch.Tensor:
        shape = (*before, tokens * rows, *after)
        if order is not None:
            return torch.empty_permuted(shape, order, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device=device)

    return make


def _out_form(node: fx.Node) -> Any:
    """Return the `out=` form of a call, an `out` overload of an ATen operator or a torch function; None without."""
    if node.op != "call_function" or "out" in node.kwargs:
        return None
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        packet = target.overloadpacket
        for name in (f"{target._overloadname}_out", "out"):
            if name in packet.overloads() and _same_arguments(target, getattr(packet, name)):
                return getattr(packet, name)
        return None
    return _OUT_FORMS.get(target)


def _same_arguments(plain: torch._ops.OpOverload, out: torch._ops.OpOverload) -> bool:
    if len(plain._schema.returns) != 1 or plain._schema.is_mutable:
        return False
    if plain._schema.returns[0].alias_info is not None:
        return False  # a view: nothing is computed
    first, (last,) = out._schema.arguments[:-1], out._schema.arguments[-1:]
    described = [[(a.name, str(a.type)) for a in arguments] for arguments in (first, plain._schema.arguments)]
    return last.name == "out" and described[0] == described[1]
