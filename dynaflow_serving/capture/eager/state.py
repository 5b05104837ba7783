"""Torch's thread-local state, kept apart for each suspended computation.

Contract
- A suspended computation shares its thread with the others, so what it has changed (grad mode, inference mode,
  autocast, dispatch keys, torch function modes) is taken off the thread while it is suspended and put back when it
  goes on: nothing leaks, in whatever order computations enter and leave their `with` blocks.
- In the common case, a computation that has changed nothing, this costs one comparison of snapshots.
- A CUDA stream is not state of a computation: the plan sets it (`recording` refuses a border inside a stream block).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import _C

_AUTOCAST_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class TorchState:
    grad: bool
    inference: bool
    include: Any  # DispatchKeySet; autocast and dispatch modes show here
    exclude: Any
    modes: int  # torch function modes
    autocast: tuple[tuple[str, torch.dtype], ...]  # device types with autocast, and its dtype there

    @classmethod
    def now(cls) -> TorchState:
        autocast: tuple[tuple[str, torch.dtype], ...] = ()
        if torch._C._is_any_autocast_enabled():
            devices = [d for d in _AUTOCAST_DEVICES if torch.is_autocast_enabled(d)]
            autocast = tuple((d, torch.get_autocast_dtype(d)) for d in devices)
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            _C._dispatch_tls_local_include_set(),
            _C._dispatch_tls_local_exclude_set(),
            _C._len_torch_function_stack(),
            autocast,
        )

    def is_now(self) -> bool:
        """Whether the thread is in this state. Autocast switched on or off shows in the dispatch keys."""
        return (
            torch.is_grad_enabled() == self.grad
            and _C._dispatch_tls_local_include_set() == self.include
            and _C._dispatch_tls_local_exclude_set() == self.exclude
            and _C._len_torch_function_stack() == self.modes
            and torch.is_inference_mode_enabled() == self.inference
            and (not self.autocast or TorchState.now().autocast == self.autocast)
        )


def autocast_dtypes() -> dict[str, torch.dtype]:
    """What autocast takes where a block names no dtype: it outlives the blocks that change it."""
    return {device: torch.get_autocast_dtype(device) for device in _AUTOCAST_DEVICES}


class TakenOff:
    """The thread is in state `outside` from the making of this object until `put_back`."""

    def __init__(self, outside: TorchState, dtypes: dict[str, torch.dtype], inside: TorchState) -> None:
        # Of function modes only those above the outside's are the computation's own.
        self._modes = [_C._pop_torch_function_stack() for _ in range(inside.modes - outside.modes)]
        self._inside = inside
        # Guards, for that is the only way to set these two; they restore in any order, not only last in, first out.
        keys = _C._ForceDispatchKeyGuard(outside.include, outside.exclude)
        self._guards = (_C._InferenceMode(outside.inference), keys)
        for guard in self._guards:
            guard.__enter__()  # type: ignore[no-untyped-call]
        torch._C._set_grad_enabled(outside.grad)
        for device, _ in inside.autocast:
            torch.set_autocast_dtype(device, dtypes[device])

    def put_back(self) -> None:
        for guard in reversed(self._guards):
            guard.__exit__(None, None, None)
        torch._C._set_grad_enabled(self._inside.grad)
        for device, dtype in self._inside.autocast:
            torch.set_autocast_dtype(device, dtype)
        for mode in reversed(self._modes):
            _C._push_on_torch_function_stack(mode)
