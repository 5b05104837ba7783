"""Independent branches of the graph run side by side, without a split.

Such branches are the shared expert of a MoE layer and its routed experts, or the two halves of a dual-stream DiT block.

    compute  attention  gate  dispatch  experts  combine  next layer
    side                      shared expert

The chain with the most heavy operators stays on the compute stream. What is left falls apart into branches (connected
components); each branch with a heavy operator goes to a side stream, light ones stay. An operator is heavy if it reads
weights, has a tag, or is bound by the network: a Program has no costs, and partition leaves few others.

**Contract**
- Every branch moved aside has something heavy to run beside: a heavy operator off the chain that was ordered with
  all heavy ones on it would have made a longer chain.
- Two branches share a side stream only if one follows the other, or no side stream is left.
- Unmeasured: no figure of this strategy on a GPU exists yet.
"""

from __future__ import annotations

from pydantic import Field

from dynaflow_serving.core.order import order_edges
from dynaflow_serving.core.program import Operator, Program, Resource, Scope
from dynaflow_serving.strategy.base import Options, UnsplitScheduler
from dynaflow_serving.strategy.registry import register_strategy
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.streams import COMPUTE


class BranchesOptions(Options):
    side_streams: int = Field(1, ge=1, description="streams for branches beside the longest chain: side0, side1, ...")


@register_strategy("branches")
class Branches(UnsplitScheduler[BranchesOptions]):
    unsplit_reason = "branches overlap without a split"

    def schedule(self, s: Schedule) -> None:
        stream_of = side_streams(s.program, self.options.side_streams)
        while ready := s.get_ready_ops():
            # side branches first: they should be on their way while the chain still computes
            task = min(ready, key=lambda t: (t.micro_batch, t.name not in stream_of))
            s.execute(task, stream=stream_of.get(task.name, COMPUTE))


def side_streams(program: Program, streams: int) -> dict[str, str]:
    """Map each operator that leaves the compute stream to its side stream."""
    before = order_edges(program)
    place = {name: i for i, name in enumerate(before)}
    heavy = {o.name for o in program.operators if _heavy(program, o)}
    ancestors: dict[str, set[str]] = {}
    length: dict[str, tuple[int, int]] = {}  # (heavy operators, operators) of the longest chain that ends there
    component: dict[str, set[str]] = {}
    for name, edges in before.items():
        ancestors[name] = edges.union(*(ancestors[e] for e in edges))
        longest = max((length[e] for e in edges), default=(0, 0))
        length[name] = longest[0] + (name in heavy), longest[1] + 1
    main: set[str] = set()
    chain = list(before)
    while chain:  # backwards, the first in program order among equals
        last = max(chain, key=length.__getitem__)
        main.add(last)
        chain = sorted(before[last], key=place.__getitem__)
    for name in (n for n in before if n not in main):
        joined = {name}.union(*(component[e] for e in before[name] - main))
        component.update(dict.fromkeys(joined, joined))
    branches = [b for b in {id(c): c for c in component.values()}.values() if b & heavy]
    users: list[list[set[str]]] = [[] for _ in range(streams)]
    for branch in branches:
        above = set().union(*(ancestors[n] for n in branch))
        free = [u for u in users if all(other <= above for other in u)]
        (free or sorted(users, key=len))[0].append(branch)
    return {n: f"side{i}" for i, user in enumerate(users) for branch in user for n in branch}


def _heavy(program: Program, op: Operator) -> bool:
    weights = any(program.values[v].scope is Scope.SHARED for v in op.inputs)
    return weights or bool(op.tags) or op.resource is Resource.NETWORK
