"""Greedy tokens of 12 mixed-length requests (prefill, decode, mixed, chunked prefill, prefix-cache hits) with
and without DynaFlow, in every mode, on one and two tensor-parallel ranks."""

import pytest

NANOFLOW = {"strategy": "nanoflow", "options": {"min_tokens": 1}}


# All modes with one kind, and two with the others. Two ranks take a minute: Mixtral's are in `test_eager.py`, and those
# of the un-compiled mode 2 in `test_policy.py` and `test_proof.py`.
CASES = [("llama", mode, 1) for mode in ("mode2-uncompiled", "mode2-compiled", "mode3")]
CASES += [("llama", "mode2-compiled", 2), ("qwen3", "mode3", 2)]
CASES += [("qwen3", "mode2-compiled", 1), ("mixtral", "mode2-compiled", 1), ("mixtral", "mode3", 1)]


@pytest.mark.parametrize(("kind", "mode", "tp"), CASES)
def test_tokens_equal_stock(generate, check_tokens, kind, mode, tp):
    ours = generate(kind, mode, tp, NANOFLOW)
    check_tokens(ours, kind, mode, tp)
    assert ours.split > 0
    assert len({r["plan_hash"] for r in ours.reports}) == 1 and len(ours.reports) == tp
    plan = ours.reports[0]["programs"][0]["plans"][-1]
    assert "compute | run layers.0.attention @1" in plan
    assert ("network | run layers.0.all_reduce.0 @0" in plan) == (tp > 1)


@pytest.mark.parametrize(
    "dynaflow",
    [
        {"strategy": "nanoflow", "options": {"min_tokens": 1, "micro_batches": 3}},
        {"strategy": "nanoflow", "options": {"min_tokens": 1, "micro_batches": 4, "cut": "token"}},
        {"strategy": "dual_batch", "options": {"min_tokens": 1}},
        {"strategy": "sequential", "options": {"micro_batches": 3}},
        {"strategy": "nanoflow", "options": {"min_tokens": 1}, "executor": "sequential"},
    ],
    ids=["n3", "token-cut-n4", "dual_batch", "sequential-n3", "poisoning-executor"],
)
def test_strategies_and_cuts(generate, check_tokens, dynaflow):
    ours = generate("llama", dynaflow=dynaflow)
    check_tokens(ours, "llama")
    assert ours.split > 0


def test_other_moe(generate, check_tokens):
    ours = generate("qwen3_moe", dynaflow=NANOFLOW)
    check_tokens(ours, "qwen3_moe")
    assert ours.split > 0


def test_steps_below_the_threshold_run_unsplit_and_are_counted(generate, check_tokens):
    ours = generate("llama", dynaflow={"strategy": "nanoflow", "options": {"min_tokens": 40}})
    check_tokens(ours, "llama")
    steps = ours.reports[0]["steps"]
    assert steps["split"] > 0
    assert steps["unsplit"]["a micro-batch would have under 40 tokens"] > 0
