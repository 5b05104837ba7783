"""Training without a graph (`capture: eager`), tensor parallelism of two over gloo: equal, split, overlapped."""

from __future__ import annotations

import scenarios
from rounding import TOLERANCE
from two_ranks import on_two_ranks

COLUMNS = 5 * 2  # column-parallel linears of a layer, and layers


def test_losses_and_gradients_equal_without_a_graph(models: dict[str, str]) -> None:
    for found in on_two_ranks(scenarios.training_without_a_graph, models["two_layers"]):
        for outcome in found:
            assert outcome["apart"] <= TOLERANCE  # sums over the tokens in another order
            assert outcome["split"] == 2
            assert outcome["unsplit"] == {"a call without gradients": 1, "one request": 1}
        reduced = [(outcome["reduced"], outcome["overlapped"]) for outcome in found]
        # The last one of two micro-batches has nothing beside it. A reentrant checkpoint is one node of autograd.
        assert reduced == [
            (3 * COLUMNS, 3 * COLUMNS),
            (2 * COLUMNS, 2 * COLUMNS - 1),
            (3 * COLUMNS, 3 * COLUMNS),
            (0, 0),
        ]


def test_arguments_and_paths_may_change(models: dict[str, str]) -> None:
    for found in on_two_ranks(scenarios.training_that_changes, models["llama"]):
        assert max(outcome["apart"] for outcome in found.values()) <= TOLERANCE
        assert [outcome["split"] for outcome in found.values()] == [1, 2, 3, 3, 4]
        (reason,) = found["another path"]["unsplit"]
        assert reason == "the model called all_reduce where it called copy when it was recorded"


def test_declined_without_a_graph(models: dict[str, str]) -> None:
    for found in on_two_ranks(scenarios.refused_without_a_graph, models["llama"], models["qwen3"]):
        assert "parallel style replicated_with_grad_allreduce communicates in a way of its own" in found["style"]
        assert "attention_dropout 0.1: micro-batches would draw other numbers" in found["dropout"]
        assert "strategy 'auto' times captured graphs" in found["auto"]
        assert "strategy 'flux' does not split the batch" in found["flux"]
        assert "pass use_cache=False" in found["cache"]
        assert "output_hidden_states" in found["hidden states"]
        assert "is_causal as an argument changes the config" in found["causal"]
        assert found["steps"] == "{'split': 0, 'unsplit': {}}"
        assert "fallback" in found["fallback"] and "use_cache=False" in found["fallback"]
