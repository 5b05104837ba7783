"""Model Runner V2, CUDA's default, with Triton's kernels interpreted on the CPU.

vLLM selects the runner, as for a user: V2, because Triton is there. `test_hazards.py` is run this way too.
"""

import random
from importlib.util import find_spec

import pytest

from dynaflow_serving.errors import InactiveError

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Model Runner V2 needs Triton: nox -s vllm_v2")

NANOFLOW = {"strategy": "nanoflow", "options": {"min_tokens": 1}}


# Mode 3 on one rank: in the test of the warm-up.
@pytest.mark.parametrize(
    ("mode", "tp"), [("mode2-uncompiled", 1), ("mode2-compiled", 1), ("mode3", 2), ("none", 1), ("none", 2)]
)
def test_tokens_equal_stock(generate, check_tokens, mode, tp):
    ours = generate("llama", mode, tp, NANOFLOW)
    check_tokens(ours, "llama", mode, tp)
    assert ours.split > 0
    assert all("Model Runner V2" in r["mode"] for r in ours.reports)
    assert len({r["plan_hash"] for r in ours.reports}) == 1 and len(ours.reports) == tp


@pytest.mark.parametrize(
    "dynaflow",
    [
        {"strategy": "nanoflow", "options": {"min_tokens": 1, "micro_batches": 4, "cut": "token"}},
        {"strategy": "sequential", "options": {"micro_batches": 3}, "executor": "sequential"},
        {"strategy": "nanoflow", "options": {"min_tokens": 40}},
    ],
    ids=["token-cut-n4", "poisoning-executor", "some-steps-whole"],
)
def test_strategies_and_cuts(generate, check_tokens, dynaflow):
    ours = generate("llama", "mode3", dynaflow=dynaflow)
    check_tokens(ours, "llama", "mode3")
    assert ours.split > 0
    assert bool(ours.reports[0]["steps"]["unsplit"]) == (dynaflow["options"].get("min_tokens") == 40)


def test_mixture_of_experts(generate, check_tokens):
    ours = generate("mixtral", "mode3", dynaflow=NANOFLOW)
    check_tokens(ours, "mixtral", "mode3")
    assert ours.split > 0


@pytest.mark.parametrize(("asked", "v2"), [(None, True), ("1", True), ("0", False)])
def test_the_runner_is_the_one_that_vllm_selects(start, monkeypatch, asked, v2):
    """V1 does not run where Triton is interpreted: vLLM's own top-k kernel for it fails there."""
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    if asked:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", asked)
    config = start(NANOFLOW)
    assert config.use_v2_model_runner is v2
    assert "dynaflow" in config.parallel_config.worker_cls


def prompts_of_a_prefix():
    rng = random.Random(0)
    shared = [rng.randrange(10, 2000) for _ in range(300)]
    return [shared + [rng.randrange(10, 2000) for _ in range(20)] for _ in range(3)]


# Step 1: request 0 runs 140 tokens, request 1 hits its first block of 128 and runs 120. Step 2: request 0 runs 140
# and fills its second block; request 2 joins on a hit of both.
RUNNING_WRITER = dict(
    prompts=prompts_of_a_prefix(), max_tokens=8, max_num_batched_tokens=260, long_prefill_token_threshold=140
)


def test_reader_follows_a_writer_that_was_running_before(generate, check_tokens, monkeypatch):
    """The block was allocated in an earlier step than the one that fills it."""
    from dynaflow_serving.integrations.vllm import runner

    unchecked, seen = {**NANOFLOW, "check": "never"}, []
    stock = runner.dependences
    monkeypatch.setattr(runner, "dependences", lambda *args: seen.append(stock(*args)) or seen[-1])
    ours = generate("llama", "mode3", dynaflow=unchecked, **RUNNING_WRITER)
    # V2 sorts a step's requests by their tokens: in step 2 the reader comes first, the writer last.
    assert seen[:2] == [((1, 0),), ((2, 0),)]
    check_tokens(ours, "llama", "mode3", **RUNNING_WRITER)
    monkeypatch.setattr(runner, "dependences", lambda *_: ())
    assert generate("llama", "mode3", dynaflow=unchecked, **RUNNING_WRITER).tokens != ours.tokens


def test_warm_up_through_execute_model_runs_whole_and_is_not_counted(generate, check_tokens, monkeypatch):
    """As on CUDA, where vLLM warms its kernels up with requests of its own before the ranks compare plans."""
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

    cold = generate("llama", "mode3", dynaflow=NANOFLOW)
    check_tokens(cold, "llama", "mode3")
    assert cold.split > 0 and "Model Runner V2" in cold.reports[0]["mode"]
    stock, warmed_up = CPUWorker.compile_or_warm_up_model, []

    def compile_or_warm_up_model(self):
        result = stock(self)
        warmed_up.append(run_mixed_prefill_decode_warmup(self.model_runner, self.execute_model, self.sample_tokens, 16))
        return result

    monkeypatch.setattr(CPUWorker, "compile_or_warm_up_model", compile_or_warm_up_model)
    warm = generate("llama", "mode3", dynaflow=NANOFLOW)
    assert warmed_up == [True]
    assert warm.tokens == cold.tokens
    assert warm.reports[0]["steps"] == cold.reports[0]["steps"]


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"offload_group_size": 1}, "weight offloading with prefetch"),
        ({"enable_return_routed_experts": True}, "returning routed experts"),
    ],
)
def test_declined_by_name(start, model_path, options, cause):
    with pytest.raises(InactiveError, match=f"{cause} is not supported yet"):
        start(NANOFLOW, model=model_path("mixtral"), **options)


def test_declines_a_model_with_its_own_state(start, monkeypatch):
    from vllm.model_executor.models.llama import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "get_model_state_cls", None, raising=False)
    with pytest.raises(InactiveError, match="a model with its own state in Model Runner V2"):
        start(NANOFLOW)
