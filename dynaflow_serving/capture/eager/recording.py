"""One un-split run of a model, watched: the borders that it calls, and the tensors that cross them.

Contract
- The run is a real one, and its result is the caller's: borders are called as they are.
- Events alternate: a section of the model's code, a border call, ..., the last section.
- Every ATen call of a section is seen, with the module that makes it. Kernels launched past torch's dispatcher are
  not, so a plan keeps the model's own order within a micro-batch, whatever was recorded.
- A recording says why its model cannot be split. One reason is a section that reads the value of a tensor that may
  depend on the batch: a micro-batch may take another branch than the whole batch. Another is a border call in a CUDA
  stream block or a dispatch mode.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from dynaflow_serving.capture.eager.frames import Border, Frame, PendingCall
from dynaflow_serving.capture.eager.placing import Borders

_READS_VALUE = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")
_ARGUMENT = -1  # the producer of the model's arguments


@dataclass(eq=False, slots=True)
class RecordedTensor:
    """A tensor that the run has made or was given."""

    producer: int  # number of the event that made it
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int  # a number of our own: an address may be used again
    tensor: Any = None  # the tensor, if a border's argument showed it first: a constant, or made unseen

    @property
    def is_argument(self) -> bool:
        """Whether the model was given it."""
        return self.producer == _ARGUMENT


@dataclass(slots=True)
class Section:
    """The model's own code between two border calls."""

    paths: list[str] = field(default_factory=list)  # module paths of its ATen calls, in order
    reads: dict[RecordedTensor, None] = field(default_factory=dict)  # tensors of earlier events
    writes: set[int] = field(default_factory=set)  # storages


@dataclass(slots=True)
class BorderCall:
    """A call of a border."""

    border: Border
    path: str  # of the border's module; of the calling module for a function
    arguments: dict[int | str, Any]  # position or keyword -> RecordedTensor, or any other object
    results: list[Any]  # of the same kinds
    result_kind: str  # "tensor", "tuple", "list", or "object" for any other
    own_state: bool = False  # whether the frame calls it in a torch state of its own (autocast, grad mode)
    own_dispatch: bool = False  # whether that state differs in more than what autograd records
    writes: set[int] = field(default_factory=set)  # storages

    def returned(self, results: list[Any]) -> Any:
        """Put `results` together as the call returns them."""
        if self.result_kind == "tensor":
            return results[0]
        return tuple(results) if self.result_kind == "tuple" else results


@dataclass(slots=True)
class Recording:
    """A run: even events are sections, odd events are border calls."""

    tokens: int
    events: list[Section | BorderCall]
    inputs: dict[int, RecordedTensor]  # leaf of (args, kwargs) -> tensor
    names: list[str]  # of the leaves of (args, kwargs)
    outputs: list[Any]  # leaves of the result: RecordedTensor, or any other object
    spec: Any  # pytree structure of the result
    problem: str = ""  # why this model cannot be split

    def section(self, event: int) -> Section:
        found = self.events[event]
        assert isinstance(found, Section)
        return found

    def border_call(self, event: int) -> BorderCall:
        found = self.events[event]
        assert isinstance(found, BorderCall)
        return found

    @property
    def border_calls(self) -> dict[int, BorderCall]:
        return {i: event for i, event in enumerate(self.events) if isinstance(event, BorderCall)}


def record(
    forward: Callable[..., Any],
    borders: Borders,
    names: list[str],
    tokens: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, Recording]:
    """Run `forward` once; return its result and the recording.

    Args:
        forward: the model's forward.
        borders: of the model; they are in place.
        names: of the leaves of (args, kwargs).
        tokens: of the batch.
        args: positional arguments of the forward.
        kwargs: its keyword arguments.
    """
    watch = _Watch()
    leaves, _ = pytree.tree_flatten((args, kwargs))
    inputs = {i: watch.add(leaf, _ARGUMENT) for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    stream = torch.cuda.current_stream() if on_cuda(leaves) else None
    with watch, watch.modules(borders.module):
        # The frame is made under the watch, which is therefore no state of the frame's own.
        frame = Frame(borders.frame_function(forward), borders.by_target, tokens)
        try:
            call = watch.run_section(frame.start, args, kwargs)
            while call is not None:
                watch.check_surroundings(call, stream)
                call = watch.run_section(frame.advance, watch.run_border(call, frame))
        finally:
            frame.close()
    out, spec = pytree.tree_flatten(frame.result)
    outputs = [watch.find(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in out]
    return frame.result, Recording(tokens, watch.events, inputs, names, outputs, spec, watch.problem)


def tensors_of(values: Iterable[Any]) -> list[RecordedTensor]:
    return [v for v in values if isinstance(v, RecordedTensor)]


def on_cuda(leaves: Iterable[Any]) -> bool:
    return any(isinstance(t, torch.Tensor) and t.is_cuda for t in leaves)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs a frame event by event, and sees every ATen call."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Section | BorderCall] = []
        self.problem = ""
        self._known: Any = WeakIdKeyDictionary()  # tensor -> RecordedTensor
        self._storages = itertools.count()
        self._of_numbers: set[int] = set()  # storages that hold what the code has made of numbers alone
        self._module_paths = [""]  # of the modules that run, outermost first
        self._depth = torch._C._len_torch_dispatch_stack() + 1

    # -- running events -----------------------------------------------------------------------------
    def run_section(self, go_on: Callable[..., PendingCall | None], *arguments: Any) -> PendingCall | None:
        self.events.append(Section())
        return go_on(*arguments)

    def run_border(self, call: PendingCall, frame: Frame) -> Any:
        border, number = call.border, len(self.events)
        path = border.path if border.module is not None else self._module_paths[-1]
        passed: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
        arguments = {k: self.find(v) if isinstance(v, torch.Tensor) else v for k, v in passed}
        event = BorderCall(border, path, arguments, [], "object", frame.has_own_state, frame.dispatches_its_own_way)
        self.events.append(event)
        result = frame.call(border.function, *call.args, **call.kwargs)
        results = [result] if isinstance(result, torch.Tensor) else result
        if type(results) in (list, tuple):
            event.result_kind = "tensor" if results is not result else type(results).__name__
            given = {v: arguments[k] for k, v in passed if isinstance(v, torch.Tensor)}
            event.results = [self.add(r, number, given) if isinstance(r, torch.Tensor) else r for r in results]
            # An operator that works in place often declares it nowhere: it returns the memory that it was given.
            event.writes |= {r.storage for r in tensors_of(event.results)} & {t.storage for t in given.values()}
        return result

    @contextlib.contextmanager
    def modules(self, root: torch.nn.Module) -> Iterator[None]:
        """Keep track of the modules that run."""
        paths = {m: path for path, m in root.named_modules()}

        def enter(module: torch.nn.Module, _: Any) -> None:
            self._module_paths.append(paths.get(module, self._module_paths[-1]))

        def leave(*_: Any) -> None:
            self._module_paths.pop()

        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def check_surroundings(self, call: PendingCall, stream: Any) -> None:
        if stream is not None and torch.cuda.current_stream() != stream:
            self._refuse(f"{call.border.name} is called inside a CUDA stream block, which a plan cannot honour")
        if torch._C._len_torch_dispatch_stack() > self._depth:
            self._refuse(f"{call.border.name} is called inside a torch dispatch mode")

    # -- watching -----------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        event, number = self.events[-1], len(self.events) - 1
        tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        given = {t: self._known[t] for t in tensors if t in self._known}
        of_numbers = self._is_of_numbers(func, tensors, given)
        if isinstance(event, Section):
            path = self._module_paths[-1]
            event.paths.append(path)
            event.reads |= {t: None for t in given.values() if t.producer != number}
            if given and not of_numbers and func._schema.name in _READS_VALUE:
                self._refuse(f"code in {path or 'the model'} reads the value of a tensor ({func})")
        written = _written_storages(func, args, kwargs, given)
        event.writes |= written
        if not of_numbers:
            self._of_numbers -= written
        result = func(*args, **kwargs)
        if isinstance(event, Section):
            for t in pytree.tree_leaves(result):
                if isinstance(t, torch.Tensor) and t not in self._known:
                    recorded = self.add(t, number, given)
                    if of_numbers:
                        self._of_numbers.add(recorded.storage)
        return result

    def _is_of_numbers(
        self, func: Any, tensors: list[torch.Tensor], given: Mapping[torch.Tensor, RecordedTensor]
    ) -> bool:
        """Whether a call depends on no tensor but those that the code has made of Python's numbers (`torch.tensor(3)`).

        Weights and empty tensors are none of these: what fills or made them may not have been seen.
        """
        if func is torch.ops.aten.lift_fresh.default:
            return True
        return bool(tensors) and all(t in given and given[t].storage in self._of_numbers for t in tensors)

    def add(
        self, tensor: torch.Tensor, producer: int, given: Mapping[torch.Tensor, RecordedTensor] | None = None
    ) -> RecordedTensor:
        """Note a new tensor, which may be a view of one of `given`."""
        storage = next((known.storage for t, known in (given or {}).items() if _same_memory(t, tensor)), None)
        number = next(self._storages) if storage is None else storage
        self._known[tensor] = recorded = RecordedTensor(producer, tuple(tensor.shape), tensor.dtype, number)
        return recorded

    def find(self, tensor: torch.Tensor) -> RecordedTensor:
        """Return the record of `tensor`. An unknown tensor was made unseen by the latest event, or is a constant."""
        recorded: RecordedTensor | None = self._known.get(tensor)
        if recorded is None:
            recorded = self.add(tensor, len(self.events) - 1)
            recorded.tensor = tensor
        return recorded

    def _refuse(self, reason: str) -> None:
        self.problem = self.problem or reason


def _written_storages(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Mapping[torch.Tensor, RecordedTensor]
) -> set[int]:
    """Return the storages of `given` that the ATen operator `func` writes, by its schema."""
    written = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(kwargs.get(argument.name, args[i] if i < len(args) else None))
    leaves = [t for t in pytree.tree_leaves(written) if isinstance(t, torch.Tensor)]
    return {given[t].storage for t in leaves if t in given}


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return a is b
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
