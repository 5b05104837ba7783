"""Torch's thread-local state, kept apart for each suspended computation.

Contract
- Suspended computations share one thread. A computation may change grad mode, inference mode, autocast, dispatch keys,
  torch function modes and the hooks of saved tensors (a checkpointed layer pushes some). These changes are taken off
  the thread while it is suspended, and put back when it goes on.
- Nothing leaks, in whatever order computations enter and leave their `with` blocks.
- A computation that has changed nothing, the common case, costs one comparison of snapshots.
- The CUDA stream belongs to the plan, not to a computation. `recording` refuses a border inside a stream block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import _C

_AUTOCAST_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class TorchState:
    """A snapshot of the thread's state."""

    grad: bool
    forward_grad: bool
    inference: bool
    include: Any  # DispatchKeySet: it shows autocast and dispatch modes
    exclude: Any
    modes: int  # number of torch function modes
    hooks: Any  # the innermost hooks of saved tensors, or None
    autocast: tuple[tuple[str, torch.dtype], ...]  # (device type, dtype) where autocast is on

    @classmethod
    def now(cls) -> TorchState:
        autocast: tuple[tuple[str, torch.dtype], ...] = ()
        if torch._C._is_any_autocast_enabled():
            devices = [d for d in _AUTOCAST_DEVICES if torch.is_autocast_enabled(d)]
            autocast = tuple((d, torch.get_autocast_dtype(d)) for d in devices)
        return cls(
            torch.is_grad_enabled(),
            _C._is_fwd_grad_enabled(),
            torch.is_inference_mode_enabled(),
            _C._dispatch_tls_local_include_set(),
            _C._dispatch_tls_local_exclude_set(),
            _C._len_torch_function_stack(),
            _innermost_hooks(),
            autocast,
        )

    def is_now(self) -> bool:
        """Whether the thread is in this state. The dispatch keys show whether autocast is on."""
        return (
            torch.is_grad_enabled() == self.grad
            and _C._is_fwd_grad_enabled() == self.forward_grad
            and _innermost_hooks() == self.hooks
            and self.dispatches_like_now()
        )

    def dispatches_like_now(self) -> bool:
        """Whether a call in this state runs the same kernels as one now, whatever autograd records of it."""
        return (
            _C._dispatch_tls_local_include_set() == self.include
            and _C._dispatch_tls_local_exclude_set() == self.exclude
            and _C._len_torch_function_stack() == self.modes
            and torch.is_inference_mode_enabled() == self.inference
            and (not self.autocast or TorchState.now().autocast == self.autocast)
        )


def autocast_dtypes() -> dict[str, torch.dtype]:
    """Return the dtype of autocast by device type, which outlives the blocks that change it."""
    return {device: torch.get_autocast_dtype(device) for device in _AUTOCAST_DEVICES}


class SuspendedState:
    """The state of a suspended computation: the thread is in state `outside` until `restore`."""

    def __init__(self, outside: TorchState, dtypes: dict[str, torch.dtype], inside: TorchState) -> None:
        # The function modes above those of the outside are the computation's own.
        self._modes = [_C._pop_torch_function_stack() for _ in range(inside.modes - outside.modes)]
        self._hooks = []  # likewise
        while (hooks := _innermost_hooks()) not in (None, outside.hooks):
            self._hooks.append(hooks)
            _C._autograd._pop_saved_tensors_default_hooks()
        self.inside = inside
        # Only guards can set these two. They restore in any order, not only last in, first out.
        keys = _C._ForceDispatchKeyGuard(outside.include, outside.exclude)
        self._guards = (_C._InferenceMode(outside.inference), keys)
        for guard in self._guards:
            guard.__enter__()  # type: ignore[no-untyped-call]
        torch._C._set_grad_enabled(outside.grad)
        _C._set_fwd_grad_enabled(outside.forward_grad)
        for device, _ in inside.autocast:
            torch.set_autocast_dtype(device, dtypes[device])

    def restore(self) -> None:
        for guard in reversed(self._guards):
            guard.__exit__(None, None, None)
        torch._C._set_grad_enabled(self.inside.grad)
        _C._set_fwd_grad_enabled(self.inside.forward_grad)
        for device, dtype in self.inside.autocast:
            torch.set_autocast_dtype(device, dtype)
        for mode in reversed(self._modes):
            _C._push_on_torch_function_stack(mode)
        for hooks in reversed(self._hooks):
            _C._autograd._push_saved_tensors_default_hooks(*hooks)


def _innermost_hooks() -> Any:
    return _C._autograd._top_saved_tensors_default_hooks(True)
