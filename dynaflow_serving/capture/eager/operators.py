"""Which operators a recorded model has, and how each is run: the cut.

Contract
- Every border call is an operator, and so is every section that cannot be folded into a neighbour.
- A border call is *plain* if its arguments are tensors and constants and it returns tensors. A plan may put it on any
  stream, merge it over micro-batches, or replace it by a kernel.
- A call of a collective with other arguments (the splits of an all-to-all) is *carried*: the plan has the call itself
  as a value, and may put it on any stream. In training, every collective is, forward or backward: its gradient begins
  at the call's own arguments (`gradients`). Any other border call needs its frame.
- An operator that runs a section *advances* its frame, up to the border call where the frame is suspended next.
- A frame *runs ahead* where only the next border call uses a plain border call's results, and the section between makes
  no call. The frame gets meta tensors for the results and goes on. The arguments of both calls are then known before
  either is made, and one kernel may replace both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from dynaflow_serving.capture.eager.pairing import CONSTANT_TYPES, RecordingPair, same_object
from dynaflow_serving.capture.eager.recording import BorderCall, RecordedTensor, Section, tensors_of
from dynaflow_serving.core.program import communicates


@dataclass(eq=False, slots=True)
class EagerOperator:
    """One operator: the event that it runs, and where it takes its frame."""

    event: int  # a section or a border call
    plain: bool = False  # a border call on values of the plan alone
    carried: bool = False  # a border call that is a value of the plan itself
    advances: bool = False  # whether it runs the model's own code
    comes_to: list[int] = field(default_factory=list)  # the border calls that its frame then comes to; none: the end
    inputs: list[RecordedTensor] = field(default_factory=list)
    outputs: list[RecordedTensor] = field(default_factory=list)


def cut_into_operators(pair: RecordingPair, states: Mapping[str, str]) -> Cut:
    """Cut a recorded model into operators.

    A plain border call without an input from the operator before it would be unordered, although the model's own order
    may matter. Such calls are not made plain. That changes what their neighbours hand over, so the cut is made again
    until there is none; each round takes at least one more call.

    Args:
        pair: the two recordings.
        states: name of a border -> the engine state that it reads and writes (attention -> "kv").
    """
    not_plain: set[int] = set()
    while True:
        cut = Cut(pair, states, not_plain)
        unordered = cut.unordered_calls()
        if not unordered:
            return cut
        not_plain |= unordered


class Cut:
    """The operators of a recorded model, and which of its tensors a plan holds."""

    def __init__(self, pair: RecordingPair, states: Mapping[str, str], not_plain: Iterable[int]) -> None:
        """Cut the model, with `not_plain` border calls bound to their frames, or carried."""
        self.pair, self.recording, self.states, self.training = pair, pair.first, states, pair.training
        self.operators: list[EagerOperator] = []
        self._not_plain = frozenset(not_plain)
        self._plain = {i: self._is_plain(i) for i in self.recording.border_calls}
        self.carried_calls = {  # event -> the call as a value
            i: RecordedTensor(i - 1, (), torch.uint8, -1 - i)
            for i, plain in self._plain.items()
            if not plain and self._is_carried(i)
        }
        self._folded = {i + 1 for i in self._plain if self._can_fold_section_after(i)}
        self._held = set(pair.inputs.values())  # what the plan holds; frames hold the rest
        self._aliases: dict[RecordedTensor, RecordedTensor] = {}  # tensor held by a frame -> as the plan gets it
        for number, event in enumerate(self.recording.events):
            if isinstance(event, BorderCall):
                self.operators.append(self._border_operator(number, event))
            elif number not in self._folded:
                self.operators.append(self._section_operator(number, event))

    def is_plain(self, event: int) -> bool:
        return self._plain[event]

    def plan_tensor(self, tensor: RecordedTensor) -> RecordedTensor:
        """Return `tensor` as the plan knows it."""
        return self._aliases.get(tensor, tensor)

    def unordered_calls(self) -> set[int]:
        """Return the plain border calls that no dataflow ties to the operator before them."""
        return {
            later.event
            for earlier, later in pairwise(self.operators)
            if later.plain and not set(earlier.outputs) & set(later.inputs)
        }

    # -- questions about events ---------------------------------------------------------------------
    def _is_plain(self, event: int) -> bool:
        call, other = self.recording.border_call(event), self.pair.second.border_call(event)
        if event in self._not_plain or call.border.rule.context or call.own_state or call.border.name in self.states:
            return False
        if self.training and communicates(call.border.rule.resource, call.border.rule.gradient):
            return False
        objects = {k: v for k, v in call.arguments.items() if not isinstance(v, RecordedTensor)}
        return (
            any(self.pair.is_read(r) for r in tensors_of(call.results))
            and all(isinstance(r, (RecordedTensor, *CONSTANT_TYPES)) for r in call.results)
            and all(same_object(v, other.arguments[k]) for k, v in objects.items())
        )

    def _is_carried(self, event: int) -> bool:
        call = self.recording.border_call(event)
        rule, bound = call.border.rule, call.own_dispatch or call.border.name in self.states
        return (
            communicates(rule.resource, rule.gradient)
            and not (rule.context or bound)
            and all(isinstance(r, (RecordedTensor, *CONSTANT_TYPES)) for r in call.results)
        )

    def _can_fold_section_after(self, event: int) -> bool:
        """Whether the section after a border call needs no operator: it calls nothing, and nothing waits for it."""
        section = event + 1
        if self.recording.section(section).paths or {event, event + 2} & self.carried_calls.keys():
            return False
        if self._plain[event] and self.training:
            return False  # a frame that runs ahead has meta tensors, through which no gradient goes
        if not self._plain[event]:
            return True  # the border call's own operator advances the frame
        if section == len(self.recording.events) - 1:
            return not any(self._is_made_by_section(t) for t in tensors_of(self.recording.outputs))
        following = event + 2
        arguments = tensors_of(self.recording.border_call(following).arguments.values())
        if any(t.producer == section and not self.pair.is_constant(t) for t in arguments):
            return False
        results = tensors_of(self.recording.border_call(event).results)
        return all(self.pair.readers.get(r, set()) <= {following} for r in results)

    def _is_made_by_section(self, tensor: RecordedTensor) -> bool:
        return not tensor.is_argument and isinstance(self.recording.events[tensor.producer], Section)

    # -- making operators ---------------------------------------------------------------------------
    def _section_operator(self, number: int, section: Section) -> EagerOperator:
        if number == 0:
            given = list(self.pair.inputs.values())
        else:
            results = tensors_of(self.recording.border_call(number - 1).results)
            given = [r for r in results if self.pair.is_read(r)]
        reads = [t for t in section.reads if not t.is_argument or t in self._held]
        operator = EagerOperator(number, advances=True, inputs=list(dict.fromkeys((*given, *reads))))
        self._advance(operator, number)
        return operator

    def _border_operator(self, number: int, call: BorderCall) -> EagerOperator:
        plain = self._plain[number]
        operator = EagerOperator(
            number,
            plain=plain,
            carried=number in self.carried_calls,
            advances=not plain and number + 1 in self._folded,
            inputs=list(dict.fromkeys(map(self.plan_tensor, tensors_of(call.arguments.values())))),
            outputs=list(dict.fromkeys(tensors_of(call.results))),
        )
        if operator.carried:
            operator.inputs.append(self.carried_calls[number])
        if operator.advances:
            self._advance(operator, number + 1)
        return operator

    def _advance(self, operator: EagerOperator, section: int) -> None:
        """Note the border calls that `section`, run by `operator`, leads to, and what the plan gets to see there."""
        operator.comes_to = self._calls_after(section)
        operator.outputs += [
            t
            for t, readers in self.pair.readers.items()
            if t.producer == section and readers - {section} and not self.pair.is_constant(t)
        ]
        shown: list[RecordedTensor] = []  # where the frame is suspended, the plan can see these
        for event in operator.comes_to:
            call = self.recording.border_call(event)
            shown += tensors_of(call.arguments.values())
            if event in self.carried_calls:
                operator.outputs.append(self.carried_calls[event])
            if not (self.training and event in self.carried_calls):
                # Else the plan's results begin no graph of the frame's: others get them from the frame (`gradients`).
                self._held.update(tensors_of(call.results))
        if not operator.comes_to:
            shown = tensors_of(self.recording.outputs)
        self._held.update(t for t in shown if t.producer == section)
        for tensor in dict.fromkeys(shown):
            if tensor not in self._held and tensor not in self._aliases and not self.pair.is_constant(tensor):
                self._hand_over(tensor, operator)

    def _hand_over(self, tensor: RecordedTensor, operator: EagerOperator) -> None:
        """Let the plan have a tensor that only frames held, as an output of `operator`."""
        alias = RecordedTensor(operator.event, tensor.shape, tensor.dtype, tensor.storage)
        self.pair.add_alias(alias, tensor)
        self._aliases[tensor] = alias
        operator.outputs.append(alias)
        if not tensor.is_argument and tensor not in operator.inputs:
            operator.inputs.append(tensor)

    def _calls_after(self, section: int) -> list[int]:
        """Return the border calls that a frame comes to from `section`: the next, and those that it runs ahead to."""
        calls: list[int] = []
        for event in range(section + 1, len(self.recording.events), 2):
            calls.append(event)
            runs_ahead = self._plain[event] and event + 1 in self._folded
            if not runs_ahead:
                break
        return calls
