"""`enable` in one process: what is declined, before the first forward; and a model without tensor parallelism."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from rounding import assert_same, distance

from dynaflow_serving.errors import ConfigError, InactiveError, ScheduleError
from dynaflow_serving.integrations.base import Integration
from dynaflow_serving.integrations.installed import ATTRIBUTE
from dynaflow_serving.integrations.transformers import enable, report
from dynaflow_serving.integrations.transformers.body import Body
from dynaflow_serving.session.report import StepReport

SPLIT = {"strategy": "nanoflow", "options": {"min_tokens": 1}}


@pytest.fixture
def model(models: dict[str, str]) -> Any:
    from transformers import AutoModelForCausalLM

    torch._dynamo.reset()
    return AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 2000, shape, generator=torch.Generator().manual_seed(0))


def test_one_process_and_a_yaml_file(model: Any, tmp_path: Any) -> None:
    file = tmp_path / "nanoflow.yaml"
    file.write_text("strategy: nanoflow\noptions: {min_tokens: 2, micro_batches: 2}\n")
    names = set(model.state_dict())
    with torch.no_grad():
        expected = [model(input_ids=ids(n, 9)).logits for n in (6, 3)]
        assert enable(model, str(file)) is model
        for n, logits in zip((6, 3), expected, strict=True):
            assert_same(model(input_ids=ids(n, 9)).logits, logits)
    assert report(model).steps == StepReport(split=1, unsplit={"a micro-batch would have under 2 tokens": 1})
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_equal_with_checkpointing(model: Any, reentrant: bool) -> None:
    """Layers are computed again in the backward graph, which is split like the forward graph."""
    model.train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids(6, 12), labels=ids(6, 12), use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    def saved() -> int:
        """Train, and return how many tensors the forward graph hands to the backward graph."""
        found = [gradients() for _ in range(2)][-1]
        assert max(distance(a, b) for a, b in zip(found, expected, strict=True)) <= 1e-5  # sums in another order
        session = Body.installed_in(model).session
        assert (session.counts.split, dict(session.counts.unsplit)) == (4, {})  # forward and backward, twice
        forward = session.plan_caches[0].captured.program
        return len(set(forward.outputs) - set(forward.inputs))

    expected = gradients()
    enable(model, SPLIT)
    plain = saved()
    for name in ("forward", ATTRIBUTE):
        model.base_model.__dict__.pop(name)
    torch._dynamo.reset()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    enable(model, SPLIT)
    assert saved() < plain / 2


HOPELESS = """
from dynaflow_serving import OpScheduler, SplitOptions, cut_at_requests, register_strategy
from dynaflow_serving.errors import ScheduleError

@register_strategy("hopeless")
class Hopeless(OpScheduler[SplitOptions]):
    def split(self, batch):
        return cut_at_requests(batch, 2, 1)

    def schedule(self, s):
        raise ScheduleError("hopeless: no operator tagged magic")
"""


@torch.no_grad()
def test_what_a_strategy_cannot_schedule_is_an_error_or_falls_back(model: Any, tmp_path: Any) -> None:
    (file := tmp_path / "hopeless.py").write_text(HOPELESS)

    def generate() -> torch.Tensor:
        return model.generate(ids(4, 9), max_new_tokens=3, do_sample=False)  # type: ignore[no-any-return]

    expected = generate()
    enable(model, {"strategy": str(file)})
    with pytest.raises(ScheduleError, match="tagged magic"):
        generate()
    for name in ("forward", ATTRIBUTE):
        model.base_model.__dict__.pop(name)
    torch._dynamo.reset()
    enable(model, {"strategy": str(file), "fallback": True})
    assert torch.equal(generate(), expected)  # its cache is written once
    assert report(model).steps.split == 0
    assert any(reason.startswith("fallback: hopeless") for reason in report(model).steps.unsplit)


def test_declined(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"unknown strategy 'nanoflw'. Did you mean 'nanoflow'"):
        enable(model, "nanoflw")
    with pytest.raises(InactiveError, match="strategy 'token_weave' needs 2 tensor-parallel ranks"):
        enable(model, "token_weave")
    with pytest.raises(InactiveError, match="takes a transformers PreTrainedModel, not Linear"):
        enable(torch.nn.Linear(2, 2), SPLIT)
    with pytest.raises(InactiveError, match="is not enabled: call"):
        report(model)
    monkeypatch.setattr(model.config, "is_encoder_decoder", True)
    with pytest.raises(InactiveError, match="encoder-decoder models are not supported yet"):
        enable(model, SPLIT)
    monkeypatch.undo()
    enable(model, SPLIT)
    with pytest.raises(InactiveError, match="enabled already"):
        enable(model, SPLIT)


def test_a_release_that_was_not_tested(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Integration, "installed_version", lambda self: "4.40.0")
    with pytest.raises(InactiveError, match=r"supports transformers 5\.19\.0; installed is 4\.40\.0"):
        enable(model, SPLIT)
    with caplog.at_level(logging.WARNING, "dynaflow_serving"):
        enable(model, {**SPLIT, "fallback": True})
    assert "not active (fallback: true)" in caplog.text
    assert "forward" not in model.base_model.__dict__
