"""`GuidancePairs` foresees the second call of a guidance pair, and keeps its result until the pipeline asks for it.

Classifier-free guidance calls the denoiser twice per step: with the prompt and without. Pipelines make these two calls
one after the other, on the same latents. Once a pair has been seen, the first call of the next step tells the second
one, so that both can be run together.

Contract
- A pair is two calls in a row with the same latents that differ in tensors of equal shapes only. The next pair is
  expected where a call agrees with the pair's first one in what distinguishes the two, and the second one's own
  arguments are unchanged.
- A kept result is handed out only for exactly the arguments that it was computed from. For any other call it is
  dropped, and pairs are no longer expected until one is seen again. So a wrong guess costs time, never a wrong result.
- What a call depends on besides its arguments (weights, contexts) must be the same in both calls of a pair.
- All ranks see the same calls, so they foresee the same.
"""

from __future__ import annotations

from typing import Any

import torch

from dynaflow_serving.errors import PartitionError
from dynaflow_serving.integrations.diffusion.calls import Call

NO_PAIR = "no guidance pair is expected: the two calls of a step have not been seen yet, or there is only one"
WASTED = "the second call of a guidance pair came with other arguments than foreseen, and was computed anew"


class GuidancePairs:
    """The calls of one denoiser."""

    def __init__(self) -> None:
        self._wasted = False  # whether the call that is made now was to have a kept result
        self._pair: tuple[Call, Call, frozenset[int]] | None = None  # the latest, and in which leaves it differs
        self._last: Call | None = None  # the latest call that was run alone
        self._kept: tuple[Call, Any] | None = None

    def keep(self, call: Call, result: Any) -> None:
        """Keep the `result` of a foreseen `call`."""
        self._kept = (call, result)

    def take(self, call: Call) -> tuple[bool, Any]:
        """Return whether the result of `call` was kept, and that result."""
        if self._kept is None:
            return False, None
        (foreseen, result), self._kept = self._kept, None
        if foreseen.equals(call):
            return True, result
        self.forget()
        self._wasted = True
        return False, None

    def forget(self) -> None:
        """Expect no pair, until one is seen again."""
        self._pair = self._last = self._kept = None

    def foresee(self, call: Call) -> Call | None:
        """Return the call that is expected to follow `call`, or None."""
        if self._pair is None:
            return None
        first, second, apart = self._pair
        alike = first.spec == call.spec and first.rows == call.rows
        if not alike or not all(first.agrees(call, i) and second.unchanged(i) for i in apart):
            self.forget()
            return None
        leaves = [second.leaves[i] if i in apart else leaf for i, leaf in enumerate(call.leaves)]
        return Call(leaves, call.spec, call.shared)

    def saw(self, call: Call) -> str:
        """Note a `call` that is run alone, and return why; it may be the second one of a pair."""
        last, self._last = self._last, call
        wasted, self._wasted = self._wasted, False
        reason = WASTED if wasted else NO_PAIR
        if last is None or call.latents is None or last.spec != call.spec or not last.agrees(call, call.latents):
            return reason
        leaves = range(len(call.leaves))
        apart = frozenset(i for i in leaves if not last.agrees(call, i) and not last.alike(call, i))
        if not apart:
            return reason
        if difference := _unjoinable(last, call, apart):
            return f"the two calls of a guidance pair cannot be joined: {difference}"
        self._pair, self._last = (last, call, apart), None
        return reason


def joined(first: Call, second: Call) -> Call:
    """Return one call with the rows of the two calls of a pair; what holds no batch is the same in both.

    Raises:
        PartitionError: Something that all rows share differs.
    """
    for i, (a, b) in enumerate(zip(first.leaves, second.leaves)):
        if i in first.shared and a is not b:
            raise PartitionError(
                f"the calls of a guidance pair differ in argument {i}, which the model takes once for all rows"
            )
    leaves = [
        torch.cat([a, b]) if first.holds_batch(i) else a for i, (a, b) in enumerate(zip(first.leaves, second.leaves))
    ]
    return Call(leaves, first.spec, first.shared)


def _unjoinable(first: Call, second: Call, apart: frozenset[int]) -> str:
    """Say which argument keeps two calls that are `apart` in some leaves from being joined; "" if none does."""
    for i in sorted(apart):
        a, b = first.leaves[i], second.leaves[i]
        if not (first.holds_batch(i) and isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype):
            return f"argument {i} is {_shown(a)} in one and {_shown(b)} in the other"
    return ""


def _shown(leaf: Any) -> str:
    return f"a tensor {list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(leaf)
