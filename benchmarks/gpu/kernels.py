"""Every replacement kernel against torch eager and torch.compile: `python -m benchmarks.gpu.kernels [--json FILE]`.

Contract
- A case is one kernel at one shape of a served model. Its variants are the Triton kernel, plain PyTorch, and the same
  compiled by Inductor. All compute the same; the outputs are compared before anything is timed.
- The bytes of a case are those that the operation cannot do without: each input is read and each output written once.
  So the bandwidth is the operation's, whatever the variant moves.
- Small cases stay in the L2 cache between calls and may exceed the memory's bandwidth.
- Every variant is replayed from a CUDA graph, as an engine does at small sizes: launches from Python are not timed.
- The code is unmeasured on a GPU: its tests run on a CPU with Triton's interpreter and a fake timer.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu.limits import Limits, Work, measure
from benchmarks.gpu.report import ResultRow, losses, rows_of, table
from benchmarks.gpu.timing import CudaTimer, Timer, VariantTimes, time_in_turn
from dynaflow_serving.kernels import KERNELS, get_kernel

EAGER, COMPILED = "torch eager", "torch.compile"
TOKENS = (64, 1024, 8192)
Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class KernelCase:
    name: str
    kernels: dict[str, Callable[[], Any]]  # variant -> the kernel
    plain: Callable[..., Any]
    arguments: tuple[Any, ...]
    bytes: int  # read and written, at least


def cases(
    device: str, dtype: torch.dtype, tokens: Sequence[int] = TOKENS, hidden: int = 4096, intermediate: int = 14336
) -> Iterator[KernelCase]:
    """Yield the cases at Llama-3-8B's sizes; gate and up are the halves of one merged projection."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    for n in tokens:
        x, residual, weight = random(n, hidden), random(n, hidden), random(hidden)
        yield _case("add_rms_norm", n, (x, residual, weight), 4 * x.nbytes)
        gate_up = random(n, 2 * intermediate)
        yield _case("silu_mul", n, tuple(gate_up.chunk(2, -1)), gate_up.nbytes * 3 // 2)


def _case(name: str, tokens: int, arguments: tuple[Any, ...], size: int) -> KernelCase:
    return KernelCase(
        name=f"{name}, {tokens} tokens",
        kernels={"triton": partial(get_kernel(name), *arguments)},
        plain=KERNELS[name].reference,
        arguments=arguments,
        bytes=size,
    )


def rows(
    seconds: float,
    timer: Timer | None = None,
    limits: Limits | None = None,
    compiler: Compiler = torch.compile,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    **sizes: Any,
) -> list[ResultRow]:
    """Time all cases within about `seconds`, besides Inductor's compilation, and return the raw rows.

    Args:
        seconds: The time for all cases.
        timer: Measures the calls; None for CUDA events.
        limits: The device's limits; None to measure them.
        compiler: Compiles the plain variant.
        device: Where the kernels run.
        dtype: The dtype of their arguments.
        sizes: Keyword arguments of `cases`.

    Raises:
        RuntimeError: There is no CUDA device, or a kernel's result is not the plain one's.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("the kernels are timed on a CUDA device, and none is visible")
    timer = timer or CudaTimer()
    limits = limits or measure(timer, seconds / 10, device, dtype)
    result = []
    with torch.no_grad():
        todo = list(cases(device, dtype, **sizes))
        for case in todo:
            torch._dynamo.reset()
            variants = {
                **case.kernels,
                EAGER: partial(case.plain, *case.arguments),
                COMPILED: partial(compiler(case.plain), *case.arguments),
            }
            _compare(case, dtype)
            if device == "cuda":
                variants = {name: Graphed(call) for name, call in variants.items()}
            result += _rows(case, time_in_turn(variants, timer, seconds / len(todo)), limits)
    return result


class Graphed:
    """`call`, captured by the first and replayed by every other call of this object."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._call()  # compiles and allocates, which a capture must not
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._call()
            self._graph = graph
        self._graph.replay()


def _rows(case: KernelCase, measured: VariantTimes, limits: Limits) -> list[ResultRow]:
    limit = limits.milliseconds([Work(0, case.bytes)], overlapped=False)
    against = {name: (EAGER, COMPILED) for name in case.kernels}
    found = rows_of(case.name, measured, dict.fromkeys(measured.samples, limit), against)
    for row in found:
        row["bytes"] = case.bytes
        if "ms" in row:
            row["bytes_per_s"] = case.bytes / row["ms"]["median"] * 1e3
    return found


def _compare(case: KernelCase, dtype: torch.dtype) -> None:
    """Raise `RuntimeError` unless every kernel's result is the plain one's, to a few roundings."""
    for name, kernel in case.kernels.items():
        try:
            torch.testing.assert_close(
                kernel(), case.plain(*case.arguments), atol=8 * torch.finfo(dtype).eps, rtol=8 * torch.finfo(dtype).eps
            )
        except AssertionError as e:
            raise RuntimeError(f"{case.name}: {name} is wrong: {e}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the raw rows to this file")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the kernels are timed on a CUDA device, and none is visible")
    found = rows(options.seconds)
    console = Console(width=160)
    console.print(table(f"{torch.cuda.get_device_name()}, bfloat16", found))
    for row in found:
        if "ms" in row:
            console.print(
                f"{row['case']}, {row['variant']}: {row['bytes'] / 1e6:.1f} MB, {row['bytes_per_s'] / 1e9:.0f} GB/s"
            )
    console.print("\n".join(losses(found)) or "no losses")
    if options.json:
        machine = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        options.json.write_text(json.dumps({**machine, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
