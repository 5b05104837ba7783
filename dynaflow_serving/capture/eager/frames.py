"""A model's forward as a suspended computation, one `Frame` per micro-batch, and the borders at which it stops.

Contract
- All frames are on the caller's thread.
- A frame runs until it calls a border; `start` and `advance` return that call, or None at the end.
- Frames are greenlets, not threads: out and back takes 0.7 us, between two threads 15 (`benchmarks/switch_cost.py`, two
  cores). One thread keeps CUDA's current stream, the allocator and the engine's globals as the engine has them.
- `state` keeps torch's thread-local state apart for each frame, greenlet does so for Python's context variables.
- Outside a frame a border's wrapper calls straight through: engines run un-split steps as before.
- Gradients go through a call that another stream runs by way of a `Crossing` (`gradients`).
- `close` unwinds a frame that has not ended: its `with` and `finally` blocks run, on the thread that made it.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet

from dynaflow_serving.capture.eager.gradients import Crossing, Submit
from dynaflow_serving.capture.eager.state import SuspendedState, TorchState, autocast_dtypes
from dynaflow_serving.strategy.rules import Rule

NO_RESULT = object()


@dataclass(eq=False, slots=True)
class Border:
    """One annotated module, Python function or torch function."""

    rule: Rule
    function: Callable[..., Any]  # the original, which does the work of a call
    path: str = ""  # of its module; a function's path is that of the module that calls it
    module: torch.nn.Module | None = None

    @property
    def name(self) -> str:
        return self.rule.label


@dataclass(eq=False, slots=True)
class PendingCall:
    """A call of a border at which a frame is suspended: the plan makes the call later."""

    border: Border
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool  # whether autograd records it

    def make(self) -> Any:
        """Make the call outside of its frame."""
        with torch.set_grad_enabled(self.grad):
            return self.border.function(*self.args, **self.kwargs)

    def argument(self, key: int | str) -> Any:
        """The argument at a position or with a keyword."""
        return self.args[key] if isinstance(key, int) else self.kwargs[key]


class Frame(greenlet):
    def __init__(self, function: Callable[..., Any], borders: dict[Any, Border], tokens: int) -> None:
        """Make a frame that has not started.

        Args:
            function: the forward, or what runs it.
            borders: module or function -> the border at which this frame stops there.
            tokens: of its micro-batch.
        """
        super().__init__(function)
        self.gr_context = contextvars.copy_context()
        self.borders, self.tokens = borders, tokens
        self.argument_leaves: list[Any] = []  # the forward's (args, kwargs), flat
        self.argument_spec: Any = None  # their structure
        self.pending: PendingCall | None = None  # None before the start and after the end
        self.call_result: Any = NO_RESULT  # of the pending call, where the call is made and the frame not advanced yet
        self.result: Any = None  # of the forward, after the end
        self.apart: Mapping[int, Submit] = {}  # how calls, by their number, get to the stream that runs them
        self._calls = 0  # so many borders were called
        self._outside, self._dtypes = TorchState.now(), autocast_dtypes()
        self._state: SuspendedState | None = None  # while it is suspended, where it is not the caller's

    def suspend(self, border: Border, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stop the frame, from inside it, at a call; return what `advance` is given for it."""
        assert self.parent is not None
        number, self._calls = self._calls, self._calls + 1
        grad = torch.is_grad_enabled()
        if number not in self.apart or not grad:
            return self.parent.switch(PendingCall(border, args, kwargs, grad))
        crossing = Crossing(self.apart[number])
        args, kwargs = crossing.leave(args, kwargs)
        return crossing.arrive(self.parent.switch(PendingCall(border, args, kwargs, grad)))

    def start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PendingCall | None:
        return self._switch(*args, **kwargs)

    def advance(self, result: Any) -> PendingCall | None:
        """Go on with `result` for the pending call, to the next call or to the end."""
        return self._switch(result)

    def _switch(self, *args: Any, **kwargs: Any) -> PendingCall | None:
        if self._state is not None:
            self._restore_state()
        try:
            got = self.switch(*args, **kwargs)
        finally:
            if not self._outside.is_now():
                self._save_state()
        if self.dead:
            self.pending, self.result = None, got
        else:
            self.pending = got
        return self.pending

    def has_border(self, name: str, tag: str = "") -> bool:
        """Whether calls of something called `name`, with that tag if any, are borders here."""
        return any(b.name == name and (not tag or tag in b.rule.tags) for b in self.borders.values())

    @property
    def has_own_state(self) -> bool:
        """Whether the frame is suspended in another torch state than its caller's."""
        return self._state is not None

    @property
    def dispatches_its_own_way(self) -> bool:
        """Whether that state is another in more than what autograd records."""
        return self._state is not None and not self._state.inside.dispatches_like_now()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function` in the torch state that the frame is suspended in, such as its autocast."""
        if self._state is None:
            return function(*args, **kwargs)
        self._restore_state()
        try:
            return function(*args, **kwargs)
        finally:
            if not self._outside.is_now():
                self._save_state()

    def close(self) -> None:
        """Unwind the frame, if it has started and not ended."""
        if self and not self.dead:  # a greenlet is true once it has started
            self._restore_state()
            try:
                self.throw(GreenletExit)
            finally:
                if not self._outside.is_now():
                    self._save_state()
        self.pending = None

    def _restore_state(self) -> None:
        if self._state is not None:
            self._state.restore()
            self._state = None

    def _save_state(self) -> None:
        self._state = SuspendedState(self._outside, self._dtypes, TorchState.now())


def current_frame() -> Frame | None:
    """Return the frame that is running; None outside frames: in plans, in other threads, and in un-split steps."""
    current = getcurrent()
    return current if type(current) is Frame else None
