"""Tensor parallelism of two over gloo: outputs, tokens and gradients equal stock transformers'."""

from __future__ import annotations

import signal

import pytest
import scenarios
from rounding import TOLERANCE
from two_ranks import on_two_ranks, where_one_dies


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_logits_equal_with_2_3_and_4_micro_batches(models: dict[str, str], kind: str) -> None:
    strategies = [("comm_overlap", {"micro_batches": n, "min_tokens": 1}) for n in (3, 4)]
    strategies += [(name, {"micro_batches": 2, "min_tokens": 1}) for name in ("nanoflow", "sequential")]
    strategies += [("token_weave", {"min_tokens": 1, "tile": 1})]
    for found in on_two_ranks(scenarios.forward, models[kind], strategies if kind == "llama" else strategies[:1]):
        for name, outcome in found.items():
            assert all(outcome["equal"]), name
            assert outcome["steps"]["split"] >= 2, name
            expected = ["compute"] if name.startswith("sequential") else ["network"]
            assert outcome["networks"] == expected, name


@pytest.mark.parametrize("cache", ["static", None])
def test_generated_tokens_equal(models: dict[str, str], cache: str | None) -> None:
    for found in on_two_ranks(scenarios.generate, models["llama"], cache):
        assert all(found["equal"])
        assert found["steps"]["split"] == 3 * 6
        assert found["steps"]["unsplit"] == {"one request": 6}
        assert found["graphs"] <= 5  # prompts of one length, of any length, and the decode


@pytest.mark.parametrize(("micro_batches", "checkpoints"), [(1, False), (2, True)])
def test_gradients_equal_and_backward_collectives_overlap(
    models: dict[str, str], micro_batches: int, checkpoints: bool
) -> None:
    """With gradient checkpointing, the collectives of the layers that run again are in the backward plan, too.

    Two micro-batches without it are in `test_bench.test_forward_and_backward`.
    """
    for found in on_two_ranks(scenarios.training, models["two_layers"], micro_batches, checkpoints):
        assert found["apart"] <= TOLERANCE  # sums over the tokens in another order
        assert found["gradients"] == 21
        assert found["steps"] == ([6, 0] if micro_batches == 2 else [0, 6])  # three passes forward, three backward
        assert found["backward_streams"] == ["network"]
        assert found["collectives"] == (13 if checkpoints else 10) * micro_batches
        assert found["overlapping"] >= found["collectives"] - 2 * micro_batches


def test_gradients_of_experts_equal(models: dict[str, str]) -> None:
    for found in on_two_ranks(scenarios.training_of_experts, models["qwen3_moe"]):
        assert found["apart"] <= TOLERANCE
        assert found["steps"][0] >= 6  # graphs end at the experts: those with tokens are split, forward and backward


def test_flux_runs_products_in_chunks_forward_and_backward(models: dict[str, str]) -> None:
    for found in on_two_ranks(scenarios.products_in_chunks, models["two_layers"]):
        assert all(found["equal"]) and found["apart"] <= TOLERANCE
        assert found["steps"] == [0, 6]
        # Two products with sharded rows per layer forward; five with sharded columns per layer backward.
        assert found["replaced"] == [4, 4, 10], found["replaced"]


def test_ranks_with_different_plans_are_found_before_the_first_collective(models: dict[str, str]) -> None:
    for found in on_two_ranks(scenarios.different_plans, models["llama"]):
        assert "the ranks would run different plans" in found["error"]
        assert "micro_batches=3" in found["error"]  # the difference is shown
        assert (found["graphs"], found["runs"]) == (1, 0)


def test_a_rank_killed_in_a_step_ends_in_an_error_on_the_other(models: dict[str, str]) -> None:
    exit_codes, found = where_one_dies(scenarios.killed, models["llama"])
    assert exit_codes == [0, -signal.SIGKILL]
    assert "onnection" in found["error"]
    assert found["seconds"] < 30


def test_a_model_that_mixes_sequences_is_refused_or_falls_back(models: dict[str, str]) -> None:
    for found in on_two_ranks(scenarios.refused, models["mixtral"]):
        assert "cannot be split: sort" in found["error"]
        assert all(found["equal"])
        assert found["steps"]["split"] == 0
        assert any(reason.startswith("fallback: ") for reason in found["steps"]["unsplit"])
