"""Two real ranks, or more: processes of this machine in one gloo group.

Contract
- A function that runs on the ranks is importable by name there, and what it returns can be read by `torch.load`.
- Each call has processes of its own. They are forked from a server that has imported what takes seconds (`PRELOADED`),
  and nothing else; it is started by the first call, and its environment is that of then.
- Both ranks leave the group together, for a rank that exits early can abort the other's gloo threads.
- A rank that raises ends the other, and the error reaches the test.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

RANKS = 2
START = "forkserver"
PRELOADED = ("torch._dynamo.convert_frame", "torch._functorch.aot_autograd", "torch.distributed.tensor.parallel")


def preload(*modules: str) -> None:
    """Let ranks be forked where `modules` have been imported, too; before the first call."""
    multiprocessing.set_forkserver_preload([*PRELOADED, *modules])


preload()


def on_two_ranks(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `function(*args)` on both ranks; `torch.distributed.get_rank()` says there which one it is.

    Returns:
        What each rank returned.
    """
    return on_ranks(RANKS, function, *args)


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `function(*args)` on so many ranks; the result is that of `on_two_ranks`."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(_rank, (folder, ranks, function, args), nprocs=ranks, start_method=START)
        return [torch.load(Path(folder, f"rank{rank}")) for rank in range(ranks)]


def where_one_dies(function: Callable[..., Any], *args: Any) -> tuple[list[int | None], Any]:
    """Run `function(*args)` on both ranks, where rank 1 does not survive it.

    Returns:
        The exit codes of both, and what rank 0 returned.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, RANKS, function, args, False)
        context = multiprocessing.start_processes(_rank, arguments, nprocs=RANKS, join=False, start_method=START)
        for process in context.processes:
            process.join(120)
        return [process.exitcode for process in context.processes], torch.load(Path(folder, "rank0"))


def _rank(
    rank: int, folder: str, ranks: int, function: Callable[..., Any], args: tuple[Any, ...], leave_together: bool = True
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))  # as torchrun does
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    torch.save(function(*args), Path(folder, f"rank{rank}"))
    if leave_together:
        dist.barrier()
        dist.destroy_process_group()
