"""Models that vLLM runs without a graph: each micro-batch is a suspended run of the model's own forward."""

import random

import pytest

from dynaflow_serving.errors import AnnotationError, InactiveError

NANOFLOW = {"strategy": "nanoflow", "options": {"min_tokens": 1}}


@pytest.mark.parametrize(("kind", "tp"), [("llama", 1), ("qwen3", 1), ("mixtral", 2)])
def test_tokens_equal_stock(generate, check_tokens, kind, tp):
    ours = generate(kind, "none", tp, NANOFLOW)
    check_tokens(ours, kind, "none", tp)
    assert ours.split > 0
    assert "eager (no graph), Model Runner" in ours.reports[0]["mode"]
    assert len({r["plan_hash"] for r in ours.reports}) == 1 and len(ours.reports) == tp
    plan = ours.reports[0]["programs"][0]["plans"][-1]
    assert "compute | run layers.0.attention @1" in plan
    assert ("network | run layers.0.all_reduce" in plan) == (tp > 1)


@pytest.mark.parametrize(
    "dynaflow",
    [
        {"strategy": "nanoflow", "options": {"min_tokens": 1, "micro_batches": 4, "cut": "token"}, "capture": "eager"},
        {"strategy": "sequential", "options": {"micro_batches": 3}, "executor": "sequential"},
    ],
    ids=["token-cut-n4", "poisoning-executor"],
)
def test_strategies_and_cuts(generate, check_tokens, dynaflow):
    ours = generate("llama", "none", dynaflow=dynaflow)
    check_tokens(ours, "llama", "none")
    assert ours.split > 0


def test_micro_batches_that_share_a_prefix_are_in_order(generate, check_tokens):
    rng = random.Random(0)
    shared = [rng.randrange(10, 2000) for _ in range(300)]
    prompts = [shared + [rng.randrange(10, 2000) for _ in range(20)] for _ in range(2)]
    options = dict(prompts=prompts, max_tokens=8, max_model_len=1024, max_num_batched_tokens=4096)
    ours = generate("llama", "none", dynaflow=NANOFLOW, **options)
    check_tokens(ours, "llama", "none", **options)
    assert any("depends=0>1" in p or "depends=1>0" in p for p in ours.reports[0]["programs"][0]["plans"])


def test_a_model_that_vllm_cannot_compile_needs_no_option(generate, check_tokens, monkeypatch):
    """As for a model without vLLM's torch.compile support: a mode with a graph, and no graph."""
    from vllm.model_executor.models.llama import LlamaModel

    init = LlamaModel.__init__

    def without_compile(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.do_not_compile = True

    monkeypatch.setattr(LlamaModel, "__init__", without_compile)
    ours = generate("llama", "mode2-uncompiled", dynaflow=NANOFLOW)
    monkeypatch.undo()
    assert ours.split > 0 and "eager (no graph), Model Runner" in ours.reports[0]["mode"]
    check_tokens(ours, "llama", "none")


def test_annotations_of_a_strategy(generate, check_tokens, tmp_path):
    file = tmp_path / "strategy.py"
    file.write_text(
        "from dynaflow_serving import SplitModule, register_strategy\n"
        "from dynaflow_serving.strategies.nanoflow import NanoFlow\n"
        "@register_strategy('with_mlp')\n"
        "class WithMLP(NanoFlow):\n"
        "    annotations = (SplitModule('LlamaMLP', 'mlp'),)\n"
    )
    ours = generate("llama", "none", dynaflow={"strategy": str(file), "options": {"min_tokens": 1}})
    check_tokens(ours, "llama", "none")
    assert "op layers.0.mlp " in ours.reports[0]["programs"][0]["program"]
    with pytest.raises(AnnotationError, match="unknown module class 'LlamaMLP'"):
        generate("qwen3", "none", dynaflow={"strategy": str(file), "options": {"min_tokens": 1}})


@pytest.mark.parametrize(
    ("capture", "options", "cause"),
    [
        ("graph", {"enforce_eager": True}, "capture: graph needs a compilation mode with a graph"),
        ("eager", {}, "capture: eager runs the model without a graph .add --enforce-eager"),
    ],
)
def test_capture_that_does_not_fit(start, capture, options, cause):
    with pytest.raises(InactiveError, match=cause):
        start({**NANOFLOW, "capture": capture}, **options)
