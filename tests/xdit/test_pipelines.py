"""Pipelines of xDiT under DynaFlow make the latents that they make without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import images
import pytest
from scenarios import CALL_RAISES, LATENTS_CHANGE, compared, dies
from two_ranks import on_two_ranks, where_one_dies

from dynaflow_serving.integrations.diffusion.guidance import NO_PAIR, WASTED

pytestmark = pytest.mark.engine

# A micro-batch has the rows of one stock call, so it takes the same kernels. What is lowered to ATen may still round
# otherwise on some processors, and a batch of two prompts is cut into rows that stock computes together.
TOLERANCE = 1e-5
STEPS = {"num_inference_steps": 4}


def check(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Both ranks have the stock latents, and have split alike."""
    first, second = results
    assert (first["split"], first["unsplit"]) == (second["split"], second["unsplit"])
    for result in results:
        assert all(value < TOLERANCE for value in result["apart"].values()), result["apart"]
    return first


def test_ulysses_and_pipelines_that_disturb_a_pair(wan: Path) -> None:
    generations = {
        "2 steps": {"num_inference_steps": 2},
        "20 steps": {"num_inference_steps": 20},
        "without guidance": {**STEPS, "guidance_scale": 1.0},
        "another size": {**STEPS, "height": 48},
        "two prompts": {**STEPS, "prompt": ["a cat", "the dog runs"], "negative_prompt": ["bad", "bad quality"]},
    }
    disturbances = (LATENTS_CHANGE, CALL_RAISES)
    config = {"strategy": "comm_overlap"}
    arguments = (str(wan), {"ulysses_degree": 2}, config, generations, disturbances)
    found = check(on_two_ranks(compared, *arguments))
    # The first step of each generation shows the pair. Rows of two prompts are split there, too.
    assert found["split"] == [1 + 19 + 0 + 3 + (2 + 3)]
    assert found["unsplit"] == [{NO_PAIR: 2 + 2 + 4 + 2}]
    assert max(found["network"]) >= 5  # four all-to-alls of the layer, and the gathering at the end
    # The result that the call which raised was to have is dropped in the next generation.
    assert [found[kind].get(WASTED) for kind in disturbances] == [1, 2]


def test_ring(wan: Path) -> None:
    config = {"strategy": "comm_overlap"}
    found = check(on_two_ranks(compared, str(wan), {"ring_degree": 2}, config, {"4 steps": STEPS}))
    assert found["split"] == [3]


def test_both_transformers_of_wan_2_under_the_policy(wan_2: Path) -> None:
    options = {"candidates": ["comm_overlap"], "micro_batches": [2], "retune": True, "pairs": 3}
    config = {"strategy": "auto", "options": options}
    steps = {"num_inference_steps": 8}
    found = check(on_two_ranks(compared, str(wan_2), {"ulysses_degree": 2}, config, {"8 steps": steps}))
    assert len(found["split"]) == 2


def test_flux_orders_a_single_image_and_splits_two() -> None:
    """One image: its MLP runs beside the exchange for attention. Two images are rows."""
    one = {"strategy": "comm_overlap", "options": {"micro_batches": 1}}
    found = check(on_two_ranks(images.compared, "flux", one, (1,)))
    assert (found["split"], found["unsplit"]) == (0, {"comm_overlap with one micro-batch": 3})
    assert found["network"] == [2 + 2 + 1]  # an exchange before and one after each attention; the last gathers
    found = check(on_two_ranks(images.compared, "flux", {"strategy": "comm_overlap"}, (2,)))
    assert (found["split"], found["unsplit"]) == (3, {})


@pytest.mark.long  # what is new here about pairs is in tests/core/test_guidance.py
def test_qwen_image_pairs_calls_that_make_their_own_timesteps() -> None:
    found = check(on_two_ranks(images.compared, "qwen_image", {"strategy": "comm_overlap"}, (1,)))
    assert (found["split"], found["unsplit"]) == (2, {NO_PAIR: 2})


def test_a_rank_that_dies_ends_the_others_generation(wan: Path) -> None:
    codes, error = where_one_dies(dies, str(wan))
    assert codes[1] == 9 and "nothing" not in error, (codes, error)
