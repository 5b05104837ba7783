"""Calls of one function as frames that take turns: the collectives of one run beside the compute of the others.

Contract
- `InTurn` is for kernels that cut an operator into parts. Each part is a frame, which stops where the function
  communicates. A part goes on when its collective has ended, in the order of the parts.
- The collectives go to one stream, in the order in which the parts come to them, on all ranks alike. No plan has that
  stream: one that is running may hold its own streams until the kernel returns.
- Gradients go through the parts as they go through a split step (`gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dynaflow_serving.capture.eager.frames import Border, Frame, PendingCall
from dynaflow_serving.capture.eager.gradients import Running, Submit


class _EveryCall(Mapping[int, Submit]):
    """`Frame.apart` of a frame all of whose calls another stream runs."""

    def __init__(self, submit: Submit) -> None:
        self._submit = submit

    def __getitem__(self, number: int) -> Submit:
        return self._submit

    def __contains__(self, number: object) -> bool:
        return True

    def __iter__(self) -> Iterator[int]:
        return iter(())

    def __len__(self) -> int:
        return 0


class InTurn:
    """Runs parts of a call in turn."""

    def __init__(self, borders: Mapping[Any, Border], submit: Submit) -> None:
        """Prepare to run.

        Args:
            borders: Where the parts stop.
            submit: It submits their collectives.
        """
        self._borders, self._submit = dict(borders), submit

    def __call__(self, function: Callable[..., Any], parts: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return what `function` returns for the arguments of each part."""
        frames = [Frame(function, self._borders, 0) for _ in parts]
        try:
            for frame in frames:
                frame.apart = _EveryCall(self._submit)
            running = [self._run(frame.start(args, {})) for frame, args in zip(frames, parts)]
            while any(running):
                for i, frame in enumerate(frames):
                    if (collective := running[i]) is not None:
                        running[i] = self._run(frame.advance(collective.result()))
        finally:
            for frame in frames:
                frame.close()
        return [frame.result for frame in frames]

    def _run(self, call: PendingCall | None) -> Running | None:
        if call is None:
            return None
        return self._submit(call.make)
