"""`fused_norms` on real transformers models: which operators kernels stand in for.

Triton is not installed beside transformers on a CPU, so plain PyTorch stands in for the kernels; `tests/kernels` runs
the real ones, on a model that is written alike.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from dynaflow_serving import compile
from dynaflow_serving.core.plan import ActionKind, Plan
from dynaflow_serving.integrations.transformers import enable, report
from dynaflow_serving.kernels import fused

CONFIG = Path(__file__).parents[2] / "configs/transformers/fused_norms.yaml"


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return total, weight * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps))


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were called."""
    called: list[str] = []

    def stand_in(name: str, *inputs: torch.Tensor, **constants: Any) -> Any:
        called.append(name)
        return {"add_rms_norm": add_rms_norm, "silu_mul": silu_mul}[name](*inputs, **constants)

    monkeypatch.setattr(fused, "get_kernel", lambda name, **constants: partial(stand_in, name, **constants))
    return called


def load(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    torch._dynamo.reset()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def replaced(plan: Plan) -> list[str]:
    return [a.kernel for a in plan.actions if a.kind is ActionKind.REPLACE]


@pytest.mark.parametrize("level", ["dynamo", "aot"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_every_norm_after_an_addition_and_every_activation(
    models: dict[str, str], calls: list[str], kind: str, level: Literal["dynamo", "aot"]
) -> None:
    model = load(models[kind])
    body, layers = model.base_model, model.config.num_hidden_layers
    ids = torch.arange(3, 24).view(3, 7)
    compiled = compile(body, "fused_norms", level=level)
    with torch.no_grad():
        expected = body(input_ids=ids, use_cache=False).last_hidden_state
        result = compiled(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(result, expected)  # the stand-ins do what the model does, in the same order
    (plan,) = compiled.session.plan_caches[0].plans
    assert replaced(plan) == calls == ["add_rms_norm", "silu_mul", "add_rms_norm"] * layers


def test_a_model_is_enabled_by_the_shipped_config(models: dict[str, str], calls: list[str]) -> None:
    model = load(models["llama"])
    ids = torch.arange(3, 24).view(3, 7)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(enable(model, str(CONFIG))(input_ids=ids).logits, expected)
    assert calls.count("add_rms_norm") == 2 * model.config.num_hidden_layers
    assert report(model).steps.unsplit == {"fused kernels need no split": 1}
