"""What is declined by name, what a mutation of the integration does, and how a run ends that fails."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import pytest
from scenarios import (
    EP,
    RECOMPUTE,
    SP,
    TP,
    becomes_nan,
    config,
    dies_in_the_backward_pass,
    fails_in_the_second_micro_batch,
    fall_back,
    mutated,
    refused,
    with_other_orders,
)
from test_training import GRADIENT, LOSS
from torch.multiprocessing import ProcessExitedException
from training import Setup
from two_ranks import on_two_ranks, where_one_dies

pytestmark = pytest.mark.engine

NANOFLOW = config("nanoflow")
# What is declined -> (setup, settings changed once the model is built, config, words of the error)
DECLINED: dict[str, tuple[Setup, dict[str, Any], dict[str, Any], str]] = {
    "dropout": (TP, {"hidden_dropout": 0.1}, NANOFLOW, "dropout .*set both to 0"),
    "FP8": (TP, {"fp8": "hybrid"}, NANOFLOW, "FP8 or FP4 is not supported yet"),
    "context parallelism": (TP, {"context_parallel_size": 2}, NANOFLOW, "context parallelism is not"),
    "CUDA graphs": (TP, {"cuda_graph_impl": "local"}, NANOFLOW, "a CUDA graph"),
    "Megatron's own TP overlap": (TP, {"tp_comm_overlap": True}, NANOFLOW, "drop --tp-comm-overlap"),
    "a graph": (TP, {}, config("nanoflow", capture="graph"), "set capture: auto"),
    "another device's executor": (TP, {}, config("nanoflow", executor="cuda"), "executor 'cuda' does not fit"),
    "comet without experts": (TP, {}, {"strategy": "comet"}, "comet cuts operators tagged experts: they send"),
    "flux beside what splits": (
        TP,
        {},
        {"strategy": "auto", "options": {"candidates": ["nanoflow", "flux"]}},
        "give each kind a config of its own",
    ),
    "auto, where a pass has effects": (
        TP,
        {"gradient_accumulation_fusion": True},
        {"strategy": "auto"},
        "gradient_accumulation_fusion changes with",
    ),
}
DECLINED_EXPERTS: dict[str, tuple[Setup, dict[str, Any], dict[str, Any], str]] = {
    "flux without tensor parallelism": (
        EP,
        {},
        {"strategy": "flux"},
        "flux cuts operators tagged column",
    ),
    "capacity": (EP, {"moe_expert_capacity_factor": 1.0}, NANOFLOW, "depends on the whole batch"),
    "another dispatcher": (EP, {"moe_token_dispatcher_type": "allgather"}, NANOFLOW, "use alltoall"),
    "sinkhorn": (EP, {"moe_router_load_balancing_type": "sinkhorn"}, NANOFLOW, "sinkhorn"),
    "jitter": (EP, {"moe_input_jitter_eps": 0.1}, NANOFLOW, "moe_input_jitter_eps is not supported"),
    "Megatron's own EP overlap": (EP, {"overlap_moe_expert_parallel_comm": True}, NANOFLOW, "drop the option"),
    "a recomputed loss": (EP, RECOMPUTE, NANOFLOW, "an auxiliary loss of a router that is recomputed"),
}


@pytest.mark.parametrize("cases", [DECLINED, DECLINED_EXPERTS], ids=["layers", "experts"])
def test_what_is_declined(cases: dict[str, Any]) -> None:
    said = on_two_ranks(refused, {name: case[:3] for name, case in cases.items()})[0]
    for name, (_, _, _, words) in cases.items():
        assert re.search(words, said[name]), (name, said[name])
        assert "fallback: true" in said[name]


def test_nothing_to_overlap_is_declined() -> None:
    assert "the layers communicate nothing" in on_two_ranks(refused, {"": (Setup(), {}, NANOFLOW)})[0][""]


def test_fallback_trains_the_stock_model() -> None:
    assert len(on_two_ranks(fall_back, TP)[0]) == 1


def _is_right(found: dict[str, Any]) -> bool:
    """Whether both steps were split and right: the check of the first one refuses what is wrong forward."""
    right = "error" not in found and found["loss"] <= LOSS and found["gradient"] <= GRADIENT and found["same_set"]
    return right and found["split"] == 2


@pytest.mark.parametrize(
    ("mutation", "setup"),
    [
        ("the dispatcher is shared", EP),
        ("each micro-batch has its own load-balancing loss", EP),
        ("grad mode leaks", replace(SP, config=RECOMPUTE)),
    ],
)
def test_a_mutation_shows(mutation: str, setup: Setup) -> None:
    """Each of these was silently wrong, or an error, before there was code against it."""
    assert _is_right(on_two_ranks(mutated, "", setup, NANOFLOW)[0])
    try:
        found = on_two_ranks(mutated, mutation, setup, NANOFLOW)[0]
    except ProcessExitedException:
        return  # the ranks sent each other other sizes, and waited
    assert not _is_right(found)


def test_ranks_that_would_run_other_orders_do_not_begin() -> None:
    said = on_two_ranks(with_other_orders, TP)
    assert all(text.startswith("the ranks would run different plans:") for text in said)
    assert "comm_overlap" in said[0] and "nanoflow" in said[0]


def test_a_rank_that_dies_ends_the_run() -> None:
    begun = time.monotonic()
    codes, said = where_one_dies(dies_in_the_backward_pass, TP)
    assert codes[1] == 7
    assert re.search(r"[Cc]onnection (closed|reset)|[Bb]roken pipe", said), said
    assert time.monotonic() - begun < 60  # with the start of two processes


def test_a_micro_batch_that_runs_out_of_memory_ends_the_step_only() -> None:
    said, losses = on_two_ranks(fails_in_the_second_micro_batch, TP)[0]
    assert said == "CUDA out of memory"
    assert len(losses) == 1


def test_a_loss_that_is_not_a_number_ends_the_run_as_stock_does() -> None:
    for stock, split in on_two_ranks(becomes_nan, replace(TP, ddp={"check_for_nan_in_grad": True})):
        assert "NaN" in stock or "nan" in stock, stock
        assert split == stock
