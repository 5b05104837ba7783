"""The CUDA streams and events of one executor, by name and by number.

Contract
- A stream is made when the first plan names it and lives as long as the executor, so that plans share it.
- `sm_share`: the stream belongs to a green context with that share of the multiprocessors (rounded by the driver),
  whose own stream it is: only such a stream keeps its share in graph capture. Streams with one share have one
  context. The shares of different contexts may overlap, as each is cut from the whole device (pytorch#195378).
- Event i is one object for all plans of the executor, never in flight twice. Within a plan each event is recorded
  once (`verify`). A later plan's record of it is issued after that plan's streams have waited for the compute
  stream, which by then has joined every stream of the earlier plan (`verify` proves both), its waits included. If
  the caller changes the current stream between runs, a wait still means the record that was issued last before
  it (cudaStreamWaitEvent), and one run is issued after the other.
- Unmeasured: tested with a stand-in for `torch.cuda`; it has not run on a device yet.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from dynaflow_serving.config import StreamOptions
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.strategy.streams import NETWORK

NETWORK_PRIORITY = -1  # a collective should start as soon as its input is there: it needs few multiprocessors


class Submitted:
    """Work that a stream has got: `capture.eager.gradients.Running`."""

    def __init__(self, cuda: Any, done: Any, result: Any) -> None:
        self._cuda, self._done, self._result = cuda, done, result

    def result(self) -> Any:
        """Let the current stream wait for the work, whose tensors it may then use."""
        current = self._cuda.current_stream()
        current.wait_event(self._done)
        for tensor in tree_leaves(self._result):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                tensor.record_stream(current)  # autograd, not a plan, decides when the memory is free
        return self._result


class StreamPool:
    """Makes streams and events when they are first asked for, and keeps them."""

    def __init__(self, cuda: Any, options: Mapping[str, StreamOptions]) -> None:
        """`cuda`: torch.cuda or a stand-in. Raises `InactiveError` for an SM share that torch cannot give."""
        self._cuda, self._options = cuda, options
        self._streams: dict[str, Any] = {}
        self._contexts: dict[float, Any] = {}  # SM share -> green context
        self._events: list[Any] = []
        if asked := [name for name, o in options.items() if o.sm_share is not None]:
            self._green = green_contexts(cuda)
            if self._green is None:
                raise InactiveError(
                    f"streams: {', '.join(asked)} asks for an SM share, but this build of torch has no green contexts "
                    "with streams of their own; install torch >= 2.11 for CUDA >= 12.4, or remove sm_share"
                )

    def stream(self, name: str) -> Any:
        if name not in self._streams:
            self._streams[name] = self._make(self._options.get(name, StreamOptions()), name)
        return self._streams[name]

    def event(self, number: int) -> Any:
        while len(self._events) <= number:
            self._events.append(self._cuda.Event())
        return self._events[number]

    def submit(self, name: str, function: Callable[[], Any]) -> Submitted:
        """Run `function` on the stream called `name`, after all that the current stream has got so far."""
        current, stream, done = self._cuda.current_stream(), self.stream(name), self._cuda.Event()
        stream.wait_stream(current)
        self._cuda.set_stream(stream)
        try:
            result = function()
        finally:
            self._cuda.set_stream(current)
        done.record(stream)
        return Submitted(self._cuda, done, result)

    def _make(self, options: StreamOptions, name: str) -> Any:
        if options.sm_share is None:
            default = NETWORK_PRIORITY if name == NETWORK else 0
            return self._cuda.Stream(priority=default if options.priority is None else options.priority)
        if options.sm_share not in self._contexts:
            device = self._cuda.get_device_properties(self._cuda.current_device())
            sms = max(1, round(options.sm_share * device.multi_processor_count))
            try:
                self._contexts[options.sm_share] = self._green.create(num_sms=sms)
            except RuntimeError as e:
                raise InactiveError(
                    f"stream {name!r} asks for {sms} of {device.multi_processor_count} multiprocessors "
                    f"(sm_share: {options.sm_share}), which the driver refuses: {e}. Change or remove sm_share"
                ) from e
        return self._contexts[options.sm_share].Stream()


def green_contexts(cuda: Any) -> Any:
    """The class GreenContext, or None where torch cannot make one whose streams survive graph capture."""
    try:
        module = getattr(cuda, "green_contexts", None) or importlib.import_module("torch.cuda.green_contexts")
    except ImportError:
        return None
    usable = getattr(module, "SUPPORTED", False) and hasattr(module.GreenContext, "Stream")
    return module.GreenContext if usable else None
