"""The README's line for Transformers enables a model."""

from __future__ import annotations

import pytest
import torch
from readme import ROOT, line_with

import dynaflow_serving.integrations.transformers

pytestmark = pytest.mark.engine


def test_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaModel

    monkeypatch.chdir(ROOT)  # the config is given as the README has it
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaModel(LlamaConfig(vocab_size=64, **sizes)).eval()
    tokens = torch.arange(32).reshape(4, 8)
    with torch.no_grad():
        stock = model(tokens, use_cache=False).last_hidden_state
        exec(line_with("integrations.transformers.enable("), {"dynaflow_serving": dynaflow_serving, "model": model})
        ours = model(tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(ours, stock)
    assert dynaflow_serving.integrations.transformers.report(model).steps.split == 1
