"""One un-split run of a model, watched: which borders it calls, and which tensors cross them.

Contract
- The run is a real one, and its result is the caller's: borders are called as they are.
- Events alternate: the code up to a border (a `Stretch`), the border, ..., the code after the last border.
- Every ATen call of the code between borders is seen, with the module it runs in; kernels launched past torch's
  dispatcher are not, which is why a plan keeps a model's own order within a micro-batch, whatever was recorded.
- Code between borders that reads a tensor's value (a data-dependent branch) is noted: it cannot be split, for a
  micro-batch may take another branch than the whole batch. So is a border in a CUDA stream block or a dispatch mode.
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

from dynaflow_serving.capture.eager.borders import Border, Borders
from dynaflow_serving.capture.eager.frames import Call, Frame

_READS_VALUE = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")
CONSTANTS = (int, float, str, bool, type(None), torch.dtype, torch.device)


@dataclass(eq=False, slots=True)
class Seen:
    """A tensor that the run has made or was given. `producer`: index of its event, -1 for an argument."""

    producer: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int  # a number of our own: an address may be used again
    tensor: Any = None  # itself, if met first as an argument of a border: made out of sight, or a constant


@dataclass(slots=True)
class Stretch:
    """The code between two borders."""

    paths: list[str] = field(default_factory=list)  # of the module of each torch call, in order
    reads: dict[Seen, None] = field(default_factory=dict)  # made by earlier events
    writes: set[int] = field(default_factory=set)  # storages


@dataclass(slots=True)
class BorderCall:
    border: Border
    path: str  # of the module that calls it, or of itself
    arguments: dict[int | str, Any]  # position or keyword -> Seen, a constant, or any other object
    results: list[Any]  # likewise
    shape: str  # of the result: "tensor", "tuple", "list", or "object" for any other
    own_state: bool = False  # whether it is called in another torch state (autocast, grad mode) than the model
    writes: set[int] = field(default_factory=set)

    def returned(self, listed: list[Any]) -> Any:
        """What the call returns, of `listed` in place of `results`."""
        return listed[0] if self.shape == "tensor" else tuple(listed) if self.shape == "tuple" else listed


@dataclass(slots=True)
class Run:
    tokens: int
    events: list[Stretch | BorderCall]
    inputs: dict[int, Seen]  # leaf of (args, kwargs) -> tensor
    names: list[str]  # of the leaves
    outputs: list[Any]  # leaves of the result: Seen or anything else
    spec: Any  # pytree of the result
    problem: str = ""  # why a model that does this cannot be split


def record(
    forward: Callable[..., Any],
    borders: Borders,
    names: list[str],
    tokens: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, Run]:
    """Run `forward` once; returns its result and what was seen. `names`: of the leaves of (args, kwargs)."""
    watch = _Watch()
    leaves, _ = pytree.tree_flatten((args, kwargs))
    inputs = {i: watch.note(leaf, -1) for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    stream = torch.cuda.current_stream() if on_cuda(leaves) else None
    with watch, watch.modules(borders.module):
        frame = Frame(borders.entry(forward), borders.by_place, tokens)  # for which the watch is the thread's own state
        try:
            call = watch.between(frame.start, args, kwargs)
            while call is not None:
                watch.check_surroundings(call, stream)
                call = watch.between(frame.advance, watch.border(call, frame))
        finally:
            frame.close()
    out, spec = pytree.tree_flatten(frame.result)
    outputs = [watch.find(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in out]
    run = Run(tokens, watch.events, inputs, names, outputs, spec, watch.problem)
    return frame.result, run


def tensors_of(values: Iterable[Any]) -> list[Seen]:
    return [v for v in values if isinstance(v, Seen)]


def on_cuda(leaves: Iterable[Any]) -> bool:
    return any(isinstance(t, torch.Tensor) and t.is_cuda for t in leaves)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Stretch | BorderCall] = []
        self.problem = ""
        self._seen: Any = WeakIdKeyDictionary()  # tensor -> Seen
        self._storages = itertools.count()
        self._stack = [""]
        self._depth = torch._C._len_torch_dispatch_stack() + 1

    # -- driving ------------------------------------------------------------------------------------
    def between(self, go_on: Callable[..., Call | None], *given: Any) -> Call | None:
        self.events.append(Stretch())
        return go_on(*given)

    def border(self, call: Call, frame: Frame) -> Any:
        border, at = call.border, len(self.events)
        own = border.path if border.module is not None else self._stack[-1]
        passed: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
        arguments = {k: self.find(v) if isinstance(v, torch.Tensor) else v for k, v in passed}
        event = BorderCall(border, own, arguments, [], "object", frame.has_own_state)
        self.events.append(event)
        result = frame.call(border.function, *call.args, **call.kwargs)
        listed = [result] if isinstance(result, torch.Tensor) else result
        if type(listed) in (list, tuple):
            event.shape = "tensor" if listed is not result else type(listed).__name__
            given = {v: s for k, v in passed if isinstance(s := arguments[k], Seen)}
            event.results = [self.note(r, at, given) if isinstance(r, torch.Tensor) else r for r in listed]
            # An operator in place often says so nowhere.
            event.writes |= {r.storage for r in tensors_of(event.results)} & {s.storage for s in given.values()}
        return result

    @contextlib.contextmanager
    def modules(self, root: torch.nn.Module) -> Iterator[None]:
        """Keep track of the module that runs."""
        paths = {m: path for path, m in root.named_modules()}

        def enter(module: torch.nn.Module, _: Any) -> None:
            self._stack.append(paths.get(module, self._stack[-1]))

        def leave(*_: Any) -> None:
            self._stack.pop()

        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def check_surroundings(self, call: Call, stream: Any) -> None:
        if stream is not None and torch.cuda.current_stream() != stream:
            self._refuse(f"{call.border.name} is called inside a CUDA stream block, which a plan cannot honour")
        if torch._C._len_torch_dispatch_stack() > self._depth:
            self._refuse(f"{call.border.name} is called inside a torch dispatch mode")

    # -- watching -----------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        event, at = self.events[-1], len(self.events) - 1
        tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        given = {t: self._seen[t] for t in tensors if t in self._seen}
        if isinstance(event, Stretch):
            event.paths.append(self._stack[-1])
            event.reads |= {s: None for s in given.values() if s.producer != at}
            if given and func._schema.name in _READS_VALUE:
                self._refuse(f"code in {self._stack[-1] or 'the model'} reads the value of a tensor ({func})")
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = kwargs.get(argument.name, args[i] if i < len(args) else None)
                leaves = [t for t in pytree.tree_leaves(written) if isinstance(t, torch.Tensor)]
                event.writes |= {given[t].storage for t in leaves if t in given}
        result = func(*args, **kwargs)
        if isinstance(event, Stretch):
            for t in pytree.tree_leaves(result):
                if isinstance(t, torch.Tensor) and t not in self._seen:
                    self.note(t, at, given)
        return result

    def note(self, tensor: torch.Tensor, producer: int, given: Mapping[torch.Tensor, Seen] | None = None) -> Seen:
        """`given`: the tensors that it may be a view of."""
        storage = next((s.storage for t, s in (given or {}).items() if _same_memory(t, tensor)), None)
        number = next(self._storages) if storage is None else storage
        self._seen[tensor] = seen = Seen(producer, tuple(tensor.shape), tensor.dtype, number)
        return seen

    def find(self, tensor: torch.Tensor) -> Seen:
        """What is known of `tensor`; else it was made by the latest event, or is a constant."""
        seen: Seen | None = self._seen.get(tensor)
        if seen is None:
            seen = self.note(tensor, len(self.events) - 1)
            seen.tensor = tensor
        return seen

    def _refuse(self, reason: str) -> None:
        self.problem = self.problem or reason


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return a is b
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
