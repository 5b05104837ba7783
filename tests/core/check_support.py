"""A model whose second block a strategy runs by a kernel, for the tests of the check."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rounding import with_integer_weights
from torch import nn

from dynaflow_serving.config import Config
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.session.session import Session
from dynaflow_serving.strategy.base import OpScheduler
from dynaflow_serving.strategy.rules import SplitFunc, SplitModule
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.selector import FixedStrategy
from dynaflow_serving.strategy.splitting import cut_evenly
from dynaflow_serving.torch_backend import Backend, Compiled, Level

WIDTH = 16
Kernel = Callable[..., torch.Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class WithKernel(OpScheduler):
    """Runs the second block of every micro-batch by a kernel. Batches of 12 and more are cut in three."""

    name = "with_kernel"
    annotations = (SplitModule("Block", required=False), SplitFunc("check_test::centred", "centred", required=False))
    max_micro_batches = 3
    row_wise = ("check_test::centred", "check_test::noted")

    def __init__(self, kernel: Kernel | None = None) -> None:
        super().__init__()
        self.kernel = kernel

    def split(self, batch: Batch) -> Split:
        return cut_evenly(batch, 3 if len(batch.tokens) >= 12 else 2)

    def schedule(self, s: Schedule) -> None:
        while ready := s.get_ready_ops():
            s.execute(ready[0], replace=self.kernel if ready[0].name.endswith("layers.1.Block") else None)


def kernel_of(block: nn.Module, factor: float = 1.0) -> Kernel:
    """What `block` computes, times `factor`. A lowered graph passes weights and sizes in an order of its own."""

    def a_kernel(*inputs: Any) -> torch.Tensor:
        tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
        (x,) = [t for t in tensors if t.dim() == 2 and t.shape[1] == WIDTH and t.shape[0] < WIDTH]
        return block(x) * factor  # type: ignore[no-any-return]

    return a_kernel


def compiled_with(
    strategy: OpScheduler, model: Callable[..., Any], level: Level = "dynamo", check: Any = "first"
) -> Compiled:
    """`model` under `strategy`."""
    torch._dynamo.reset()
    session = Session(FixedStrategy(strategy), Config(strategy="sequential", check=check), None)
    return Compiled(model, Backend(session, 0, level), 0)


def model_under(factor: float, folder: Path, level: Level = "dynamo", check: Any = None) -> tuple[Model, Compiled]:
    """A model whose second block is `factor` times what it should be, wherever its batch is split."""
    torch.manual_seed(0)
    model = with_integer_weights(Model())
    check = {"folder": str(folder)} if check is None else check
    return model, compiled_with(WithKernel(kernel_of(model.layers[1], factor)), model, level, check)
