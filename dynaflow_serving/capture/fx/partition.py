"""A captured graph as a Program and the callables of its operators.

Contract
- `partition` cuts a Dynamo-level or AOT-level graph at its annotations; `capture_pieces` takes a graph
  that an engine has cut already (a `call_module` per piece) and keeps the engine's compiled pieces.
- Operator callables take the Program's input values in order and return one output bare, several as a
  tuple. `into` variants take, after the inputs, one buffer for each of `Operator.into`.
- The graph's nested output structure is rebuilt by `CapturedProgram.rebuild`.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.fx.passes.split_module import split_module

from dynaflow_serving.capture.fx.axes import Axes, derived_nodes
from dynaflow_serving.capture.fx.buffers import buffer_maker, into_variant, merger, permutation
from dynaflow_serving.capture.fx.effects import EffectTable, hidden_edges, piece_effects, storage_id
from dynaflow_serving.capture.fx.matching import apply_rules
from dynaflow_serving.capture.fx.regions import Region, find_regions, piece_region, region_name
from dynaflow_serving.capture.fx.sizes import decompose_sizes
from dynaflow_serving.capture.fx.symbols import fake_value
from dynaflow_serving.capture.names import unique_names, value_name
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.program import Operator, Program, Resource, Scope, Value
from dynaflow_serving.strategy.rules import Rule, SplitFunc

# torch's functional collectives, wherever tensor parallelism or DTensor puts them.
COLLECTIVES: tuple[Rule, ...] = tuple(
    SplitFunc(f"_c10d_functional::{name}", name, Resource.NETWORK, (name,), group="default", required=False)
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast")
)


def partition(
    gm: fx.GraphModule,
    *,
    rules: Iterable[Rule] = (),
    tokens: Set[Any],
    rows: Mapping[str, int] | None = None,
    effects: EffectTable | None = None,
) -> CapturedProgram:
    """Cut `gm` at annotations, `rules` and collectives.

    tokens: sympy symbols that stand for the number of tokens (rows, sequences) of the batch.
    rows: inputs of which a token is known to have several adjacent rows -> how many.
    effects: engine state that operators touch beyond their arguments.
    Raises `AnnotationError` for a rule without a match, `PartitionError` for what cannot be captured.
    """
    decompose_sizes(gm)
    apply_rules(gm, (*rules, *COLLECTIVES))
    regions = find_regions(gm, hidden_edges(gm, effects or {}))
    region_of_node = {n: i for i, r in enumerate(regions) for n in r.nodes}
    split = split_module(gm, gm, region_of_node.__getitem__, keep_original_node_name=True) if regions else gm
    order = {f"submod_{i}": r for i, r in enumerate(regions)}
    return _Reader(split, Axes(tokens, rows), effects or {}, order, _submodules(split)).read([gm])


def capture_pieces(
    split: fx.GraphModule,
    graphs: dict[str, fx.GraphModule],
    *,
    tokens: Set[Any],
    effects: EffectTable | None = None,
) -> CapturedProgram:
    """The Program of a graph that an engine has cut: its `call_module` nodes are the operators.

    graphs: submodule -> its FX graph; the submodule of that name in `split` may be compiled already.
    """
    calls = [n for n in split.graph.nodes if n.op == "call_module"]
    regions = {str(n.target): piece_region(graphs[str(n.target)], i) for i, n in enumerate(calls)}
    return _Reader(split, Axes(tokens), effects or {}, regions, graphs).read(list(graphs.values()))


def _submodules(split: fx.GraphModule) -> dict[str, fx.GraphModule]:
    return {str(n.target): getattr(split, str(n.target)) for n in split.graph.nodes if n.op == "call_module"}


class _Reader:
    """Reads a stitched graph: `regions` are the operators' in order, `graphs` what is in them, by submodule."""

    def __init__(
        self,
        split: fx.GraphModule,
        axes: Axes,
        effects: EffectTable,
        regions: dict[str, Region],
        graphs: dict[str, fx.GraphModule],
    ) -> None:
        self.split, self.axes, self.effects, self.regions, self.graphs = split, axes, effects, regions, graphs
        self.names = dict(zip(regions, unique_names([region_name(r) for r in regions.values()]), strict=True))
        self.values: dict[str, Value] = {}
        self.storages: dict[int, str] = {}  # of fake tensors -> value that named it
        self.value_of: dict[fx.Node, str] = {}  # nodes of the stitched graph -> values
        self.operators: list[Operator] = []
        self.nodes: dict[str, str] = {}
        self.functions: dict[str, Callable[..., Any]] = {}
        self.mergers: dict[str, Callable[[Sequence[torch.Tensor]], torch.Tensor]] = {}

    def read(self, flow: list[fx.GraphModule]) -> CapturedProgram:
        """`flow`: the graphs in which token axes are followed."""
        for graph in flow:
            self.axes.check_graph(graph)
        by_op = {op: [n for n in self.split.graph.nodes if n.op == op] for op in ("placeholder", "get_attr")}
        inputs, constants = by_op.values()
        for n in (*inputs, *constants):
            name = _input_name(n.name)
            self.nodes[name] = n.name
            self.values[name] = self.axes.value(name, fake_value(n), self._storage(n, name), False, n.name)
            self.value_of[n] = name
        calls = {str(n.target): n for n in self.split.graph.nodes if n.op == "call_module"}
        for submodule in self.regions:
            self._operator(calls[submodule], submodule)
        given = [self.value_of[n] for n in (*inputs, *constants)]
        _own_if_written(self.values, self.operators, {self.values[v].storage for v in given})
        leaves, spec = pytree.tree_flatten(_result(self.split), is_leaf=lambda x: isinstance(x, fx.Node))
        outputs = [self.value_of[leaf] for leaf in leaves if isinstance(leaf, fx.Node)]
        capture = CapturedProgram(
            self._program(given[: len(inputs)], given[len(inputs) :], outputs),
            self.functions,
            mergers=self.mergers,
            constants=tuple(_attribute(self.split, str(n.target)) for n in constants),
            rebuild=_rebuilder(leaves, spec),
            pieces={self.names[submodule]: self.graphs[submodule] for submodule in self.regions},
            nodes=self.nodes,
        )
        add_into_variants(capture)
        return capture

    def _operator(self, call: fx.Node, submodule: str) -> None:
        name, graph, mark = self.names[submodule], self.graphs[submodule], self.regions[submodule].mark or {}
        arguments = [self.values[self.value_of[a]] for a in call.args if isinstance(a, fx.Node)]
        results = _outputs(graph)
        bare = not isinstance(_result(graph), tuple | list)
        taken = {m.args[1]: m for m in call.users if m.op == "call_function" and m.target is operator.getitem}
        ports = [call] if bare else [taken.get(i) for i in range(len(results))]
        derived = derived_nodes(graph, [a.scope is not Scope.SHARED for a in arguments])
        outputs = []
        for i, (port, result) in enumerate(zip(ports, results, strict=True)):
            value = value_name(name, i, len(results))
            value = value if value not in self.values else f"{value}.out"  # an input has that name
            outputs.append(value)
            if port is not None:
                self.value_of[port] = value
            if isinstance(result, fx.Node):
                self.nodes[value] = result.name
                storage = self._storage(result, value)
                fake = fake_value(result)
                self.values[value] = self.axes.value(value, fake, storage, result in derived, result.name)
                axis = self.values[value].axis
                if axis is not None and (order := permutation(fake)) is not None:
                    self.mergers[value] = merger(axis, order)
            else:
                self.values[value] = self.axes.value(value, result, derived=False)
        writes, reads = piece_effects(graph, [a.storage for a in arguments], self.effects)
        self.operators.append(
            Operator(
                name,
                Resource(mark.get("resource", Resource.COMPUTE)),
                tuple(a.name for a in arguments),
                tuple(outputs),
                tuple(mark.get("tags") or ()),
                writes,
                reads,
                mark.get("group") or "",
                bool(mark.get("context")),
            )
        )
        piece = getattr(self.split, submodule)
        self.functions[name] = _callable(piece, single=len(results) == 1 and not bare)

    def _program(self, inputs: list[str], constants: list[str], outputs: list[str]) -> Program:
        used = {v for o in self.operators for v in (*o.inputs, *o.outputs)} | {*inputs, *constants, *outputs}
        reasons = (
            self.axes.reason,
            _not_mergeable(outputs, self.values, self.operators),
            _shared_write(self.operators, self.values),
            _not_cuttable(inputs, self.values, self.operators),
        )
        return Program(
            (*inputs, *constants),
            tuple(dict.fromkeys(outputs)),
            {k: v for k, v in self.values.items() if k in used},
            tuple(self.operators),
            next(filter(None, reasons), ""),
        )

    def _storage(self, node: fx.Node, name: str) -> str:
        key = storage_id(node)
        return self.storages.setdefault(key, name) if key is not None else ""


def add_into_variants(capture: CapturedProgram, copy: bool = False, only: Set[str] | None = None) -> None:
    """Let operators write outputs into given buffers, where an `out=` form of the producing call exists
    (`copy=True`: also by a final copy, which a compiler fuses)."""
    program = capture.program
    written = {s for o in program.operators for s in o.writes}
    aliases = Counter(v.storage for v in program.values.values())
    operators = []
    for op in program.operators:
        ports = []
        for i, v in enumerate(op.outputs):
            value = program.values[v]
            fit = value.scope is Scope.BATCH and aliases[value.storage] == 1 and value.storage not in written
            if not fit or (only is not None and op.name not in only):
                continue
            result = _outputs(capture.pieces[op.name])[i]
            maker = buffer_maker(fake_value(result), value.axis or 0, value.rows)
            if maker is not None:
                capture.buffers[v] = maker
                ports.append((i, v))
        variant, done = into_variant(capture.pieces[op.name], [i for i, _ in ports], copy)
        if done:
            capture.into[op.name] = variant
        names = tuple(v for i, v in ports if i in done)
        operators.append(Operator(**{**{f: getattr(op, f) for f in op.__slots__}, "into": names}))
    capture.program = Program(program.inputs, program.outputs, program.values, tuple(operators), program.unsplittable)


def _own_if_written(values: dict[str, Value], operators: list[Operator], given: Set[str]) -> None:
    """What an operator makes of weights only is the same for all, unless written in place later."""
    written = {s for o in operators for s in o.writes} - given
    for v in [v for o in operators for v in o.outputs]:
        if values[v].scope is Scope.SHARED and values[v].storage in written:
            values[v] = Value(v, Scope.LOCAL, storage=values[v].storage)


def _not_mergeable(outputs: list[str], values: dict[str, Value], operators: list[Operator]) -> str:
    produced = {v for o in operators for v in o.outputs}
    for v in outputs:
        if values[v].scope is Scope.LOCAL and v in produced:
            return f"output {v} has no token axis"
    return ""


def _not_cuttable(inputs: list[str], values: dict[str, Value], operators: list[Operator]) -> str:
    used = {v for o in operators for v in o.inputs}
    local = [v for v in inputs if v in used and values[v].scope is Scope.LOCAL]
    return f"input {local[0]} depends on the number of tokens, but has no token axis" if local else ""


def _shared_write(operators: list[Operator], values: dict[str, Value]) -> str:
    for o in operators:
        for storage in o.writes:
            if storage in values and values[storage].scope is Scope.SHARED:
                return f"{o.name} writes {storage} in place, which all micro-batches share"
    return ""


def _result(graph: fx.GraphModule) -> Any:
    return next(n for n in graph.graph.nodes if n.op == "output").args[0]


def _outputs(graph: fx.GraphModule) -> list[Any]:
    results = _result(graph)
    return list(results) if isinstance(results, tuple | list) else [results]


def _input_name(node: str) -> str:
    """Dynamo calls argument `x` of the model `l_x_`."""
    found = re.fullmatch(r"l_(?!self_)(\w+)_", node)
    return found[1] if found else node


def _callable(piece: Any, single: bool) -> Callable[..., Any]:
    """What the plan calls: past `nn.Module.__call__`, and one output bare even if the piece wraps it."""
    function: Callable[..., Any] = piece.forward if isinstance(piece, fx.GraphModule) else piece
    return (lambda *args: function(*args)[0]) if single else function


def _attribute(module: torch.nn.Module, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _rebuilder(leaves: list[Any], spec: Any) -> Callable[[list[Any]], Any]:
    slots: dict[str, int] = {}
    plan = [
        (slots.setdefault(leaf.name, len(slots)), None) if isinstance(leaf, fx.Node) else (-1, leaf) for leaf in leaves
    ]
    if isinstance(spec.type, type) and spec.type is tuple and [i for i, _ in plan] == list(range(len(plan))):
        return tuple
    return lambda values: pytree.tree_unflatten([values[i] if i >= 0 else leaf for i, leaf in plan], spec)
