"""A `Call` is one call of a denoiser, with its arguments as they were when it was made.

Contract
- The first tensor argument holds the latents. Its dimension 0 is the batch: videos or images.
- Two calls agree in a tensor if it is the same memory, and nobody has written to it since. Writes that PyTorch does not
  see (`.data`, kernels that hide what they write) are not noticed. In inference mode, where PyTorch does not count
  writes, the contents are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


class Call:
    """One call of a denoiser.

    Attributes:
        leaves: The arguments without the containers that hold them, in the order of the parameters.
        spec: The containers.
        latents: The position of the latents among the leaves; None if there is no tensor.
        rows: The size of the batch.
    """

    def __init__(self, leaves: Sequence[Any], spec: TreeSpec) -> None:
        """Note the arguments of a call, as `of` gives them."""
        self.leaves, self.spec = tuple(leaves), spec
        self._contents = [_content(leaf) for leaf in self.leaves]
        self.latents = next((i for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)), None)
        self.rows = 0 if self.latents is None else self.leaves[self.latents].shape[0]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Call:
        """Return the call with the arguments `given`, by the names of the parameters."""
        return cls(*tree_flatten(dict(given)))

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments, by the names of the parameters."""
        given: dict[str, Any] = tree_unflatten(list(self.leaves), self.spec)
        return given

    def holds_batch(self, i: int) -> bool:
        """Return whether the `i`-th leaf is a tensor with as many rows as the latents."""
        leaf = self.leaves[i]
        return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == self.rows

    @property
    def batched(self) -> list[torch.Tensor]:
        """The tensors that hold the batch."""
        return [leaf for i, leaf in enumerate(self.leaves) if self.holds_batch(i)]

    def unchanged(self, i: int) -> bool:
        """Return whether the `i`-th leaf is what it was when the call was made."""
        return _same_content(self._contents[i], _content(self.leaves[i]))

    def agrees(self, other: Call, i: int) -> bool:
        """Return whether the `i`-th leaf of a later call is this call's, unchanged."""
        mine, its = self.leaves[i], other.leaves[i]
        if not isinstance(mine, torch.Tensor) or not isinstance(its, torch.Tensor):
            return bool(mine is its or (type(mine) is type(its) and isinstance(mine, _PLAIN) and mine == its))
        return _same_memory(mine, its) and _same_content(self._contents[i], other._contents[i])

    def equals(self, other: Call) -> bool:
        """Return whether a later call has exactly the arguments of this one."""
        return self.spec == other.spec and all(self.agrees(other, i) for i in range(len(self.leaves)))


_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device)


def _content(leaf: Any) -> int | torch.Tensor | None:
    """Return what tells later whether a tensor was written: its version, or a copy where it has none."""
    if not isinstance(leaf, torch.Tensor):
        return None
    return leaf.clone() if leaf.is_inference() else leaf._version


def _same_content(then: int | torch.Tensor | None, now: int | torch.Tensor | None) -> bool:
    if isinstance(then, torch.Tensor) and isinstance(now, torch.Tensor):
        return torch.equal(then, now)
    return type(then) is type(now) and bool(then == now)


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b:
        return True
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype is b.dtype
        and a.device == b.device
    )
