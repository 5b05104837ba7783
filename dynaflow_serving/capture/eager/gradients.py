"""Gradients through a border call that another stream runs: two autograd nodes around it.

Contract
- `leave` gives the call arguments that begin an autograd graph of their own. The call extends it, wherever it runs.
  `arrive` puts the call's results into the frame's graph.
- In the backward pass, the node of `arrive` starts the gradient of the call on the stream that ran the call. The node
  of `leave` waits for it. What autograd runs in between runs beside it.
- Both nodes are made on the frame's thread. Autograd runs what is ready there by descending sequence number, so the
  backward pass is the forward pass backwards, on all ranks alike: `planning.mirror` is its plan.
- A border that is called outside of frames in the backward pass (a layer is recomputed) calls `join_gradients` first.
  Otherwise its collective might overtake those in flight, on one rank only.
- A crossing keeps edges of graphs, and no values. What a call or the frame's code does not save is free once the
  forward pass has read it, so that layers which are recomputed keep as little as without DynaFlow.
- The gradient of a call can be taken once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dynaflow_serving.errors import DynaflowError


class Running(Protocol):
    """Work that was submitted to a stream."""

    def result(self) -> Any:
        """Let the calling stream wait for the work, and return what it returned, or raise what it raised."""


Submit = Callable[[Callable[[], Any]], Running]  # runs a function on a stream, after what it has got before


def at_once(function: Callable[[], Any]) -> Running:
    """Run a function on the calling stream."""
    done: Future[Any] = Future()
    done.set_result(function())
    return done


class Crossing:
    """One call of a border, on its way to another stream and back."""

    any_started = False  # whether this process has started the gradient of any

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._token: torch.Tensor | None = None  # it ties the two nodes together
        self._leaves: list[GradientEdge] = []
        self._results: list[GradientEdge] = []
        self._given: tuple[torch.Tensor, ...] = ()  # the gradients of the results, while they are in use
        self._running: Running | None = None
        self.thread = 0  # the thread that has started the gradient

    def leave(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments as the call is to get them."""
        values, spec = pytree.tree_flatten((args, kwargs))
        positions = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor) and v.requires_grad]
        if not positions:
            return args, kwargs
        given = [values[i] for i in positions]
        self._token = _Leave.apply(self, *given)  # type: ignore[no-untyped-call]
        begun = _Begin.apply(torch.empty(0, requires_grad=True), *(t.detach() for t in given))  # type: ignore[no-untyped-call]
        self._leaves = [get_gradient_edge(tensor) for tensor in begun]
        for i, tensor in zip(positions, begun):
            values[i] = tensor
        new_args, new_kwargs = pytree.tree_unflatten(values, spec)
        return new_args, new_kwargs

    def arrive(self, result: Any) -> Any:
        """Return the result of the call as the frame is to get it."""
        token, self._token = self._token, None
        if token is None:
            return result
        values, spec = pytree.tree_flatten(result)
        positions = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor) and v.requires_grad]
        if not positions:
            raise DynaflowError("the call of a border returned nothing that has a gradient, for arguments that have")
        results = [values[i] for i in positions]
        self._results = [get_gradient_edge(tensor) for tensor in results]
        for i, tensor in zip(positions, _Arrive.apply(self, token, results)):  # type: ignore[no-untyped-call]
            values[i] = tensor
        return pytree.tree_unflatten(values, spec)

    def start(self, gradients: tuple[torch.Tensor, ...]) -> None:
        """Start the gradient of the call."""
        if not self._results:
            raise DynaflowError("the gradient of a split step was taken twice: call backward once per forward")
        self._given = gradients
        self._running = self._submit(self._differentiate)
        self.thread, Crossing.any_started = threading.get_ident(), True
        _in_flight.add(self)

    def wait(self) -> tuple[torch.Tensor | None, ...]:
        """Wait for the gradients of the call's arguments, and return them."""
        assert self._running is not None
        running, self._running = self._running, None
        _in_flight.discard(self)
        try:
            found: tuple[torch.Tensor | None, ...] = running.result()
        finally:
            self._leaves, self._results, self._given = [], [], ()
        return found

    def join(self) -> None:
        """Wait for the gradient, and keep it for `wait`."""
        assert self._running is not None
        self._running.result()

    def _differentiate(self) -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad(self._results, self._leaves, self._given)


_in_flight: weakref.WeakSet[Crossing] = weakref.WeakSet()  # whose gradients are


def join_gradients() -> None:
    """Wait for the gradients that this thread has started. A process that takes none pays one look-up."""
    if Crossing.any_started:
        for crossing in list(_in_flight):
            if crossing.thread == threading.get_ident():
                crossing.join()


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, crossing: Crossing, *given: torch.Tensor) -> torch.Tensor:
        ctx.crossing = crossing
        return given[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[Any, ...]:
        return (None, *ctx.crossing.wait())


class _Begin(torch.autograd.Function):
    """The first node of a call's own graph. A leaf would do, but its node keeps its value."""

    @staticmethod
    def forward(ctx: Any, _: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.detach() for tensor in values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise AssertionError("a gradient is taken up to the edges of this node")


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, crossing: Crossing, token: torch.Tensor, results: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        ctx.crossing = crossing
        for tensor in results:
            if tensor.is_cuda:  # the frame's stream uses it, and autograd decides when its memory is free
                tensor.record_stream(torch.cuda.current_stream())
        return tuple(tensor.detach() for tensor in results)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        ctx.crossing.start(gradients)
        return None, gradients[0].new_empty(0), None
