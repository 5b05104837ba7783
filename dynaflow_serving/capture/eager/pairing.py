"""Two recordings of one model, compared: which dimension is the token axis, what is constant, what is made each time.

Contract
- The recordings have different numbers of tokens. A tensor's token axis is the one dimension that changed with them.
- A constant is the same object in both recordings.
- `match_recordings` returns None where the model took different paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dynaflow_serving.capture.eager.recording import BorderCall, RecordedTensor, Recording, Section, tensors_of

CONSTANT_TYPES = (int, float, str, bool, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, slots=True)
class TokenAxis:
    dim: int
    rows: int  # adjacent rows per token


def match_recordings(first: Recording, second: Recording, training: bool = False) -> RecordingPair | None:
    """Pair every tensor of `first` with its counterpart in `second`; None if the model took another path.

    Args:
        first: a run of the model.
        second: another one, with another number of tokens.
        training: whether gradients go through the model.
    """
    if len(first.events) != len(second.events) or first.spec != second.spec:
        return None
    if first.inputs.keys() != second.inputs.keys():
        return None
    pairs: list[tuple[Any, Any]] = [(first.inputs[leaf], second.inputs[leaf]) for leaf in first.inputs]
    for number, call in first.border_calls.items():
        other_call = second.border_call(number)
        if not _same_call(call, other_call):
            return None
        pairs += [(call.arguments[key], other_call.arguments[key]) for key in call.arguments]
        pairs += zip(call.results, other_call.results)
    pairs += zip(first.outputs, second.outputs)
    counterparts: dict[RecordedTensor, RecordedTensor] = {}
    for one, other in pairs:
        if isinstance(one, RecordedTensor) != isinstance(other, RecordedTensor):
            return None
        if not isinstance(one, RecordedTensor):
            continue
        if one.producer != other.producer or counterparts.setdefault(one, other) is not other:
            return None
    for section, other_section in zip(first.events, second.events):
        if isinstance(section, Section) and isinstance(other_section, Section):
            _pair_reads(section, other_section, counterparts)
    return RecordingPair(first, second, counterparts, training)


def _same_call(one: BorderCall, other: BorderCall) -> bool:
    return (
        one.border is other.border
        and one.arguments.keys() == other.arguments.keys()
        and len(one.results) == len(other.results)
    )


def _pair_reads(one: Section, other: Section, counterparts: dict[RecordedTensor, RecordedTensor]) -> None:
    """Pair the tensors that code reads and that no border call shows."""
    if len(one.reads) == len(other.reads):
        for tensor, counterpart in zip(one.reads, other.reads):
            if tensor.producer == counterpart.producer:
                counterparts.setdefault(tensor, counterpart)


class RecordingPair:
    """Questions about the tensors of the first recording, answered by comparison with the second."""

    def __init__(
        self,
        first: Recording,
        second: Recording,
        counterparts: dict[RecordedTensor, RecordedTensor],
        training: bool = False,
    ) -> None:
        self.first, self.second, self.training = first, second, training
        self._counterparts = counterparts
        self.readers = _readers(first)
        self.inputs = {leaf: t for leaf, t in first.inputs.items() if self.token_axis(t)}  # the arguments to cut

    def counterpart(self, tensor: RecordedTensor) -> RecordedTensor:
        """Return the tensor of the second recording. Raises `KeyError` where the recordings do not show it."""
        return self._counterparts[tensor]

    def token_axis(self, tensor: RecordedTensor) -> TokenAxis | None:
        counterpart = self._counterparts.get(tensor)
        if counterpart is None or len(tensor.shape) != len(counterpart.shape):
            return None
        changed = [d for d, (m, n) in enumerate(zip(tensor.shape, counterpart.shape)) if m != n]
        if len(changed) != 1:
            return None
        (dim,) = changed
        rows, rest = divmod(tensor.shape[dim], self.first.tokens)
        proportional = counterpart.shape[dim] == rows * self.second.tokens
        # In training a token is a sequence of [s, b, h], whose rows in [s * b, h] are not adjacent.
        fits = proportional and not rest and (rows == 1 or not self.training)
        return TokenAxis(dim, rows) if fits else None

    def is_constant(self, tensor: RecordedTensor) -> bool:
        counterpart = self._counterparts.get(tensor)
        return tensor.tensor is not None and counterpart is not None and tensor.tensor is counterpart.tensor

    def is_read(self, tensor: RecordedTensor) -> bool:
        return bool(self.readers.get(tensor))

    def add_alias(self, alias: RecordedTensor, tensor: RecordedTensor) -> None:
        """Let `alias` have the same counterpart as `tensor`."""
        if tensor in self._counterparts:
            self._counterparts[alias] = self._counterparts[tensor]

    def drop_tensors(self) -> None:
        """Let go of the tensors themselves, which may be large, once nothing asks for constants any more."""
        for tensor in (*self._counterparts, *self._counterparts.values()):
            tensor.tensor = None


def _readers(recording: Recording) -> dict[RecordedTensor, set[int]]:
    """Return the events that read each tensor; the number of events stands for the model's result."""
    readers: dict[RecordedTensor, set[int]] = {}
    for number, event in enumerate(recording.events):
        for tensor in event.reads if isinstance(event, Section) else tensors_of(event.arguments.values()):
            readers.setdefault(tensor, set()).add(number)
    for tensor in tensors_of(recording.outputs):
        readers.setdefault(tensor, set()).add(len(recording.events))
    return readers


def same_object(value: Any, other: Any) -> bool:
    """Whether two runs have passed the same: equal numbers and words, or one and the same object."""
    constants = isinstance(value, CONSTANT_TYPES) and type(value) is type(other)
    return value is other or (constants and bool(value == other))
