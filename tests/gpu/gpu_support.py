"""What the GPU tests share: the mark that skips them, and programs on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import IN_PLACE, TWO_STREAMS, lowered, manual, program_of

from dynaflow_serving.capture.examples import HIDDEN, example_capture
from dynaflow_serving.capture.program import CapturedProgram
from dynaflow_serving.core.plan import Plan

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and none is visible"),
]

CYCLES = 50_000_000  # tens of milliseconds: far longer than anything else here takes


def slow_bump() -> tuple[CapturedProgram, Plan]:
    """(x + 1) * 2, where the + 1 is late by `CYCLES` on a stream of its own; without the wait: x * 2."""
    program = program_of(IN_PLACE)

    def bump(y: torch.Tensor) -> None:
        torch.cuda._sleep(CYCLES)
        y.add_(1)

    capture = manual(program, make=torch.clone, bump=bump, read=lambda y: y * 2)
    return capture, lowered(program, 1, *TWO_STREAMS)


def on_gpu(model: str) -> CapturedProgram:
    capture = example_capture(model)
    capture.constants = tuple(c.cuda() for c in capture.constants)
    for name, maker in capture.buffers.items():
        capture.buffers[name] = lambda tokens, maker=maker: maker(tokens).cuda()
    return capture


def arguments_of(capture: CapturedProgram, tokens: int, device: str = "cuda") -> list[Any]:
    names = capture.program.inputs[: len(capture.program.inputs) - len(capture.constants)]
    return [torch.randn(tokens, HIDDEN, device=device) if n == "x" else tokens for n in names]
