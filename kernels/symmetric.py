"""All-reduce + residual add + RMSNorm in one kernel over symmetric memory (TokenWeave, arXiv 2505.11329).

Each rank reads its tokens' partial sums from all peers, adds, norms, and writes the rows into all peers' outputs;
one barrier before and one after. Peers are reached by address over NVLink or PCIe peer-to-peer.

Contract
- Collective: all ranks make an object, and call it, in one order and with the same shapes; the calls of one object
  are on one stream, since they share its buffers. Two streams need two objects.
- `unsupported` probes before anything is allocated and names what is missing; the rendezvous is eager.
- `ctas` is chosen per call: few while a GEMM runs beside it, many when it runs alone (DynaFlow: +12 %).
- The partial sums are copied in and the results copied out, since both outlive the call in a Plan.
- Unmeasured and not run: no GPU with peers was at hand. Its kernel is `reduce_rms_norm`'s, which tests run for every
  rank in turn; the multicast (multimem) instructions of NVSwitch are not used.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from dynaflow_serving.errors import InactiveError, ScheduleError
from dynaflow_serving.kernels.collectives import own_tokens
from dynaflow_serving.kernels.reduce_rms_norm import check_arguments, launch

ALIGNMENT = 16  # bytes: each of the three buffers starts at a multiple


def unsupported(group: dist.ProcessGroup | None = None) -> str:
    """Why symmetric memory cannot be used by `group` on this rank; "" if nothing is known to be in the way."""
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    if not dist.is_available() or not dist.is_initialized():
        return "torch.distributed is not initialised"
    size = dist.get_world_size(group)
    if size < 2:
        return "the process group has one rank"
    here = torch.cuda.current_device()
    visible = torch.cuda.device_count()
    if visible >= size:  # one process per device, all visible: ask the driver; else the rendezvous will tell
        deaf = [d for d in range(size) if d != here and not torch.cuda.can_device_access_peer(here, d)]
        if deaf:
            return f"device {here} has no peer-to-peer access to devices {deaf}"
    return ""


class SymmetricAllReduce:
    """`all_reduce_add_rms_norm` for up to `tokens` tokens of `hidden` elements.

    Raises `InactiveError` where symmetric memory is not to be had.
    """

    def __init__(
        self, tokens: int, hidden: int, dtype: torch.dtype, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        if why := unsupported(group):
            raise InactiveError(
                f"the symmetric-memory kernel cannot be used: {why}; use kernel 'all_reduce_add_rms_norm' instead"
            )
        import torch.distributed._symmetric_memory as symm_mem

        self.rank, self.ranks, self.tokens, self.hidden = group.rank(), group.size(), tokens, hidden
        step = -(-tokens * hidden * dtype.itemsize // ALIGNMENT) * ALIGNMENT // dtype.itemsize
        try:
            memory = symm_mem.empty(3 * step, dtype=dtype, device=device)
            self._handle = symm_mem.rendezvous(memory, group)
        except RuntimeError as e:
            raise InactiveError(
                f"the ranks cannot share memory ({e}): they must be on one node or NVLink domain, with peer-to-peer "
                "access; use kernel 'all_reduce_add_rms_norm' instead"
            ) from e
        self._mine = memory.view(3, step)[:, : tokens * hidden]
        base = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=device)
        self._tables = tuple(base + i * step * dtype.itemsize for i in range(3))  # of partials, totals, normeds

    def __call__(
        self, partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, ctas: int = 8
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """partial, residual: (tokens, hidden), weight: (hidden,). Returns (sum + residual, its RMSNorm).

        Raises `ScheduleError` for other shapes and dtypes, and for more tokens than there is room for.
        """
        check_arguments("symmetric all_reduce_add_rms_norm", partial, residual, weight)
        tokens = len(partial)
        if tokens > self.tokens or partial.shape[1] != self.hidden or partial.dtype != self._mine.dtype:
            raise ScheduleError(
                f"symmetric all_reduce_add_rms_norm was made for {self.tokens} tokens of {self.hidden} elements of "
                f"{self._mine.dtype}, and got {tuple(partial.shape)} of {partial.dtype}"
            )
        source, total, normed = (buffer[: partial.numel()].view_as(partial) for buffer in self._mine)
        source.copy_(partial)
        self._handle.barrier(channel=0)  # all partial sums are there, and nobody reads old results any more
        rows = own_tokens(tokens, self.rank, self.ranks)
        partials, totals, normeds = self._tables
        launch((partials, totals, normeds), residual, weight, eps, rows, ctas)
        self._handle.barrier(channel=1)  # all rows have been sent
        return total.clone(), normed.clone()
