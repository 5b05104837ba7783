"""A captured graph as a Program and the callables of its operators.

Contract
- `partition` cuts a Dynamo-level or AOT-level graph at its annotations; `capture_pieces` takes a graph
  that an engine has cut already (a `call_module` per piece) and keeps the engine's compiled pieces.
- Operator callables take the Program's input values in order and return one output bare, several as a
  tuple. `into` variants take, after the inputs, one buffer for each of `Operator.into`.
- The graph's nested output structure is rebuilt by `Capture.rebuild`.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.fx.passes.split_module import split_module

from dynaflow_serving.annotations import CALLS, Rule, SplitFunc, apply_rules, region_of
from dynaflow_serving.errors import PartitionError
from dynaflow_serving.ir import Operator, Program, Resource, Scope, Value
from dynaflow_serving.partition.axes import Axes, expression
from dynaflow_serving.partition.buffers import buffer_maker, into_variant
from dynaflow_serving.partition.effects import (
    EffectTable,
    declared_effects,
    fake_value,
    storage_id,
    written_arguments,
)
from dynaflow_serving.partition.regions import Region, find_regions, heavy, region_name
from dynaflow_serving.partition.sizes import decompose_sizes

# torch's functional collectives, wherever tensor parallelism or DTensor puts them.
COLLECTIVES: tuple[Rule, ...] = tuple(
    SplitFunc(f"_c10d_functional::{name}", name, Resource.NETWORK, (name,), group="default", required=False)
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast")
)


@dataclass
class Capture:
    """A Program with everything needed to run it."""

    program: Program
    functions: dict[str, Callable[..., Any]]
    into: dict[str, Callable[..., Any]] = field(default_factory=dict)
    buffers: dict[str, Callable[[int], torch.Tensor]] = field(default_factory=dict)  # value -> empty(tokens)
    constants: tuple[Any, ...] = ()  # values of the last program inputs: tensors held by the graph
    rebuild: Callable[[list[Any]], Any] = tuple
    pieces: dict[str, fx.GraphModule] = field(default_factory=dict)  # operator -> its graph, where known


def partition(
    gm: fx.GraphModule,
    *,
    rules: Iterable[Rule] = (),
    tokens: Set[Any],
    effects: EffectTable | None = None,
    shared_inputs: Set[str] = frozenset(),
) -> Capture:
    """Cut `gm` at annotations, `rules` and collectives.

    tokens: sympy symbols that stand for the number of tokens (rows, sequences) of the batch.
    shared_inputs: placeholders that must not be cut although they have a token-sized dimension.
    Raises `AnnotationError` for a rule without a match, `PartitionError` for what cannot be captured.
    """
    decompose_sizes(gm)
    apply_rules(gm, (*rules, *COLLECTIVES))
    regions = find_regions(gm, hidden_edges(gm, effects or {}))
    region_of_node = {n: i for i, r in enumerate(regions) for n in r.nodes}
    split = split_module(gm, gm, region_of_node.__getitem__, keep_original_node_name=True) if regions else gm
    names = _unique(map(region_name, regions))
    order = {f"submod_{i}": (i, names[i], r) for i, r in enumerate(regions)}
    return capture_pieces(split, tokens=tokens, effects=effects, pieces=order, flow=gm, shared_inputs=shared_inputs)


def capture_pieces(
    split: fx.GraphModule,
    *,
    tokens: Set[Any],
    effects: EffectTable | None = None,
    pieces: dict[str, tuple[int, str, Region]] | None = None,
    flow: fx.GraphModule | None = None,
    shared_inputs: Set[str] = frozenset(),
    graphs: dict[str, fx.GraphModule] | None = None,
) -> Capture:
    """The Program of a graph whose `call_module` nodes are the operators.

    pieces: submodule -> (order, operator name, region); by default in graph order, named from the nodes.
    flow: the graph before it was cut, for the axis checks (default: the pieces' own graphs).
    graphs: submodule -> its FX graph, where the submodule itself is compiled already.
    """
    graphs = graphs or {
        str(n.target): getattr(split, str(n.target)) for n in split.graph.nodes if n.op == "call_module"
    }
    calls = [n for n in split.graph.nodes if n.op == "call_module"]
    if pieces is None:
        regions = [
            Region(_calls(graphs[str(n.target)]), _mark(graphs[str(n.target)]), i, i) for i, n in enumerate(calls)
        ]
        names = _unique(map(region_name, regions))
        pieces = {str(n.target): (i, names[i], regions[i]) for i, n in enumerate(calls)}
    calls.sort(key=lambda n: pieces[str(n.target)][0])
    axes = Axes(tokens)
    for graph in [flow] if flow is not None else list(graphs.values()):
        _check_axes(graph, axes)

    values: dict[str, Value] = {}
    storages: dict[int, str] = {}
    inputs = [n for n in split.graph.nodes if n.op == "placeholder"]
    constants = [n for n in split.graph.nodes if n.op == "get_attr"]
    for n in (*inputs, *constants):
        described = axes.value(n.name, fake_value(n), _storage(n, storages), derived=False)
        if described.scope is Scope.BATCH and n.name in shared_inputs:
            described = Value(n.name, Scope.SHARED, None, described.storage)
        values[n.name] = described
    operators: list[Operator] = []
    value_of = {n: n.name for n in (*inputs, *constants)}  # nodes of the stitched graph -> values
    capture = Capture(Program((), (), {}, ()), {}, constants=tuple(_attribute(split, str(n.target)) for n in constants))
    for n in calls:
        _, name, region = pieces[str(n.target)]
        graph = graphs[str(n.target)]
        taken = {m.args[1]: m for m in n.users if m.op == "call_function" and m.target is operator.getitem}
        results = _outputs(graph)
        derived = _derived(graph, [values[value_of[a]].scope is not Scope.SHARED for a in n.args])
        bare = not isinstance(_result(graph), tuple | list)
        ports = [n] if bare else [taken.get(i) for i in range(len(results))]
        outputs = []
        for i, (port, result) in enumerate(zip(ports, results, strict=True)):
            value_name = result.name if isinstance(result, fx.Node) else f"{name}.{i}"
            value_name = value_name if value_name not in values else f"{name}.{value_name}"
            if port is not None:
                value_of[port] = value_name
            storage = _storage(result, storages, value_name) if isinstance(result, fx.Node) else ""
            fake = fake_value(result) if isinstance(result, fx.Node) else result
            values[value_name] = axes.value(value_name, fake, storage, result in derived)
            outputs.append(value_name)
        writes, reads = _effects(graph, [values[value_of[a]].storage for a in n.args], effects or {})
        mark = region.mark or {}
        operators.append(
            Operator(
                name,
                Resource(mark.get("resource", Resource.COMPUTE)),
                tuple(value_of[a] for a in n.args),
                tuple(outputs),
                tuple(mark.get("tags") or ()),
                writes,
                reads,
                mark.get("group") or "",
                bool(mark.get("context")),
            )
        )
        capture.functions[name] = _callable(getattr(split, str(n.target)), single=len(results) == 1 and not bare)
        capture.pieces[name] = graph
    _own_if_written(values, operators, {values[n.name].storage for n in (*inputs, *constants)})
    results = next(n for n in split.graph.nodes if n.op == "output").args[0]
    leaves, spec = pytree.tree_flatten(results, is_leaf=lambda x: isinstance(x, fx.Node))
    wanted = [value_of[leaf] for leaf in leaves if isinstance(leaf, fx.Node)]
    capture.rebuild = _rebuilder(leaves, spec)
    reason = axes.reason or _not_mergeable(wanted, values, operators) or _shared_write(operators, values)
    reason = reason or _not_cuttable([n.name for n in inputs], values, operators)
    used = {v for o in operators for v in (*o.inputs, *o.outputs)} | {n.name for n in inputs} | set(wanted)
    program = Program(
        tuple(n.name for n in (*inputs, *constants)),
        tuple(dict.fromkeys(wanted)),
        {k: v for k, v in values.items() if k in used or k in {c.name for c in constants}},
        tuple(operators),
        reason,
    )
    capture.program = program
    add_into_variants(capture)
    return capture


def add_into_variants(capture: Capture, copy: bool = False, only: Set[str] | None = None) -> None:
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
            maker = buffer_maker(fake_value(result), value.axis or 0)
            if maker is not None:
                capture.buffers[v] = maker
                ports.append((i, v))
        variant, done = into_variant(capture.pieces[op.name], [i for i, _ in ports], copy)
        if done:
            capture.into[op.name] = variant
        names = tuple(v for i, v in ports if i in done)
        operators.append(Operator(**{**{f: getattr(op, f) for f in op.__slots__}, "into": names}))
    capture.program = Program(program.inputs, program.outputs, program.values, tuple(operators), program.unsplittable)


def hidden_edges(gm: fx.GraphModule, effects: EffectTable) -> dict[fx.Node, set[fx.Node]]:
    """Node -> earlier nodes it must follow because of in-place writes and declared engine state."""
    edges: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    writer: dict[Any, fx.Node] = {}
    readers: dict[Any, list[fx.Node]] = defaultdict(list)
    for n in gm.graph.nodes:
        if n.op not in CALLS:
            continue
        reads, writes = declared_effects(n, effects)
        written = {storage_id(a) for a in written_arguments(n)} | set(writes)
        for key in ({storage_id(a) for a in n.all_input_nodes} | set(reads) | written) - {None}:
            if key in writer:
                edges[n].add(writer[key])
            if key in written:
                edges[n].update(readers.pop(key, ()))
                writer[key] = n
            else:
                readers[key].append(n)
        edges[n].discard(n)
    return edges


def _effects(
    graph: fx.GraphModule, storages: list[str], effects: EffectTable
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Storages of arguments that the piece writes in place, and the engine states it writes and reads."""
    holders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    argument = {storage_id(p): s for p, s in zip(holders, storages, strict=True)}
    argument.pop(None, None)
    writes: dict[str, None] = {}
    reads: dict[str, None] = {}
    for n in _calls(graph):
        for a in written_arguments(n):
            if (storage := argument.get(storage_id(a))) is not None:
                writes[storage] = None
        read, wrote = declared_effects(n, effects)
        reads.update(dict.fromkeys(read))
        writes.update(dict.fromkeys(wrote))
    return tuple(writes), tuple(r for r in reads if r not in writes)


def _check_axes(graph: fx.GraphModule, axes: Axes) -> None:
    derived: set[fx.Node] = set()
    for n in graph.graph.nodes:
        if n.op == "placeholder":
            fake = fake_value(n)
            sizes = fake.shape if isinstance(fake, torch.Tensor) else ()
            if any(expression(s).free_symbols & axes.tokens for s in sizes):
                derived.add(n)
        elif any(a in derived for a in n.all_input_nodes):
            axes.check(n, derived=True)
            if not isinstance(fake_value(n), torch.SymInt | int):
                derived.add(n)
        else:
            axes.check(n, derived=False)


def _derived(graph: fx.GraphModule, given: list[bool]) -> set[fx.Node]:
    """The nodes of a piece that follow from its placeholders where `given`."""
    holders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    derived = {p for p, yes in zip(holders, given, strict=True) if yes}
    for n in graph.graph.nodes:
        if any(a in derived for a in n.all_input_nodes):
            derived.add(n)
    return derived


def _own_if_written(values: dict[str, Value], operators: list[Operator], given: Set[str]) -> None:
    """What an operator makes of weights only is the same for all, unless written in place later."""
    written = {s for o in operators for s in o.writes} - given
    for v in [v for o in operators for v in o.outputs]:
        if values[v].scope is Scope.SHARED and values[v].storage in written:
            values[v] = Value(v, Scope.LOCAL, None, values[v].storage)


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


def _storage(node: fx.Node, storages: dict[int, str], name: str = "") -> str:
    key = storage_id(node)
    return storages.setdefault(key, name or node.name) if key is not None else ""


def _calls(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.op in CALLS]


def _mark(graph: fx.GraphModule) -> dict[str, Any] | None:
    """The annotations of a piece that an engine cut, taken together. Beside other heavy work they give the
    piece its obligations (context, group), but neither name nor tags."""
    calls = _calls(graph)
    marks = [m for n in calls if (m := region_of(n))]
    if not marks:
        return None
    mark = {**marks[-1], "context": any(m.get("context") for m in marks)}
    if heavy([n for n in calls if not region_of(n)]):
        return {**mark, "name": "", "tags": [], "resource": Resource.COMPUTE}
    return {**mark, "tags": sorted({t for m in marks for t in m["tags"]})}


def _result(graph: fx.GraphModule) -> Any:
    return next(n for n in graph.graph.nodes if n.op == "output").args[0]


def _outputs(graph: fx.GraphModule) -> list[Any]:
    results = _result(graph)
    return list(results) if isinstance(results, tuple | list) else [results]


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


def _unique(names: Iterable[str]) -> list[str]:
    listed = list(names)
    total, seen, unique = Counter(listed), Counter[str](), list[str]()
    for name in listed:
        candidate = name
        while total[name] > 1 and (candidate == name or candidate in total or candidate in unique):
            candidate = f"{name}.{seen[name]}"
            seen[name] += 1
        unique.append(candidate)
    return unique


__all__ = ["COLLECTIVES", "Capture", "PartitionError", "capture_pieces", "hidden_edges", "partition"]
