"""A `Call` is one call of a denoiser, with its arguments as they were when it was made.

Contract
- The first tensor argument holds the latents. Its dimension 0 is the batch: videos or images.
- What is known to be shared by all rows (positions of an image, of which a model reads the first row) holds no batch.
- Two calls agree in a tensor if it is the same memory, and nobody has written to it since. Writes that PyTorch does not
  see (`.data`, kernels that hide what they write) are not noticed. In inference mode, where PyTorch does not count
  writes, the contents are compared.
- Small tensors of equal values in other memory are alike: pipelines make a timestep anew for each call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_SMALL = 64  # values of a tensor whose contents are looked at; on a GPU, this waits for them


class Call:
    """One call of a denoiser.

    Attributes:
        leaves: The arguments without the containers that hold them, in the order of the parameters.
        spec: The containers.
        latents: The position of the latents among the leaves; None if there is no tensor.
        rows: The size of the batch.
        shared: The positions of leaves that hold no batch, whatever their size.
    """

    def __init__(self, leaves: Sequence[Any], spec: TreeSpec, shared: Set[int] = frozenset()) -> None:
        """Note the arguments of a call, as `of` gives them."""
        self.leaves, self.spec, self.shared = tuple(leaves), spec, shared
        self._contents = [_content(leaf) for leaf in self.leaves]
        self.latents = next((i for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)), None)
        self.rows = 0 if self.latents is None else self.leaves[self.latents].shape[0]

    @classmethod
    def of(cls, given: Mapping[str, Any], shared: Set[int]) -> Call:
        """Return the call with the arguments `given`, by the names of the parameters."""
        return cls(*tree_flatten(dict(given)), shared)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments, by the names of the parameters."""
        given: dict[str, Any] = tree_unflatten(list(self.leaves), self.spec)
        return given

    def holds_batch(self, i: int) -> bool:
        """Return whether the `i`-th leaf is a tensor with as many rows as the latents."""
        leaf = self.leaves[i]
        if i in self.shared or not isinstance(leaf, torch.Tensor):
            return False
        return leaf.dim() > 0 and leaf.shape[0] == self.rows

    @property
    def batched(self) -> list[int]:
        """The positions of the leaves that hold the batch."""
        return [i for i in range(len(self.leaves)) if self.holds_batch(i)]

    def unchanged(self, i: int) -> bool:
        """Return whether the `i`-th leaf is what it was when the call was made."""
        return _same_content(self._contents[i], _content(self.leaves[i]))

    def agrees(self, other: Call, i: int) -> bool:
        """Return whether the `i`-th leaf of a later call is this call's, unchanged."""
        mine, its = self.leaves[i], other.leaves[i]
        if not isinstance(mine, torch.Tensor) or not isinstance(its, torch.Tensor):
            return bool(mine is its or (type(mine) is type(its) and isinstance(mine, _PLAIN) and mine == its))
        return _same_memory(mine, its) and _same_content(self._contents[i], other._contents[i])

    def alike(self, other: Call, i: int) -> bool:
        """Return whether the `i`-th leaf of a later call is a small tensor of the values that this call's still has."""
        mine, its = self.leaves[i], other.leaves[i]
        if not isinstance(mine, torch.Tensor) or not isinstance(its, torch.Tensor) or mine.numel() > _SMALL:
            return False
        same_kind = mine.shape == its.shape and mine.dtype is its.dtype and mine.device == its.device
        return same_kind and self.unchanged(i) and torch.equal(mine, its)

    def equals(self, other: Call) -> bool:
        """Return whether a later call has exactly the arguments of this one."""
        leaves = range(len(self.leaves))
        return self.spec == other.spec and all(self.agrees(other, i) or self.alike(other, i) for i in leaves)


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
