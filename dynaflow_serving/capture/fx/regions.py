"""Which nodes form one operator.

Contract
- A run of adjacent nodes under one annotation is one operator.
- The nodes between two annotated runs are separated where a schedule could use it. Nodes of one operator follow and
  precede the same network operators, so that a shared expert is not glued to the gate. They are connected.
- A region without heavy arithmetic is merged into a neighbour: a scalar multiply is no operator. It stays apart where
  the neighbour would have to wait for, or would hold up, one more network operator.
- The operators' order is a valid order of the graph, in-place writes included. It depends on the graph alone.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dynaflow_serving.capture.fx.matching import calls, region_of
from dynaflow_serving.capture.names import operator_name
from dynaflow_serving.core.program import Resource
from dynaflow_serving.strategy.rules import function_names, module_stack

_HEAVY = {
    "mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "einsum", "conv1d", "conv2d", "conv3d", "convolution",
    "scaled_dot_product_attention", "__matmul__",
}  # fmt: skip

Predecessors = Mapping[fx.Node, Sequence[fx.Node]]


@dataclass(frozen=True, slots=True)
class NetworkNeighbours:
    """The network nodes that come before and after a node, directly or through others."""

    before: frozenset[fx.Node] = frozenset()
    after: frozenset[fx.Node] = frozenset()

    def within(self, other: NetworkNeighbours) -> bool:
        """Whether `other` waits for, and holds up, all of these already."""
        return self.before <= other.before and self.after <= other.after


@dataclass(eq=False, slots=True)
class Region:
    """The nodes of one operator."""

    nodes: list[fx.Node]
    mark: dict[str, Any] | None  # its annotation; None between annotated runs
    first: int  # position of its first node in the graph
    gap: int  # how many annotated runs begin before it
    network: NetworkNeighbours = NetworkNeighbours()
    preds: set[Region] = field(default_factory=set)


def find_regions(gm: fx.GraphModule, hidden: Mapping[fx.Node, set[fx.Node]]) -> list[Region]:
    """Return the regions of a graph in a valid order.

    Args:
        gm: the graph.
        hidden: node -> earlier nodes that it must follow, beyond its arguments.
    """
    nodes = calls(gm)
    position = {n: i for i, n in enumerate(nodes)}
    preds = {n: [p for p in (*n.all_input_nodes, *hidden.get(n, ())) if p in position] for n in nodes}
    runs = _annotated_runs(nodes, position)
    regions = [*runs, *_branches(nodes, preds, runs)]
    region_of_node = {n: r for r in regions for n in r.nodes}
    for n in nodes:
        region_of_node[n].preds |= {region_of_node[p] for p in preds[n]} - {region_of_node[n]}
    return _in_order(_merge_light(regions))


def region_name(region: Region) -> str:
    """Return the name of the region's operator, which other regions may have too."""
    paths = [stack[-1][0] for n in region.nodes if (stack := module_stack(n))]
    return operator_name(paths, region.mark["name"] if region.mark else "")


def piece_region(graph: fx.GraphModule, index: int) -> Region:
    """Return the region of the `index`-th piece that an engine cut.

    Its annotations are taken together. Beside other heavy work they give the piece its obligations (context, group),
    but neither name nor tags.
    """
    nodes = calls(graph)
    marks = [m for n in nodes if (m := region_of(n))]
    if not marks:
        return Region(nodes, None, index, index)
    mark = {**marks[-1], "context": any(m.get("context") for m in marks)}
    if heavy([n for n in nodes if not region_of(n)]):
        mark |= {"name": "", "tags": [], "resource": Resource.COMPUTE}
    else:
        mark |= {"tags": sorted({t for m in marks for t in m["tags"]})}
    return Region(nodes, mark, index, index)


# -- annotated runs ------------------------------------------------------------------------------------------
def _annotated_runs(nodes: list[fx.Node], position: Mapping[fx.Node, int]) -> list[Region]:
    """Return the runs of adjacent nodes that share an annotation."""
    runs: list[Region] = []
    previous: tuple[Any, ...] | None = None  # the run that the node before belongs to
    for node in nodes:
        waits = bool(function_names(node) & {"wait_tensor"}) and previous is not None
        if waits and region_of(node) is None:
            node.meta["custom"] = runs[-1].nodes[-1].meta["custom"]
        mark = region_of(node)
        # A collective and its wait are one operator.
        run = previous if waits else _run_key(node, mark)
        if mark is not None and run != previous:
            runs.append(Region([], mark, position[node], gap=len(runs)))
        if mark is not None:
            runs[-1].nodes.append(node)
        previous = run
    return runs


def _run_key(node: fx.Node, mark: dict[str, Any] | None) -> tuple[Any, ...] | None:
    """Return what adjacent nodes of one run share: the mark's name, and the match of the rule or the layer."""
    if mark is None:
        return None
    layers = [path for path, _ in module_stack(node) if path.rpartition(".")[2].isdigit()]
    return mark["name"], mark.get("instance", layers[-1] if layers else None)


# -- branches between them -----------------------------------------------------------------------------------
def _branches(nodes: list[fx.Node], preds: Predecessors, runs: list[Region]) -> list[Region]:
    """Return the other nodes, grouped by gap and network neighbours into connected branches."""
    gap_of = _gaps(nodes, runs)
    neighbours = _network_neighbours(nodes, preds)
    adjacent: dict[fx.Node, list[fx.Node]] = {n: [] for n in gap_of}
    for n in adjacent:
        for p in preds[n]:
            if p in adjacent and gap_of[p] == gap_of[n] and neighbours[p] == neighbours[n]:
                adjacent[n].append(p)
                adjacent[p].append(n)
    position = {n: i for i, n in enumerate(nodes)}
    branches = []
    for component in _connected_components(adjacent):
        component.sort(key=position.__getitem__)
        first = component[0]
        branches.append(Region(component, None, position[first], gap_of[first], neighbours[first]))
    return branches


def _gaps(nodes: list[fx.Node], runs: list[Region]) -> dict[fx.Node, int]:
    """Return, for each node outside `runs`, how many of them begin before it."""
    run_of = {n: r for r in runs for n in r.nodes}
    gaps: dict[fx.Node, int] = {}
    begun = 0
    for n in nodes:
        if n in run_of:
            begun = run_of[n].gap + 1
        else:
            gaps[n] = begun
    return gaps


def _network_neighbours(nodes: list[fx.Node], preds: Predecessors) -> dict[fx.Node, NetworkNeighbours]:
    network = {n for n in nodes if (mark := region_of(n)) and Resource(mark["resource"]) is Resource.NETWORK}
    before: dict[fx.Node, frozenset[fx.Node]] = {}
    after: dict[fx.Node, frozenset[fx.Node]] = dict.fromkeys(nodes, frozenset())
    for n in nodes:
        before[n] = frozenset().union(*(before[p] for p in preds[n]), network.intersection(preds[n]))
    for n in reversed(nodes):
        own = {n} if n in network else set()
        for p in preds[n]:
            after[p] = after[p].union(after[n], own)
    return {n: NetworkNeighbours(before[n], after[n]) for n in nodes}


def _connected_components(adjacent: Mapping[fx.Node, Sequence[fx.Node]]) -> list[list[fx.Node]]:
    """Return the components of an undirected graph, in the order of their first nodes."""
    components: list[list[fx.Node]] = []
    seen: set[fx.Node] = set()
    for start in adjacent:
        if start in seen:
            continue
        seen.add(start)
        component = [start]
        for node in component:  # grows meanwhile
            new = [n for n in dict.fromkeys(adjacent[node]) if n not in seen]
            seen.update(new)
            component += new
        components.append(component)
    return components


# -- light regions -------------------------------------------------------------------------------------------
def _merge_light(regions: list[Region]) -> list[Region]:
    """Merge light unmarked regions, the last first, into a consumer of their gap, or else into the nearest region."""
    kept = dict.fromkeys(regions)  # a set with an order: which of two equally near regions wins must not vary
    for light in sorted((r for r in regions if r.mark is None and not heavy(r.nodes)), key=lambda r: -r.first):
        for target in _merge_candidates(light, kept):
            if not _path_through_others(light, target) and not _path_through_others(target, light):
                del kept[light]
                _merge(light, target, kept)
                break
    return list(kept)


def _merge_candidates(light: Region, regions: Iterable[Region]) -> list[Region]:
    """Return the unmarked regions of its gap that would neither wait longer nor hold up more; the best first."""
    found = [
        r
        for r in regions
        if r is not light and r.mark is None and r.gap == light.gap and light.network.within(r.network)
    ]
    return sorted(found, key=lambda r: (light not in r.preds, abs(r.first - light.first)))


def heavy(nodes: list[fx.Node]) -> bool:
    """Whether the nodes are worth an operator of their own: matrix products, custom operators."""
    for n in nodes:
        if n.op == "call_module" or function_names(n) & _HEAVY:
            return True
        custom = isinstance(n.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
        if custom and str(n.target).partition(".")[0] not in ("aten", "prims"):
            return True
    return False


def _path_through_others(source: Region, sink: Region) -> bool:
    """Whether `sink` follows `source` by way of a third region: merging the two would make a cycle."""
    stack, seen = [p for p in sink.preds if p is not source], set()
    while stack:
        r = stack.pop()
        if r is source:
            return True
        if r not in seen and r.gap >= source.gap:  # regions of earlier gaps cannot follow
            seen.add(r)
            stack += r.preds
    return False


def _merge(light: Region, target: Region, regions: Iterable[Region]) -> None:
    target.nodes += light.nodes
    target.first = min(target.first, light.first)
    target.preds = (target.preds | light.preds) - {target, light}
    for r in regions:
        if light in r.preds and r is not target:
            r.preds = (r.preds - {light}) | {target}


def _in_order(regions: list[Region]) -> list[Region]:
    """Return the regions in topological order, and in the graph's own order where that leaves a choice."""
    successors: dict[Region, list[Region]] = defaultdict(list)
    missing = {r: len(r.preds) for r in regions}
    for r in regions:
        for p in r.preds:
            successors[p].append(r)
    region_at = {r.first: r for r in regions}  # no two regions begin at one node
    ready = [r.first for r in regions if not missing[r]]
    heapq.heapify(ready)
    ordered = []
    while ready:
        region = region_at[heapq.heappop(ready)]
        ordered.append(region)
        for s in successors[region]:
            missing[s] -= 1
            if not missing[s]:
                heapq.heappush(ready, s.first)
    return ordered
