"""`Ranks` lets the ranks that must decide alike exchange values.

Contract
- Every method is a collective, so all ranks of the group call it, in the same order.
- Without a group there is one rank, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Ranks:
    """These are the ranks of one process group."""

    def __init__(self, group: Any = None) -> None:
        """Take the ranks of `group`, a `ProcessGroup` for CPU tensors and objects, or this rank alone for None."""
        self.group = group
        self.size = 1
        if group is not None:
            import torch.distributed as dist

            self.size = dist.get_world_size(group)

    @property
    def first(self) -> bool:
        """This says whether this rank is the one that shows results and writes files."""
        if self.size == 1:
            return True
        import torch.distributed as dist

        return dist.get_rank(self.group) == 0

    def greatest(self, values: Sequence[float]) -> list[float]:
        """Return, for each place in `values`, the greatest value of all ranks."""
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return [float(v) for v in tensor]

    def gather_numbers(self, values: Sequence[int]) -> list[list[int]]:
        """Return the `values` of every rank, in order of the ranks; all ranks give equally many."""
        if self.size == 1:
            return [list(values)]
        import torch
        import torch.distributed as dist

        mine = torch.tensor(values, dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.group)
        return [numbers.tolist() for numbers in everyone]

    def gather(self, value: Any) -> list[Any]:
        """Return the `value` of every rank, in order of the ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.group)
        return everyone
