"""`fused_norms`: kernels for what a model computes exactly, nothing for what it nearly computes, and equal results."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any, Literal

import pytest
import torch
from fused_support import (
    EPS,
    FUSED,
    LAYERS,
    NEAR_MISSES,
    NEAR_MISSES_IN_HALF,
    WIDTH,
    Bodies,
    CalledNorm,
    DecomposedNorm,
    Llama,
)
from kernel_support import DEVICE, run_python
from torch import fx, nn

pytest.importorskip("triton", reason="needs triton, which is not installed")

from dynaflow_serving import Batch, OpScheduler, Schedule, Split, compile
from dynaflow_serving.core.plan import Action, ActionKind, Plan
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels import fused as fused_kernels
from dynaflow_serving.kernels import get_kernel
from dynaflow_serving.kernels.fused import Fused
from dynaflow_serving.kernels.fusions import find_fusions
from dynaflow_serving.strategy.splitting import whole

Level = Literal["dynamo", "aot"]
levels = pytest.mark.parametrize("level", ["dynamo", "aot"])

# Float32: sums in another order. Bfloat16: a few roundings a layer; the interpreter truncates where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-1}


def fused(model: nn.Module, x: torch.Tensor, level: Level = "dynamo", executor: str = "auto") -> tuple[Any, Plan]:
    """The model's result under `fused_norms`, and the plan."""
    torch._dynamo.reset()
    # A wrong kernel has to show: the check would put the right result in its place.
    compiled = compile(model, {"strategy": "fused_norms", "check": "never"}, level=level, executor=executor)
    with torch.no_grad():
        result = compiled(x)
    (plan_cache,) = compiled.session.plan_caches
    (plan,) = plan_cache.plans
    return result, plan


def replaced(plan: Plan) -> list[Action]:
    return [a for a in plan.actions if a.kind is ActionKind.REPLACE]


def random_input(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 7, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def assert_equals(result: Any, model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(result, model(x), atol=TOLERANCE[x.dtype], rtol=TOLERANCE[x.dtype])


@levels
@pytest.mark.parametrize("norm", [DecomposedNorm, CalledNorm])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_llama_equals_the_model(norm: type[DecomposedNorm], level: Level, dtype: torch.dtype) -> None:
    model, x = Llama(norm).to(DEVICE, dtype), random_input(dtype)
    result, plan = fused(model, x, level)
    assert_equals(result, model, x)
    found = [a.kernel for a in replaced(plan)]
    assert found == ["add_rms_norm", "silu_mul", "add_rms_norm"] * LAYERS
    assert plan.micro_batches == 1


def test_the_plan_of_one_layer() -> None:
    _, plan = fused(Llama(layers=1).to(DEVICE), random_input())
    assert plan.to_text().partition("\n")[2] == (
        "compute | run layers.0.compute @0\n"
        "compute | replace layers.0.add_rms_norm @0 with add_rms_norm\n"
        "compute | free layers.0.compute@0\n"
        "compute | run layers.0.mlp.0 @0\n"
        "compute | run layers.0.mlp.1 @0\n"
        "compute | free layers.0.add_rms_norm:0@0\n"
        "compute | replace layers.0.silu_mul.0 + layers.0.silu_mul.1 @0 with silu_mul\n"
        "compute | free layers.0.mlp.0@0 layers.0.mlp.1@0\n"
        "compute | run layers.0.mlp.2 @0\n"
        "compute | free layers.0.silu_mul.1@0\n"
        "compute | replace norm.add_rms_norm @0 with add_rms_norm\n"
        "compute | free layers.0.add_rms_norm:1@0 layers.0.mlp.2@0\n"
    )


@levels
@pytest.mark.parametrize(
    ("bodies", "dtype"), [(NEAR_MISSES, torch.float32), (NEAR_MISSES_IN_HALF, torch.bfloat16)], ids=["float", "half"]
)
def test_near_misses_are_left_alone(bodies: tuple[Any, ...], dtype: torch.dtype, level: Level) -> None:
    model, x = Bodies(*bodies).to(DEVICE, dtype), random_input(dtype)
    result, plan = fused(model, x, level)
    assert_equals(result, model, x)
    assert [a.operators for a in replaced(plan)] == [("mlp.silu_mul.0", "mlp.silu_mul.1")]


@levels
@pytest.mark.parametrize("executor", ["auto", "sequential"])
def test_results_that_others_read_and_other_spellings(level: Level, executor: str) -> None:
    model, x = Bodies(*FUSED).to(DEVICE), random_input()
    result, plan = fused(model, x, level, executor)
    assert_equals(result, model, x)
    assert [a.kernel for a in replaced(plan)] == ["silu_mul", *["add_rms_norm"] * len(FUSED)]


def test_the_fused_operator_of_aten() -> None:
    """CUDA lowers `rms_norm` to it; it rounds once, which matters below float32."""
    graph, aten = fx.Graph(), torch.ops.aten
    values = {name: torch.rand(size).half() for name, size in (("x", (3, 8)), ("residual", (3, 8)), ("weight", (8,)))}
    x, residual, weight = map(graph.placeholder, values)
    total = graph.call_function(aten.add.Tensor, (x, residual))
    call = graph.call_function(aten._fused_rms_norm.default, (total, [8], weight, EPS))
    normed = graph.call_function(operator.getitem, (call, 0))
    for node, value in zip((x, residual, weight, total, normed), (*values.values(), *[values["x"]] * 2), strict=True):
        node.meta["val"] = value
    (found,) = find_fusions(graph)
    assert (found.inputs, found.outputs) == ((x, residual, weight), (total, normed))
    assert found.constants == {"eps": EPS, "round_first": False}
    graph.output(graph.call_function(operator.getitem, (call, 1)))  # the reciprocal deviation, for gradients
    assert not find_fusions(graph)


@pytest.mark.parametrize("fault", ["epsilon", "order of results"])
def test_a_wrong_kernel_shows_in_the_results(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    right = get_kernel("add_rms_norm")

    def wrong(*inputs: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
        total, normed = right(*inputs, eps=0.1 if fault == "epsilon" else eps)
        return (total, normed) if fault == "epsilon" else (normed, total)

    monkeypatch.setattr(fused_kernels, "get_kernel", lambda name, **constants: partial(wrong, **constants))
    model, x = Llama(layers=1).to(DEVICE), random_input()
    monkeypatch.setattr(model.layers[0], "mlp", nn.Identity())  # without a SiLU-mul
    result, _ = fused(model, x)
    with pytest.raises(AssertionError, match="not close"):
        assert_equals(result, model, x)


@pytest.mark.parametrize(("level", "said"), [("dynamo", "has no backward"), ("aot", "keep values for gradients")])
def test_training_is_refused(level: Level, said: str) -> None:
    torch._dynamo.reset()
    with pytest.raises(ScheduleError, match=said):
        compile(Llama().to(DEVICE), "fused_norms", level=level)(random_input())


def test_a_model_without_any_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"fused_norms: this model has no residual add \+ RMSNorm and no SiLU-mul"):
        fused(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()).to(DEVICE), random_input())


class Everywhere(OpScheduler):
    """Puts a kernel in the place of every operator, whatever it computes."""

    name = "everywhere"
    schedules_unsplit = True

    def split(self, batch: Batch) -> Split:
        return whole(batch, "for the test")

    def schedule(self, s: Schedule) -> None:
        for task in s.get_ready_ops():
            s.execute(task, replace=Fused("silu_mul"))


def test_operators_that_compute_something_else_keep_their_place() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).to(DEVICE)
    with torch.no_grad(), pytest.raises(ScheduleError, match=r"'silu_mul' cannot stand in for .* something else"):
        compile(model, Everywhere())(random_input())


@pytest.mark.parametrize(
    ("before", "said"),
    [("sys.modules['triton'] = None", "needs triton, which is not installed"), ("", "set TRITON_INTERPRET=1")],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no CUDA device")
def test_what_is_missing_is_said_in_the_first_step(before: str, said: str) -> None:
    code = (
        f"import sys, torch; {before or 'pass'}\n"
        "from dynaflow_serving import compile\n"
        "from dynaflow_serving.errors import ScheduleError\n"
        "def model(x, y): return torch.nn.functional.silu(x) * y\n"
        "try:\n"
        "    with torch.no_grad(): compile(model, 'fused_norms')(torch.zeros(3, 4), torch.zeros(3, 4))\n"
        "except ScheduleError as e: print(e)"
    )
    assert said in run_python(code)
