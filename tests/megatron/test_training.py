"""Training on megatron-core over two real ranks: losses and gradients of split steps equal those of stock ones."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scenarios import EP, RECOMPUTE, SP, TP, compare, config, in_one_kernel
from training import Setup
from two_ranks import on_ranks, on_two_ranks

pytestmark = pytest.mark.engine

ITERATIONS, VARIANT_ITERATIONS = 20, 6  # of the plain setups, and of those that change one thing
# The greatest relative differences in float32: a micro-batch may take another matmul kernel than the whole batch.
LOSS, GRADIENT = 1e-6, 2e-6


def more(setup: Setup, **settings: Any) -> Setup:
    return replace(setup, config=settings)


FLUX = {"strategy": "flux", "options": {"chunks": 3}}
COMET = {"strategy": "comet", "options": {"chunks": 3}}
TENSOR = {
    "tp": (TP, config("nanoflow")),
    "tp, round_robin": (replace(TP, batch=5), config("round_robin")),
    "tp, biases, three sequences": (
        replace(TP, batch=3, config={"add_bias_linear": True}), config("comm_overlap")
    ),
    "tp, recomputed": (more(TP, **RECOMPUTE), config("nanoflow")),
    "tp, attention recomputed": (more(TP, recompute_granularity="selective"), config("nanoflow")),
    "tp, three micro-batches of two accumulated": (
        replace(TP, accumulate=2), {"strategy": "nanoflow", "options": {"min_tokens": 1, "micro_batches": 3}}
    ),
    "tp, own masks": (replace(TP, own_masks=True), config("nanoflow")),
    "sp": (SP, config("nanoflow")),
    "sp, comm_overlap": (SP, config("comm_overlap")),
    "sp, recomputed": (more(SP, **RECOMPUTE), config("comm_overlap")),
    "tp, flux": (TP, FLUX),
    "tp, flux, one sequence": (replace(TP, batch=1), FLUX),
    "sp, flux": (SP, FLUX),
    "sp, flux, recomputed": (more(SP, **RECOMPUTE), FLUX),
    "sp, round_robin": (SP, config("round_robin")),
    "sp, the first layer recomputed": (
        more(SP, **RECOMPUTE | {"recompute_method": "block"}), config("nanoflow")
    ),
}  # fmt: skip
EXPERTS = {
    "ep": (EP, config("dual_batch")),
    "ep, nanoflow": (EP, config("nanoflow")),
    "ep, all losses": (
        more(
            EP, moe_router_load_balancing_type=["aux_loss", "seq_aux_loss", "global_aux_loss"],
            moe_aux_loss_coeff=[0.05, 0.03, 0.02], moe_z_loss_coeff=0.01,
        ),
        config("dual_batch"),
    ),
    "tp, sp and ep": (
        replace(EP, tensor=2, sequence_parallel=True, config={"expert_tensor_parallel_size": 1}), config("round_robin")
    ),
    "tp, sp and ep, comet": (
        replace(EP, tensor=2, sequence_parallel=True, config={"expert_tensor_parallel_size": 1}), COMET
    ),
    "ep, comet": (EP, COMET),
    "ep, comet, one sequence": (replace(EP, batch=1), COMET),
    "ep, comet, recomputed": (more(EP, moe_aux_loss_coeff=0.0, **RECOMPUTE), COMET),
    "ep, recomputed": (more(EP, moe_aux_loss_coeff=0.0, **RECOMPUTE), config("dual_batch")),
    "ep, attention recomputed": (more(EP, recompute_granularity="selective"), config("dual_batch")),
    "ep, gradients reduced beside": (replace(EP, ddp={"overlap_grad_reduce": True}), config("dual_batch")),
    "ep, distributed optimizer": (
        replace(EP, ddp={"overlap_grad_reduce": True, "use_distributed_optimizer": True}), config("dual_batch")
    ),
}  # fmt: skip


def iterations(name: str) -> int:
    return ITERATIONS if name in ("tp", "sp", "ep") else VARIANT_ITERATIONS


@functools.cache
def trained(experts: bool) -> dict[str, dict[str, Any]]:
    """Train all models with experts, or all without, on ranks that are started once."""
    setups = EXPERTS if experts else TENSOR
    found: dict[str, dict[str, Any]] = on_two_ranks(compare, setups, {name: iterations(name) for name in setups})[0]
    return found


@pytest.mark.parametrize("name", [*TENSOR, *EXPERTS])
def test_losses_and_gradients_equal(name: str) -> None:
    setup, options = {**TENSOR, **EXPERTS}[name]
    found, steps = trained(name in EXPERTS)[name], iterations(name) * setup.accumulate
    if options in (FLUX, COMET):
        assert found["split"] == 0 and list(found["unsplit"].values()) == [steps]
        assert next(iter(found["unsplit"])).startswith(f"{options['strategy']} cuts")
    else:
        assert (found["split"], found["unsplit"]) == (steps, {})
    assert found["compared"] == 1
    assert found["loss"] <= LOSS and found["auxiliary"] <= LOSS, found
    assert found["gradient"] <= GRADIENT and found["same_set"], found
    assert found["programs"] == 2  # the forward pass and the backward pass


@pytest.mark.parametrize("settings", [{"add_bias_linear": True}, RECOMPUTE], ids=["biases", "recomputed"])
def test_flux_takes_products_that_are_one_kernel_with_their_collective(settings: dict[str, Any]) -> None:
    """Symmetric memory needs GPUs: torch's own fallbacks of its operators run on gloo here."""
    for found in on_two_ranks(in_one_kernel, more(SP, **settings), FLUX):
        assert found["loss"] <= LOSS and found["gradient"] <= GRADIENT and found["same_set"], found
        assert found["compared"] == 1
        # Two layers of two products each way: recorded twice, then run forward; the gradient of one is the other.
        backward = 0 if settings is RECOMPUTE else 2 * 4
        assert found["called"] == dict.fromkeys(found["called"], 2 * 4 + 2 * 4 + backward), found


@pytest.mark.parametrize(
    ("setup", "candidates"),
    [(TP, [{"strategy": "flux", "options": {"chunks": n}} for n in (2, 3)]), (EP, ["nanoflow"])],
    ids=["tp, flux", "ep"],
)
def test_auto_decides_in_the_first_step(setup: Setup, candidates: list[Any], tmp_path: Path) -> None:
    """Whatever it decides here, training goes on as it would have: trials change no gradient and no logged loss."""
    options = {
        "candidates": candidates, "micro_batches": [2], "pairs": 3, "budget_seconds": 20, "min_gain": 0.0,
        "table": str(tmp_path / "table.json"),
    }  # fmt: skip
    cases = {"auto": (setup, {"strategy": "auto", "options": options})}
    one, other = (found["auto"] for found in on_two_ranks(compare, cases, 3))
    for found in (one, other):
        assert found["loss"] <= LOSS and found["auxiliary"] <= LOSS and found["gradient"] <= GRADIENT, found
        assert found["split"] + sum(found["unsplit"].values()) == 3
    assert (one["split"], one["unsplit"]) == (other["split"], other["unsplit"])
    (decision,) = json.loads((tmp_path / "table.json").read_text())["decisions"]
    assert len(decision["trials"]) == len(candidates)


@pytest.mark.alone
def test_pipeline_stages() -> None:
    """1F1B of whole micro-batches over two stages, each of them cut by the decoder of a stage; four ranks."""
    setup = Setup(tensor=2, pipeline=2, accumulate=3)
    cases = {"tp": (setup, config("nanoflow")), "sp": (replace(setup, sequence_parallel=True), config("round_robin"))}
    for found in on_ranks(4, compare, cases, 3):
        for name in cases:
            assert (found[name]["split"], found[name]["unsplit"]) == (9, {})
            assert found[name]["loss"] <= LOSS and found[name]["gradient"] <= GRADIENT, found


def test_one_sequence_is_counted() -> None:
    found = on_two_ranks(compare, {"one": (replace(TP, batch=1), config("nanoflow"))}, 2)[0]["one"]
    assert (found["split"], found["unsplit"]) == (0, {"one sequence": 2})
    assert found["loss"] == found["gradient"] == 0.0
