"""A captured graph as a Program and the callables of its operators.

Contract
- `partition` cuts a Dynamo-level or AOT-level graph at its annotations.
- `capture_pieces` takes a graph that an engine has cut already, a `call_module` per piece, and keeps the engine's
  compiled pieces.
- Both return a `CapturedProgram`, and say in `Program.unsplittable` why a graph cannot be split.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.fx.passes.split_module import split_module

from dynaflow_serving.capture.fx.axes import Axes
from dynaflow_serving.capture.fx.buffers import add_into_variants, merger, own_code, permutation, result_list, result_of
from dynaflow_serving.capture.fx.effects import EffectTable, hidden_edges, piece_effects, storage_id
from dynaflow_serving.capture.fx.matching import apply_rules
from dynaflow_serving.capture.fx.regions import Region, find_regions, piece_region, region_name
from dynaflow_serving.capture.fx.sizes import decompose_sizes
from dynaflow_serving.capture.fx.symbols import fake_value
from dynaflow_serving.capture.names import unique_names, value_name
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.program import Operator, Program, Resource, Scope, Value
from dynaflow_serving.strategy.rules import Rule, SplitFunc
from dynaflow_serving.strategy.tags import Tag

# torch's functional collectives, wherever tensor parallelism or DTensor puts them.
COLLECTIVES: tuple[Rule, ...] = tuple(
    SplitFunc(f"_c10d_functional::{name}", name, Resource.NETWORK, (tag,), group="default", required=False)
    for name, tag in {
        "all_reduce": Tag.ALL_REDUCE,
        "all_gather_into_tensor": Tag.ALL_GATHER,
        "reduce_scatter_tensor": Tag.REDUCE_SCATTER,
        "all_to_all_single": Tag.ALL_TO_ALL,
        "broadcast": Tag.BROADCAST,
    }.items()
)


def partition(
    gm: fx.GraphModule,
    *,
    rules: Iterable[Rule] = (),
    tokens: Set[Any],
    adjacent: bool = False,
    effects: EffectTable | None = None,
) -> CapturedProgram:
    """Cut a graph at annotations, rules and collectives.

    Args:
        gm: the graph; it is changed.
        rules: of the strategy and the integration.
        tokens: sympy symbols that stand for the number of tokens (rows, sequences) of the batch.
        adjacent: whether an input with several rows per token has them side by side.
        effects: engine state that operators touch beyond their arguments.

    Raises:
        AnnotationError: a required rule matches nothing.
        PartitionError: the graph writes memory in a way that cannot be seen.
    """
    decompose_sizes(gm)
    apply_rules(gm, (*rules, *COLLECTIVES))
    regions = find_regions(gm, hidden_edges(gm, effects or {}))
    if not regions:
        return _make_capture(gm, [], Axes(gm, {}, tokens, adjacent), effects or {})
    number = {n: i for i, r in enumerate(regions) for n in r.nodes}
    stitched = split_module(gm, gm, number.__getitem__, keep_original_node_name=True)
    pieces = [_Piece(f"submod_{i}", r, getattr(stitched, f"submod_{i}")) for i, r in enumerate(regions)]
    axes = Axes(stitched, {p.submodule: p.graph for p in pieces}, tokens, adjacent)
    return _make_capture(stitched, pieces, axes, effects or {})


def capture_pieces(
    stitched: fx.GraphModule,
    graphs: dict[str, fx.GraphModule],
    *,
    tokens: Set[Any],
    effects: EffectTable | None = None,
) -> CapturedProgram:
    """Return the Program of a graph that an engine has cut.

    Args:
        stitched: the engine's graph; its `call_module` nodes are the operators.
        graphs: submodule -> its FX graph. The submodule itself may be compiled already.
        tokens: sympy symbols that stand for the number of tokens.
        effects: engine state that operators touch beyond their arguments.
    """
    axes = Axes(stitched, graphs, tokens)
    names = [str(n.target) for n in stitched.graph.nodes if n.op == "call_module"]
    pieces = [_Piece(name, piece_region(graphs[name], i), graphs[name]) for i, name in enumerate(names)]
    return _make_capture(stitched, pieces, axes, effects or {})


@dataclass(frozen=True, slots=True)
class _Piece:
    """One operator of a stitched graph."""

    submodule: str
    region: Region
    graph: fx.GraphModule


def _make_capture(
    stitched: fx.GraphModule, pieces: Sequence[_Piece], axes: Axes, effects: EffectTable
) -> CapturedProgram:
    """Return the capture of a stitched graph whose nodes `axes` has checked; `pieces` are in the operators' order."""
    nodes = stitched.graph.nodes
    inputs = [n for n in nodes if n.op == "placeholder"]
    constants = [n for n in nodes if n.op == "get_attr"]
    call_of = {str(n.target): n for n in nodes if n.op == "call_module"}
    values = _Values(axes)
    for n in (*inputs, *constants):
        values.add_input(n)
    names = unique_names([region_name(piece.region) for piece in pieces])
    operators = [
        _operator(name, piece, call_of[piece.submodule], values, effects) for name, piece in zip(names, pieces)
    ]
    leaves, spec = pytree.tree_flatten(result_of(stitched), is_leaf=lambda x: isinstance(x, fx.Node))
    program = _program(
        [values.of_node[n] for n in inputs],
        [values.of_node[n] for n in constants],
        [values.of_node[leaf] for leaf in leaves if isinstance(leaf, fx.Node)],
        values.by_name,
        operators,
        axes.reason,
        values.node_names,
    )
    capture = CapturedProgram(
        program,
        {name: _function(getattr(stitched, piece.submodule), piece.graph) for name, piece in zip(names, pieces)},
        mergers=values.mergers,
        constants=tuple(_attribute(stitched, str(n.target)) for n in constants),
        rebuild=_rebuilder(leaves, spec),
        pieces={name: piece.graph for name, piece in zip(names, pieces)},
        nodes=values.node_names,
    )
    add_into_variants(capture)
    return capture


class _Values:
    """The values between the operators of a stitched graph."""

    def __init__(self, axes: Axes) -> None:
        self._axes = axes
        self._storages: dict[int, str] = {}  # storage of a fake tensor -> the value that names it
        self.by_name: dict[str, Value] = {}
        self.of_node: dict[fx.Node, str] = {}  # node of the stitched graph -> its value
        self.node_names: dict[str, str] = {}  # value -> the node that computes it
        self.mergers: dict[str, Callable[[Sequence[torch.Tensor]], torch.Tensor]] = {}

    def add_input(self, node: fx.Node) -> None:
        name = _input_name(node.name)
        self.of_node[node] = name
        self._describe(name, node)

    def add_output(self, name: str, result: Any, port: fx.Node | None) -> str:
        """Add an operator's output; return the value's name.

        Args:
            name: what the value should be called.
            result: the node in the piece that computes it, or a constant.
            port: the node of the stitched graph that stands for it; None if nothing reads it.
        """
        if name in self.by_name:  # an input has that name
            name = f"{name}.out"
        if port is not None:
            self.of_node[port] = name
        if not isinstance(result, fx.Node):
            self.by_name[name] = self._axes.value(name, result)
            return name
        value = self._describe(name, result)
        if value.axis is not None and (order := permutation(fake_value(result))) is not None:
            self.mergers[name] = merger(value.axis, order)
        return name

    def _describe(self, name: str, node: fx.Node) -> Value:
        key = storage_id(node)
        storage = "" if key is None else self._storages.setdefault(key, name)
        self.node_names[name] = node.name
        self.by_name[name] = value = self._axes.value(name, node, storage)
        return value


def _operator(name: str, piece: _Piece, call: fx.Node, values: _Values, effects: EffectTable) -> Operator:
    """Return the operator of a piece, and add its outputs to `values`."""
    arguments = [values.by_name[values.of_node[a]] for a in call.args if isinstance(a, fx.Node)]
    results = result_list(piece.graph)
    outputs = [
        values.add_output(value_name(name, i, len(results)), result, port)
        for i, (port, result) in enumerate(zip(_ports(call, piece.graph), results, strict=True))
    ]
    writes, reads = piece_effects(piece.graph, [a.storage for a in arguments], effects)
    mark = piece.region.mark or {}
    return Operator(
        name,
        Resource(mark.get("resource", Resource.COMPUTE)),
        tuple(a.name for a in arguments),
        tuple(outputs),
        tags=tuple(mark.get("tags") or ()),
        writes=writes,
        reads=reads,
        group=mark.get("group") or "",
        context=bool(mark.get("context")),
    )


def _ports(call: fx.Node, graph: fx.GraphModule) -> list[fx.Node | None]:
    """Return the nodes of the stitched graph that stand for the results of `call`; None where nothing reads one."""
    if not isinstance(result_of(graph), tuple | list):
        return [call]
    items = {n.args[1]: n for n in call.users if n.op == "call_function" and n.target is operator.getitem}
    return [items.get(i) for i in range(len(result_list(graph)))]


def _program(
    inputs: list[str],
    constants: list[str],
    outputs: list[str],
    values: dict[str, Value],
    operators: list[Operator],
    mixing: str,
    nodes: Mapping[str, str],
) -> Program:
    """Put the Program together; `mixing` is the reason why the graph mixes tokens, if it does, `nodes` names nodes."""
    values = _local_if_written(values, operators, {values[v].storage for v in (*inputs, *constants)})
    used = {v for o in operators for v in (*o.inputs, *o.outputs)} | {*inputs, *constants, *outputs}
    reasons = (
        mixing,
        _unmergeable_output(outputs, values, operators, nodes),
        _shared_write(operators, values),
        _uncuttable_input(inputs, values, operators),
    )
    return Program(
        (*inputs, *constants),
        tuple(dict.fromkeys(outputs)),
        {k: v for k, v in values.items() if k in used},
        tuple(operators),
        next(filter(None, reasons), ""),
    )


def _local_if_written(values: dict[str, Value], operators: list[Operator], given: Set[str]) -> dict[str, Value]:
    """Return `values`; those computed from weights only are each micro-batch's own where they are written later.

    Args:
        values: by name.
        operators: that make and write them.
        given: storages of the graph's inputs and constants.
    """
    written = {s for o in operators for s in o.writes} - given
    made = {v for o in operators for v in o.outputs}
    return {
        name: replace(value, scope=Scope.LOCAL, rows=1)
        if name in made and value.scope is Scope.SHARED and value.storage in written
        else value
        for name, value in values.items()
    }


def _unmergeable_output(
    outputs: list[str], values: dict[str, Value], operators: list[Operator], nodes: Mapping[str, str]
) -> str:
    produced = {v for o in operators for v in o.outputs}
    local = [v for v in outputs if values[v].scope is Scope.LOCAL and v in produced]
    return f"{nodes.get(local[0], local[0])} is an output without one token axis: it cannot be merged" if local else ""


def _uncuttable_input(inputs: list[str], values: dict[str, Value], operators: list[Operator]) -> str:
    used = {v for o in operators for v in o.inputs}
    local = [v for v in inputs if v in used and values[v].scope is Scope.LOCAL]
    return f"input {local[0]} depends on the number of tokens, but has no token axis" if local else ""


def _shared_write(operators: list[Operator], values: dict[str, Value]) -> str:
    for o in operators:
        for storage in o.writes:
            if storage in values and values[storage].scope is Scope.SHARED:
                return f"{o.name} writes {storage} in place, which all micro-batches share"
    return ""


def _input_name(node: str) -> str:
    """Return the name of an input: Dynamo calls argument `x` of the model `l_x_`."""
    found = re.fullmatch(r"l_(?!self_)(\w+)_", node)
    return found[1] if found else node


def _function(piece: Any, graph: fx.GraphModule) -> Callable[..., Any]:
    """Return what a plan calls: past `nn.Module.__call__`, and one output bare even where the piece wraps it."""
    function = own_code(piece)
    results = result_of(graph)
    wrapped = isinstance(results, tuple | list) and len(results) == 1
    return (lambda *args: function(*args)[0]) if wrapped else function


def _attribute(module: torch.nn.Module, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _rebuilder(leaves: list[Any], spec: Any) -> Callable[[list[Any]], Any]:
    """Return a function outputs of the Program -> the graph's nested result."""
    positions: dict[fx.Node, int] = {}  # a value that the result holds twice is one output
    for leaf in leaves:
        if isinstance(leaf, fx.Node):
            positions.setdefault(leaf, len(positions))
    if list(positions) == leaves and spec == pytree.tree_structure(tuple(leaves)):
        return tuple  # nothing is nested

    def rebuild(values: list[Any]) -> Any:
        merged = [values[positions[leaf]] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        return pytree.tree_unflatten(merged, spec)

    return rebuild
