"""The order in which a plan is issued for graph capture, so that its replay needs few streams ("lanes").

At replay the driver maps the nodes of a CUDA graph to streams of its own. Observed on running models
(sglang#39420: 144 lanes, three new ones per layer; sglang#40640: 96 -> 4): a node that joins several branches
continues on the lane of its first-recorded parent, and a branch recorded before the main chain drags the
main chain to a new lane at every join.

Contract
- `reorder` is a permutation of the actions that keeps the order within every stream and each RECORD before its
  WAITs, hence the happens-before relation exactly. Only FREEs may meet another issue order; `verify` the result.
- The compute stream is issued first, and a side stream's actions right before the WAIT that joins them.
- `lanes` is a model of the rule above, not a measurement: it explains both reports, and is unmeasured here.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from dynaflow_serving.core.plan import Action, ActionKind, Plan

LAUNCHES = (ActionKind.RUN, ActionKind.REPLACE, ActionKind.MERGE)  # actions that become nodes of a graph


def reorder(plan: Plan) -> Plan:
    """`plan` with the compute stream's actions as early, and the others' as late, as waits allow."""
    queues: dict[str, list[Action]] = defaultdict(list)
    recorded: dict[int, tuple[str, int]] = {}  # event -> (stream, position there)
    for action in plan.actions:
        if action.kind is ActionKind.RECORD:
            recorded[action.event] = (action.stream, len(queues[action.stream]))
        queues[action.stream].append(action)
    issued = dict.fromkeys(queues, 0)
    actions: list[Action] = []

    def issue(stream: str, stop: int) -> None:
        # A stream in progress is never asked for more than it has issued, or the plan would wait in a circle:
        # the recursion is no deeper than there are streams.
        while issued[stream] < stop:
            action = queues[stream][issued[stream]]
            if action.kind is ActionKind.WAIT:
                other, position = recorded[action.event]
                issue(other, position + 1)
            issued[stream] += 1
            actions.append(action)

    for stream in plan.streams:  # compute first; what is left of the others nobody waits for
        if stream in queues:
            issue(stream, len(queues[stream]))
    return dataclasses.replace(plan, actions=tuple(actions))


def lanes(plan: Plan) -> int:
    """How many lanes the captured graph of `plan` needs: a node continues on the lane of its first-recorded parent
    that no other node has continued, else it opens a lane. Lanes are not reused."""
    last: dict[str, tuple[int, ...]] = defaultdict(tuple)  # stream -> nodes that its next one depends on
    snapshot: dict[int, tuple[int, ...]] = {}
    lane: list[int] = []  # of each node, in the order of recording
    tip: list[int] = []  # of each lane, its last node
    for action in plan.actions:
        if action.kind is ActionKind.RECORD:
            snapshot[action.event] = last[action.stream]
        elif action.kind is ActionKind.WAIT:
            last[action.stream] += snapshot[action.event]
        elif action.kind in LAUNCHES:
            node = len(lane)
            continued = (lane[p] for p in sorted(last[action.stream]) if tip[lane[p]] == p)
            mine = next(continued, len(tip))
            if mine == len(tip):
                tip.append(node)
            tip[mine] = node
            lane.append(mine)
            last[action.stream] = (node,)
    return len(tip)
