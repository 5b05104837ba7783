"""`strategy: auto` with transformers: two real ranks decide alike, keep the outputs, and find their decision again."""

from __future__ import annotations

from pathlib import Path

import pytest
import scenarios
import torch
from two_ranks import on_two_ranks

from dynaflow_serving.errors import ConfigError, InactiveError
from dynaflow_serving.integrations.transformers import enable, tune


def test_an_overlap_that_wins_is_adopted_by_both_ranks(models: dict[str, str], tmp_path: Path) -> None:
    first, second = on_two_ranks(scenarios.auto, models["llama"], str(tmp_path))
    assert first["decided"] == second["decided"] and first["steps"] == second["steps"]
    ((candidate, reason),) = first["decided"]
    assert candidate.startswith(("comm_overlap", "nanoflow")), reason
    for found in (first, second):
        assert all(found["equal"]) and found["other"]
        assert found["steps"]["split"] > 0  # besides the un-split ones that it is compared with
        assert "auto: this kind of batch was not tuned" in found["reasons"]
        assert found["again"]
        assert "different policy tables" in found["error"]


def test_wrong_uses_are_named(models: dict[str, str]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
    with pytest.raises(InactiveError, match="this model is not enabled"):
        tune(model, [{"input_ids": torch.zeros(2, 4, dtype=torch.int64)}])
    enable(model, "comm_overlap")
    with pytest.raises(ConfigError, match="only strategy 'auto' is tuned"):
        tune(model, [{"input_ids": torch.zeros(2, 4, dtype=torch.int64)}])
    scenarios.disable(model)
    enable(model, "auto")
    for wrong in ({"input_ids": torch.zeros(1, 4, dtype=torch.int64)}, {"x": 1}):
        with pytest.raises(ConfigError, match="at least two sequences"):
            tune(model, [wrong])
    with pytest.raises(ConfigError, match="nothing to tune with"):
        tune(model, [])


def test_candidates_that_never_split_are_tuned_too(models: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32).eval()
    ids = torch.arange(3, 27).view(4, 6)
    candidates = [{"strategy": "flux", "options": {"chunks": n}} for n in (2, 3)]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        options = {"candidates": candidates, "table": str(tmp_path / "table.json")}
        enable(model, {"strategy": "auto", "options": options})
        (decision,) = tune(model, [{"input_ids": ids}]).decisions
        assert len(decision.trials) == 2 and decision.trials[0].ratios, decision
        assert torch.equal(model(input_ids=ids).logits, expected)
