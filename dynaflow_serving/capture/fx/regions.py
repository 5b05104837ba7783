"""Which nodes form one operator.

Contract
- A run of adjacent nodes under one annotation is one operator.
- Between annotated operators, nodes are kept in the order of the graph, and separated where a schedule
  could use it: by which network operators they follow and precede (so a shared expert is not glued to
  the gate), and into unconnected branches.
- A branch without heavy arithmetic is absorbed by a neighbour, unless that would make the neighbour wait
  for, or hold up, one more network operator: a scalar multiply is no operator.
- The operators' order is a valid order of the graph, in-place writes included.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
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


@dataclass(eq=False, slots=True)
class Region:
    """The nodes of one operator; `mark` is its annotation, None between annotations."""

    nodes: list[fx.Node]
    mark: dict[str, Any] | None
    first: int
    segment: int
    network: tuple[int, int] = (0, 0)  # bit masks of the network operators before and after it
    preds: set[Region] = field(default_factory=set)


def find_regions(gm: fx.GraphModule, hidden: dict[fx.Node, set[fx.Node]]) -> list[Region]:
    """Regions in a valid order. `hidden`: node -> earlier nodes it must follow beyond its arguments."""
    nodes = calls(gm)
    index = {n: i for i, n in enumerate(nodes)}
    preds = {n: [p for p in (*n.all_input_nodes, *hidden.get(n, ())) if p in index] for n in nodes}
    regions, segment_of = _marked_runs(nodes, index)
    home = {n: r for r in regions for n in r.nodes}
    signature = _signatures(nodes, preds)
    regions += _branches([n for n in nodes if n not in home], preds, segment_of, signature, index)
    home = {n: r for r in regions for n in r.nodes}
    for n in nodes:
        home[n].preds |= {home[p] for p in preds[n]} - {home[n]}
    return _order(_absorb(regions))


def region_name(region: Region) -> str:
    paths = [stack[-1][0] for n in region.nodes if (stack := module_stack(n))]
    return operator_name(paths, region.mark["name"] if region.mark else "")


def piece_region(graph: fx.GraphModule, index: int) -> Region:
    """The region of the `index`-th piece that an engine cut. Its annotations are taken together; beside other
    heavy work they give the piece its obligations (context, group), but neither name nor tags."""
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


def _marked_runs(nodes: list[fx.Node], index: dict[fx.Node, int]) -> tuple[list[Region], dict[fx.Node, int]]:
    regions: list[Region] = []
    segment_of: dict[fx.Node, int] = {}
    previous: tuple[Any, ...] | None = None
    for n in nodes:
        mark = region_of(n)
        if mark is None and function_names(n) & {"wait_tensor"} and previous is not None:
            n.meta["custom"] = regions[-1].nodes[-1].meta["custom"]  # a collective and its wait are one operator
            mark = regions[-1].mark
        key = None
        if mark is not None:
            layer = [path for path, _ in module_stack(n) if path.rpartition(".")[2].isdigit()]
            key = (mark["name"], mark.get("instance", layer[-1:] and layer[-1]))
            if function_names(n) & {"wait_tensor"}:
                key = previous
            if key != previous:
                regions.append(Region([], mark, index[n], len(regions)))
            regions[-1].nodes.append(n)
        segment_of[n] = len(regions)
        previous = key
    return regions, segment_of


def _signatures(nodes: list[fx.Node], preds: dict[fx.Node, list[fx.Node]]) -> dict[fx.Node, tuple[int, int]]:
    """Per node, bit masks of the network operators before and after it."""
    network = {n: 1 << i for i, n in enumerate(n for n in nodes if _resource(n) is Resource.NETWORK)}
    before: dict[fx.Node, int] = {}
    after: dict[fx.Node, int] = defaultdict(int)
    for n in nodes:
        before[n] = 0
        for p in preds[n]:
            before[n] |= before[p] | network.get(p, 0)
    for n in reversed(nodes):
        for p in preds[n]:
            after[p] |= after[n] | network.get(n, 0)
    return {n: (before[n], after[n]) for n in nodes}


def _resource(node: fx.Node) -> Resource:
    region = region_of(node)
    return Resource(region["resource"]) if region else Resource.COMPUTE


def _branches(
    nodes: list[fx.Node],
    preds: dict[fx.Node, list[fx.Node]],
    segment_of: dict[fx.Node, int],
    signature: dict[fx.Node, tuple[int, int]],
    index: dict[fx.Node, int],
) -> list[Region]:
    """Weakly connected components of the unmarked nodes with one segment and signature."""
    parent = {n: n for n in nodes}

    def find(n: fx.Node) -> fx.Node:
        while parent[n] is not n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    for n in nodes:
        for p in preds[n]:
            if p in parent and segment_of[p] == segment_of[n] and signature[p] == signature[n]:
                parent[find(n)] = find(p)
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for n in nodes:
        groups[find(n)].append(n)
    return [Region(g, None, index[g[0]], segment_of[g[0]], signature[g[0]]) for g in groups.values()]


def _absorb(regions: list[Region]) -> list[Region]:
    """Merge light unmarked regions into a consumer, or else another neighbour, of their segment."""
    alive = set(regions)
    for light in sorted((r for r in regions if r.mark is None and not heavy(r.nodes)), key=lambda r: -r.first):
        peers = [r for r in alive if r is not light and r.mark is None and r.segment == light.segment]
        peers = [r for r in peers if not any(mine & ~theirs for mine, theirs in zip(light.network, r.network))]
        peers.sort(key=lambda r: (light not in r.preds, abs(r.first - light.first)))
        for peer in peers:
            if not _path_through_others(light, peer) and not _path_through_others(peer, light):
                _merge(light, peer, alive)
                break
    return list(alive)


def heavy(nodes: list[fx.Node]) -> bool:
    """Whether there is work worth an operator of its own: matrix products, custom operators."""
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
        if r not in seen and r.segment >= source.segment - 1:
            seen.add(r)
            stack += r.preds
    return False


def _merge(light: Region, peer: Region, alive: set[Region]) -> None:
    alive.remove(light)
    peer.nodes += light.nodes
    peer.first = min(peer.first, light.first)
    peer.preds = (peer.preds | light.preds) - {peer, light}
    for r in alive:
        if light in r.preds and r is not peer:
            r.preds = (r.preds - {light}) | {peer}


def _order(regions: list[Region]) -> list[Region]:
    """Topological order, the graph's own order among equals."""
    successors: dict[Region, list[Region]] = defaultdict(list)
    missing = {r: len(r.preds) for r in regions}
    for r in regions:
        for p in r.preds:
            successors[p].append(r)
    heap = [(r.first, i, r) for i, r in enumerate(regions) if not missing[r]]
    heapq.heapify(heap)
    ordered = []
    while heap:
        _, i, r = heapq.heappop(heap)
        ordered.append(r)
        for s in successors[r]:
            missing[s] -= 1
            if not missing[s]:
                heapq.heappush(heap, (s.first, len(ordered) * len(regions) + i, s))
    return ordered
