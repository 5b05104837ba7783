"""A server without its collectives, to time its compute alone: they return at once, and are noted.

Contract
- `prepare` makes a folder for `PYTHONPATH`. Each Python process that starts with it mutes torch.distributed's
  collectives of floating-point tensors; those of other tensors, with which engines control themselves, go on.
- A muted collective leaves an output of the right shape. Its values are wrong, so outputs are not compared.
- Each process notes one line per muted collective: its kind and the bytes that a rank puts in. A gather counts as an
  all-gather.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dynaflow_serving.capture.independence import row_wise

NOTES = "DYNAFLOW_BENCH_NOTES"  # the folder for notes
_STARTUP = """import sys

if not any("resource_tracker" in word for word in sys.orig_argv):  # such a process need not import torch
    from dynaflow_serving.bench.muted import install

    install()
"""

Message = tuple[str, int]  # the name of a collective, and the bytes that a rank puts in


def prepare(folder: Path) -> dict[str, str]:
    """Make the folder, and return the environment variables of muted processes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_STARTUP)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))
    return {"PYTHONPATH": path, NOTES: str(folder)}


def messages(folder: Path) -> list[Message]:
    """Return what one rank has noted so far: the first one that has noted anything."""
    for path in sorted(folder.glob("messages-*")):
        if lines := path.read_text().splitlines():
            return [(name, int(size)) for name, size in map(str.split, lines)]
    return []


def install() -> None:
    """Mute this process."""
    row_wise("dynaflow_bench::note")
    for muted in (_all_reduce, _all_gather_into_tensor, _all_gather, _gather, _reduce_scatter_tensor):
        setattr(dist, muted.__name__[1:], muted)


@torch.library.custom_op("dynaflow_bench::note", mutates_args=("tensor",))
def note(tensor: torch.Tensor, name: str) -> None:
    """Note one collective. It is an operator, so that Dynamo captures it, and writes, so that nothing removes it."""
    with open(Path(os.environ[NOTES], f"messages-{os.getpid()}"), "a") as file:
        file.write(f"{name} {tensor.numel() * tensor.element_size()}\n")


@note.register_fake
def _(tensor: torch.Tensor, name: str) -> None:
    return None


# Those that engines call for other tensors as well keep the stock function for them.
_stock_all_reduce, _stock_all_gather = dist.all_reduce, dist.all_gather
_stock_gather, _stock_all_gather_into_tensor = dist.gather, dist.all_gather_into_tensor


def _all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if not tensor.is_floating_point():
        return _stock_all_reduce(tensor, *args, **kwargs)
    note(tensor, "all_reduce")
    return None


def _all_gather_into_tensor(output: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if not tensor.is_floating_point():
        return _stock_all_gather_into_tensor(output, tensor, *args, **kwargs)
    note(tensor, "all_gather")
    output.view(-1, *tensor.shape).copy_(tensor)
    return None


def _all_gather(parts: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if not tensor.is_floating_point():
        return _stock_all_gather(parts, tensor, *args, **kwargs)
    note(tensor, "all_gather")
    _repeat(parts, tensor)
    return None


def _gather(tensor: torch.Tensor, parts: list[torch.Tensor] | None = None, *args: Any, **kwargs: Any) -> Any:
    if not tensor.is_floating_point():
        return _stock_gather(tensor, parts, *args, **kwargs)
    note(tensor, "all_gather")
    _repeat(parts or [], tensor)
    return None


def _reduce_scatter_tensor(output: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    note(tensor, "reduce_scatter")
    output.copy_(tensor.view(-1)[: output.numel()].view(output.shape))


def _repeat(parts: list[torch.Tensor], tensor: torch.Tensor) -> None:
    for part in parts:
        part.copy_(tensor)


class Replay:
    """One of two ranks that send noted messages again, with nothing else: the network alone."""

    def start(self) -> None:
        """Meet the other rank."""
        torch.set_num_threads(1)
        dist.init_process_group("gloo")

    def run(self, messages: list[Message]) -> float:
        """Return the seconds of the messages, one after the other."""
        world = dist.get_world_size()
        small = {size: torch.zeros(size // 4) for _, size in messages}
        large = {size: torch.zeros(world * (size // 4)) for kind, size in messages if kind == "all_gather"}
        part = {size: torch.zeros(size // 4 // world) for kind, size in messages if kind == "reduce_scatter"}
        dist.barrier()
        began = time.perf_counter()
        for kind, size in messages:
            if kind == "all_reduce":
                dist.all_reduce(small[size])
            elif kind == "all_gather":
                dist.all_gather_into_tensor(large[size], small[size])
            else:
                dist.reduce_scatter_tensor(part[size], small[size])
        return time.perf_counter() - began

    def close(self) -> None:
        """Leave the group together with the other rank."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
