"""Sets of a plan's actions, and which actions have finished when another one starts.

Contract
- An `ActionSet` is an integer whose bit i stands for action i: a plan of 4000 actions has as many sets of up to 4000
  members, which Python's sets would hold in gigabytes. `|` and `&` are union and intersection; the functions here
  are the other operations.
- `happens_before` is the transitive order of streams and events, and nothing else: issue order orders nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from dynaflow_serving.core.plan import ActionKind, Plan
from dynaflow_serving.errors import PlanError

ActionSet = int

NO_ACTIONS: ActionSet = 0


def only(index: int) -> ActionSet:
    """The set of one action."""
    return 1 << index


def set_of(indices: Iterable[int]) -> ActionSet:
    """The set of these actions."""
    actions = NO_ACTIONS
    for index in indices:
        actions |= only(index)
    return actions


def contains(actions: ActionSet, index: int) -> bool:
    """Whether action `index` is in `actions`."""
    return bool(actions >> index & 1)


def difference(actions: ActionSet, others: ActionSet) -> ActionSet:
    """The `actions` that are not among the `others`."""
    return actions & ~others


def latest(actions: ActionSet) -> int:
    """The action of a set that is issued last; the set is not empty."""
    return actions.bit_length() - 1


def happens_before(plan: Plan) -> list[ActionSet]:
    """For each action, the actions that have finished when it starts.

    Raises:
        PlanError: an event is recorded twice, or waited for before it is recorded.
    """
    before: list[ActionSet] = []
    through_last: dict[str, ActionSet] = {}  # stream -> its last action so far, and all before that
    through_record: dict[int, ActionSet] = {}  # event -> its RECORD, and all before that
    for index, action in enumerate(plan.actions):
        finished = through_last.get(action.stream, NO_ACTIONS)
        if action.kind is ActionKind.WAIT:
            if action.event not in through_record:
                raise PlanError(f"event e{action.event} is waited for before it is recorded", index)
            finished |= through_record[action.event]
        before.append(finished)
        through_last[action.stream] = finished | only(index)
        if action.kind is ActionKind.RECORD:
            if action.event in through_record:
                raise PlanError(f"event e{action.event} is recorded twice", index)
            through_record[action.event] = through_last[action.stream]
    return before
