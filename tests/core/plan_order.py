"""The order of a plan's actions, found without the verifier's own bookkeeping."""

from __future__ import annotations

import dataclasses

from dynaflow_serving.core.plan import COMPUTE_STREAM, ActionKind, Plan

EVENTS = (ActionKind.RECORD, ActionKind.WAIT)
ENTRY, END = -1, -2
Closure = set[tuple[object, object]]


def identities(plan: Plan) -> list[object]:
    """What an action does, its stream left out: the same action in golden plan and mutant."""
    return [dataclasses.replace(s, stream="") if s.kind not in EVENTS else None for s in plan.actions]


def closure(plan: Plan) -> Closure:
    """(earlier, later) pairs of work actions, ENTRY and END. Raises `ValueError` for a wait without a record."""
    ids = identities(plan)
    reach: list[set[object]] = []  # per action: what is finished when it is
    last: dict[str, set[object]] = {COMPUTE_STREAM: {ENTRY}}
    events: dict[int, set[object]] = {}
    pairs: Closure = set()
    for action, me in zip(plan.actions, ids, strict=True):
        before = last.get(action.stream, set())
        if action.kind is ActionKind.WAIT:
            if action.event not in events:
                raise ValueError("a wait comes before its record")
            before = before | events[action.event]
        if action.kind is ActionKind.RECORD:
            events[action.event] = before
        if me is not None:
            pairs |= {(b, me) for b in before}
            before = before | {me}
        reach.append(before)
        last[action.stream] = before
    return pairs | {(b, END) for b in last[COMPUTE_STREAM]}
