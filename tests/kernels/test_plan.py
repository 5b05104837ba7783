"""A kernel in a Plan: `s.execute(tasks, replace=...)` on a tiny model, from capture to result, equal to the model."""

from __future__ import annotations

import pytest
import torch
from kernel_support import DEVICE
from rounding import assert_same
from torch import nn

pytest.importorskip("triton", reason="needs triton, which is not installed")

from dynaflow_serving import Batch, OpScheduler, Resource, Schedule, Split, compile, mark
from dynaflow_serving.core.parse import parse_plan
from dynaflow_serving.core.plan import COMPUTE_STREAM, ActionKind
from dynaflow_serving.kernels import get_kernel
from dynaflow_serving.strategy.splitting import cut_evenly

WIDTH, EPS = 24, 1e-5


class GatedMLP(nn.Module):
    """x + all-reduced attention -> norm -> gated MLP, with the collective of one rank simulated by `x * 2`."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.weight = nn.Parameter(torch.rand(WIDTH))
        self.gate_up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with mark("all_reduce", Resource.NETWORK, ["all_reduce"]):
            reduced = self.proj(x) * 2
        with mark("add"):
            total = reduced + x
        with mark("norm"):
            normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * self.weight
        gate_up = self.gate_up(normed)
        gate, up = gate_up.chunk(2, -1)
        with mark("activation", Resource.MEMORY):
            active = torch.nn.functional.silu(gate) * up
        out: torch.Tensor = total + self.down(active)
        return out


class Replacing(OpScheduler):
    """Both micro-batches in program order; `add` and `norm` as one kernel, `activation` as another, perhaps merged."""

    name = "replacing"
    merged = False

    def split(self, batch: Batch) -> Split:
        return cut_evenly(batch, 2)

    def schedule(self, s: Schedule) -> None:
        norm = get_kernel("add_rms_norm", eps=EPS)
        while ready := s.get_ready_ops():
            task = ready[0]
            mine = [t for t in ready if t.name == task.name]
            if task.name.endswith("activation") and self.merged and len(mine) == s.micro_batches:
                s.execute(mine, replace="silu_mul")
            elif task.name.endswith("activation") and not self.merged:
                s.execute(task, replace="silu_mul", stream="memory")
            elif task.name.endswith("add"):
                s.execute([task, *s.successors(task)[:1]], replace=norm)
            else:
                s.execute(self._other(ready), COMPUTE_STREAM)

    @staticmethod
    def _other(ready: list) -> object:
        """Not yet the activation, while the other micro-batch can get there too."""
        return next((t for t in ready if not t.name.endswith(("activation", "add"))), ready[0])


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("executor", ["auto", "sequential"])
def test_replaced_operators_equal_the_model(merged: bool, executor: str) -> None:
    torch.manual_seed(0)
    model = GatedMLP().to(DEVICE)
    strategy = Replacing()
    strategy.merged = merged
    compiled = compile(model, strategy, executor=executor)
    with torch.no_grad():
        for rows in (4, 7, 12):
            x = torch.randn(rows, WIDTH, device=DEVICE)
            assert_same(compiled(x), model(x))
    (plan_cache,) = compiled.session.plan_caches
    assert compiled.session.counts.split == 3
    (plan,) = (p for p in plan_cache.plans if p.micro_batches == 2)
    replaced = [s for s in plan.actions if s.kind is ActionKind.REPLACE]
    assert {s.kernel for s in replaced} == {"silu_mul", "add_rms_norm[eps=1e-05]"}
    assert [len(s.operators) for s in replaced if s.kernel.startswith("add")] == [2, 2]
    assert len([s for s in replaced if s.kernel == "silu_mul"]) == (1 if merged else 2)
    assert parse_plan(plan.to_text()) == plan
