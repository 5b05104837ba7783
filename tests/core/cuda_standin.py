"""Stands in for torch.cuda: notes what is issued, checks forks and joins as the driver does, and replays graphs.

Tensors are on the CPU and everything runs at once, in issue order. While a graph is captured, every torch call
is recorded with the stream it was issued on; a replay repeats the calls on the same tensors.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str, priority: int = 0) -> None:
        self.cuda, self.name, self.priority = cuda, name, priority
        self.issued = 0
        self.seen: dict[FakeStream, int] = {}  # stream -> how many of its launches come before what is issued now
        self.graph: FakeGraph | None = None  # that captures this stream

    def launch(self) -> None:
        self.issued += 1
        self.seen[self] = self.issued

    def wait_event(self, event: FakeEvent) -> None:
        if self.graph is not None and event.graph is not self.graph:
            raise RuntimeError("a captured stream waits for work outside the capture")
        if self.graph is None:
            self.graph = event.graph
        self._after(event.seen)
        self.cuda.log.append(("wait", self.name, event.number))

    def wait_stream(self, other: FakeStream) -> None:
        self._after(other.seen)
        self.cuda.log.append(("join", self.name, other.name))

    def _after(self, seen: dict[FakeStream, int]) -> None:
        for stream, count in seen.items():
            self.seen[stream] = max(count, self.seen.get(stream, 0))


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.number = cuda, len(cuda.events)
        self.seen: dict[FakeStream, int] = {}
        self.graph: FakeGraph | None = None
        cuda.events.append(self)

    def record(self, stream: FakeStream) -> None:
        self.seen, self.graph = dict(stream.seen), stream.graph
        self.cuda.log.append(("record", stream.name, self.number))


class FakeGraph(TorchDispatchMode):
    """The CUDAGraph, and the mode that records into it."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.calls: list[tuple[Any, Any, Any, Any, str]] = []
        self.pool: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stream = self.cuda.active
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view:  # a view launches nothing
            if stream.graph is not self:
                raise RuntimeError(f"work is launched on stream {stream.name}, which is not part of the capture")
            stream.launch()
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out, stream.name))
        self.cuda.reserved += 2**20
        return out

    def replay(self) -> None:
        self.cuda.log.append(("replay", self.cuda.active.name))
        for func, args, kwargs, out, _ in self.calls:
            again = func(*args, **kwargs)
            for result, old, new in zip(func._schema.returns, pytree.tree_leaves(out), pytree.tree_leaves(again)):
                if result.alias_info is None and isinstance(old, torch.Tensor):
                    old.copy_(new)


class GreenContext:
    def __init__(self, cuda: FakeCuda, sms: int) -> None:
        self.cuda, self.sms = cuda, sms

    def Stream(self) -> FakeStream:
        return self.cuda.make_stream(f"green{self.sms}")


class FakeCuda:
    def __init__(self, available: bool = True, green: bool = True) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.available = available
        self.streams: list[FakeStream] = []
        self.events: list[FakeEvent] = []
        self.contexts: list[GreenContext] = []
        self.reserved = 0
        self.stream_type, self.event_type = FakeStream, FakeEvent
        self.default = FakeStream(self, "default")
        self.active = self.default
        cuda = self

        class Green(GreenContext):
            @staticmethod
            def create(*, num_sms: int) -> GreenContext:
                if num_sms < 2:
                    raise RuntimeError("too few")
                cuda.contexts.append(GreenContext(cuda, num_sms))
                return cuda.contexts[-1]

        self.green_contexts = types.SimpleNamespace(SUPPORTED=green, GreenContext=Green)

    def make_stream(self, name: str = "", priority: int = 0) -> FakeStream:
        self.streams.append(self.stream_type(self, name or f"stream{len(self.streams)}", priority))
        return self.streams[-1]

    def Stream(self, priority: int = 0) -> FakeStream:
        return self.make_stream(priority=priority)

    def Event(self) -> FakeEvent:
        return self.event_type(self)

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph(self)

    @contextlib.contextmanager
    def graph(self, graph: FakeGraph, pool: Any, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        before, self.active, graph.pool, stream.graph = self.active, stream, pool, graph
        try:
            with graph:
                yield
            for other in (s for s in self.streams if s.graph is graph):
                if stream.seen.get(other, 0) < other.issued:
                    raise RuntimeError(f"unjoined work on stream {other.name}")
            self.active = before  # not where it fails: torch leaves the capture stream current
        finally:
            for other in self.streams:
                other.graph = None

    def is_available(self) -> bool:
        return self.available

    def current_stream(self) -> FakeStream:
        return self.active

    def set_stream(self, stream: FakeStream) -> None:
        self.active = stream

    def is_current_stream_capturing(self) -> bool:
        return self.active.graph is not None

    def graph_pool_handle(self) -> object:
        return object()

    def memory_reserved(self) -> int:
        return self.reserved

    def synchronize(self) -> None:
        self.log.append(("synchronize",))

    def empty_cache(self) -> None:
        pass

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, device: int) -> Any:
        return types.SimpleNamespace(multi_processor_count=132)
