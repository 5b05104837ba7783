"""All GPU benchmarks, in under 8 minutes: `python -m benchmarks.gpu --json DIR [--quick]`.

Contract
- DIR gets one file per section, as soon as the section ends. It has the raw rows with all samples, the limits measured
  in the same run, and the machine.
- Every section that did not run and every loss are printed and in the files.
- The exit code is 0, or 1 if a section has no rows, or 2 without a CUDA device.
- The code is unmeasured on a GPU: its tests run on a CPU with tiny shapes and a fake timer.

The engine has a benchmark of its own, which runs the real vLLM with and without DynaFlow, in turn:

    dynaflow bench vllm --model MODEL --strategy configs/vllm/prefill_decode.yaml --dtype auto --compiled --pairs 5
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.gpu import corun, models, stack
from benchmarks.gpu.corun import MakeExecutor
from benchmarks.gpu.limits import Limits, measure
from benchmarks.gpu.report import ResultRow, losses, table
from benchmarks.gpu.timing import CudaTimer, Section, SectionOutcome, Timer, run_sections
from dynaflow_serving.executor import get_executor

SECONDS, QUICK_SECONDS = 380.0, 110.0  # the last section may overrun: compilation, the samples it cannot do without
DTYPE = torch.bfloat16
VLLM = next(line.strip() for line in (__doc__ or "").splitlines() if "dynaflow bench vllm" in line)


def sections(timer: Timer, limits: Limits, make_executor: MakeExecutor, device: str, quick: bool) -> list[Section]:
    layers = 2 if quick else stack.LAYERS

    def of(make: Callable[[], stack.StackCase]) -> Callable[[float], list[ResultRow]]:
        def run(seconds: float) -> list[ResultRow]:
            try:
                return stack.rows(timer, seconds, limits, make_executor, make())
            finally:
                models.CONTEXT.keys, models.CONTEXT.values = [], []
                torch._dynamo.reset()
                if device == "cuda":
                    torch.cuda.empty_cache()

        return run

    def kernels(seconds: float) -> list[ResultRow]:
        from benchmarks.gpu.kernels import rows

        return rows(seconds, timer, limits, device=device, dtype=DTYPE)

    return [
        Section("corun", 1.0, lambda s: corun.rows(timer, s, limits, make_executor, device, DTYPE)),
        Section("stack_dense", 3.0, of(lambda: stack.decoder_case("dense", device, DTYPE, layers))),
        Section("stack_moe", 2.0, of(lambda: stack.decoder_case("moe", device, DTYPE, layers))),
        Section("stack_dit", 1.5, of(lambda: stack.dit_case(device, DTYPE, layers))),
        Section("kernels", 1.5, kernels),
    ]


def machine() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def publish(outcomes: Iterator[SectionOutcome], limits: Limits, folder: Path, console: Console) -> int:
    """Write and print each outcome as it comes; return the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"machine": machine(), "limits": vars(limits)}
    lost: list[str] = []
    missing: list[str] = []
    for outcome in outcomes:
        content = {**shared, "section": outcome.section, "seconds": outcome.seconds}
        content |= {"error": outcome.error} if outcome.error else {"rows": outcome.rows}
        (folder / f"{outcome.section}.json").write_text(json.dumps(content, indent=1) + "\n")
        if outcome.error:
            missing.append(f"{outcome.section}: {outcome.error}")
            continue
        console.print(table(f"{outcome.section} ({outcome.seconds:.0f} s)", outcome.rows))
        lost += losses(outcome.rows)
    for title, lines in (("losses", lost), ("without results", missing)):
        text = [f"{title}: {len(lines)}", *(f"  {line}" for line in lines)]
        console.print("\n".join(text), markup=False, highlight=False, soft_wrap=True)
    return 1 if missing else 0


def main(
    folder: Annotated[Path, typer.Option("--json", help="Folder for the raw results.")],
    quick: Annotated[bool, typer.Option(help="Fewer layers and samples: about two minutes.")] = False,
) -> None:
    """Time the strategies and kernels on this GPU, each figure beside its physical limit."""
    console = Console()
    if not torch.cuda.is_available():
        Console(stderr=True).print(
            "These benchmarks need a CUDA device, and none is visible: run them where there is a GPU and a CUDA build "
            "of torch. On a CPU, `dynaflow bench vllm` and benchmarks/hot_path.py run.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(2)
    timer = CudaTimer()
    seconds = QUICK_SECONDS if quick else SECONDS
    limits = measure(timer, seconds / 40, "cuda", DTYPE)
    measured = f"{limits.bytes_per_s / 1e12:.2f} TB/s, {limits.flops_per_s / 1e12:.0f} TFLOP/s"
    console.print(f"{machine()['device']}: {measured} (measured)", highlight=False)
    todo = sections(timer, limits, lambda options: get_executor("cuda", options=options), "cuda", quick)
    with torch.no_grad():
        code = publish(run_sections(todo, seconds), limits, folder, console)
    console.print(f"With the engine: {VLLM}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
