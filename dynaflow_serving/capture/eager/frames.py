"""A model's forward as a suspended computation: one `Frame` per micro-batch, all on the caller's thread.

Contract
- A frame runs until it calls a border; `advance` then returns that call. `advance(result)` goes on from there.
- Greenlets, not threads: out and back takes 0.7 us where it takes two threads 15 (`benchmarks/switch_cost.py`, two
  cores), and one thread keeps CUDA's current stream, the allocator and the engine's globals
  as the engine has them. Torch's thread-local state is kept apart by `state`, Python's context variables by greenlet.
- Outside a frame a border's wrapper calls straight through: engines run un-split steps as before.
- A frame that is not wanted any more is closed: its `with` and `finally` blocks run, on the thread that made it.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from greenlet import GreenletExit, getcurrent, greenlet

from dynaflow_serving.capture.eager.state import TakenOff, TorchState, autocast_dtypes

if TYPE_CHECKING:
    from dynaflow_serving.capture.eager.borders import Border


class Call(NamedTuple):
    """A call of a border that a frame wants made."""

    border: Border
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Frame(greenlet):
    def __init__(self, function: Callable[..., Any], borders: dict[Any, Border], tokens: int) -> None:
        """borders: what suspends this frame, by the module or function that carries the border.
        tokens: of its micro-batch."""
        super().__init__(function)
        self.gr_context = contextvars.copy_context()
        self.borders, self.tokens = borders, tokens
        self.pending: Call | None = None  # what it is suspended at; None before the start and after the end
        self.result: Any = None  # what the function has returned
        self.leaves: list[Any] = []  # of its arguments, with their structure
        self.spec: Any = None
        self.handed: list[Any] = []  # what the border that ran last has returned, if it was not a plain one
        self._outside, self._dtypes = TorchState.now(), autocast_dtypes()
        self._taken_off: TakenOff | None = None

    def suspend(self, border: Border, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called inside the frame: returns what the driver passes to `advance`."""
        assert self.parent is not None
        return self.parent.switch(Call(border, args, kwargs))

    def start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        return self._switch(*args, **kwargs)

    def advance(self, result: Any) -> Call | None:
        """Go on with `result` for the pending call, to the next call; None at the end."""
        return self._switch(result)

    def _switch(self, *args: Any, **kwargs: Any) -> Call | None:
        self._put_back()
        try:
            got = self.switch(*args, **kwargs)
        finally:
            self._take_off()
        if self.dead:
            self.pending, self.result = None, got
        else:
            self.pending = got
        return self.pending

    @property
    def has_own_state(self) -> bool:
        """Whether it is suspended in another torch state than the driver's."""
        return self._taken_off is not None

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function` in the state that the frame is suspended in, such as its autocast."""
        if not self.has_own_state:
            return function(*args, **kwargs)
        self._put_back()
        try:
            return function(*args, **kwargs)
        finally:
            self._take_off()

    def close(self) -> None:
        """Unwind it, if it has not ended."""
        if self and not self.dead:  # started
            self._put_back()
            try:
                self.throw(GreenletExit)
            finally:
                self._take_off()
        self.pending = None

    def _put_back(self) -> None:
        if self._taken_off is not None:
            self._taken_off.put_back()
            self._taken_off = None

    def _take_off(self) -> None:
        if not self._outside.is_now():
            self._taken_off = TakenOff(self._outside, self._dtypes, TorchState.now())


def current_frame() -> Frame | None:
    """The frame that is running; None in the driver, in other threads, and in un-split steps."""
    current = getcurrent()
    return current if type(current) is Frame else None
