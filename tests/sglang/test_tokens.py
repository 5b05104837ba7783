"""Tokens equal stock's; and what makes them so can be taken away."""

from types import SimpleNamespace

import pytest

from dynaflow_serving.errors import AnnotationError, InactiveError

MODELS = ["llama", "qwen3", "mixtral", "qwen3_moe"]
CONFIGS = {
    "two": {"strategy": "nanoflow", "options": {"min_tokens": 1}},
    "three": {"strategy": "nanoflow", "options": {"min_tokens": 1, "micro_batches": 3}},
    "inside-requests": {"strategy": "nanoflow", "options": {"min_tokens": 1, "micro_batches": 3, "cut": "token"}},
    "dual-batch": {"strategy": "dual_batch", "options": {"min_tokens": 1}},
    "poisoned": {"strategy": "nanoflow", "options": {"min_tokens": 1}, "executor": "sequential"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("runner", MODELS, indirect=True)
def test_tokens_equal_stock(one_process, runner, stock, prompts, config):
    with one_process.dynaflow(runner, config) as ours:
        tokens, _ = one_process.generate(runner, prompts, 12)
        assert ours.session.counts.split == 12 and not ours.session.counts.unsplit  # the prefill, and 11 of decode
    assert tokens.tolist() == stock


@pytest.mark.parametrize(("runner", "border"), [("llama", "attention"), ("mixtral", "experts")], indirect=["runner"])
def test_borders(one_process, runner, border):
    with one_process.dynaflow(runner, CONFIGS["two"]) as ours:
        names = ours.session.plan_caches[0].captured.program.by_name
    assert f"layers.1.{border}" in names


def test_strict_backend_sees_the_context_of_another_micro_batch(one_process, runner, prompts, monkeypatch):
    from dynaflow_serving.integrations.sglang.micro_batches import MicroBatches

    enter = MicroBatches.enter
    with one_process.dynaflow(runner, CONFIGS["two"]):
        monkeypatch.setattr(MicroBatches, "enter", lambda self, index: enter(self, 0))
        with pytest.raises(RuntimeError, match=r"attention of \d+ tokens under the plan of \d+"):
            one_process.generate(runner, prompts, 2)


def test_comparison_of_tokens_can_fail(one_process, runner, prompts, stock, monkeypatch):
    """Requests that swap their places in the request table."""
    from dynaflow_serving.integrations.sglang import micro_batches

    cut = micro_batches._cut

    def swapped(batch, part):
        made = cut(batch, part)
        made.req_pool_indices = made.req_pool_indices.flip(0)
        return made

    monkeypatch.setattr(micro_batches, "_cut", swapped)
    with one_process.dynaflow(runner, CONFIGS["two"] | {"check": "never"}):
        tokens, _ = one_process.generate(runner, prompts, 12)
    assert tokens.tolist() != stock


class Graphs:
    """Stands in for a runner of decode graphs: takes every decode step, and runs it eagerly."""

    def __init__(self, runner):
        self.runner, self.replays = runner, 0

    def can_run_graph(self, forward_batch):
        return True

    def execute(self, forward_batch, pp_proxy_tensors=None):
        self.replays += 1
        return self.runner.eager_runner.execute(forward_batch, pp_proxy_tensors=pp_proxy_tensors)


@pytest.mark.parametrize(("min_tokens", "replays"), [(1, 0), (100, 11)])
def test_split_steps_use_no_graph_and_others_do(one_process, runner, prompts, stock, monkeypatch, min_tokens, replays):
    graphs = Graphs(runner)
    monkeypatch.setattr(runner, "decode_cuda_graph_runner", graphs)
    config = {"strategy": "nanoflow", "options": {"min_tokens": min_tokens}}
    with one_process.dynaflow(runner, config) as ours:
        runner.shared_read_done_event = "published for the whole batch"
        tokens, _ = one_process.generate(runner, prompts, 12)
        assert ours.session.counts.split == 12 - replays and graphs.replays == replays
        assert runner.decode_cuda_graph_runner is graphs
        assert runner.shared_read_done_event is None
    assert tokens.tolist() == stock


def test_runs_outside_a_step_are_not_recorded(one_process, runner):
    """Nor may they be: SGLang captures CUDA graphs in such runs."""
    with one_process.dynaflow(runner, CONFIGS["two"]) as ours:
        ours.session.plan_caches.clear()
        ours.eager_forward.eager.captured = None
        eager = runner.eager_runner
        for size in (2, 3):
            eager._dummy_run(size, buffers=eager._alloc_dummy_decode_buffers(size))
        assert not ours.session.plan_caches


def test_model_that_takes_another_path_is_recorded_anew(one_process, runner, prompts, stock, monkeypatch):
    """A border that is not called any more: the step in flight runs without its plan, and its tokens are right."""
    attention = runner.model.model.layers[1].self_attn.attn
    with one_process.dynaflow(runner, CONFIGS["two"]) as ours:
        wrapped = attention.forward
        monkeypatch.setattr(attention, "forward", wrapped.__wrapped__)
        tokens, _ = one_process.generate(runner, prompts, 12)
        monkeypatch.setattr(attention, "forward", wrapped)
        assert ours.session.counts.split == 0
    assert tokens.tolist() == stock


def test_steps_that_only_some_requests_make_unsplittable():
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from dynaflow_serving.integrations.sglang.limits import PER_REQUEST, reason_to_run_whole

    plain = dict.fromkeys(PER_REQUEST)
    assert reason_to_run_whole(SimpleNamespace(forward_mode=ForwardMode.MIXED, **plain)) == ""
    embeds = SimpleNamespace(forward_mode=ForwardMode.EXTEND, **plain | {"input_embeds": object()})
    assert reason_to_run_whole(embeds) == "a request with input embeddings"
    verify = SimpleNamespace(forward_mode=ForwardMode.TARGET_VERIFY, **plain)
    assert reason_to_run_whole(verify) == "forward mode target_verify"


def test_annotation_that_matches_nothing(one_process, runner, tmp_path):
    file = tmp_path / "annotated.py"
    file.write_text(
        "from dynaflow_serving import SplitModule, register_strategy\n"
        "from dynaflow_serving.strategies.nanoflow import NanoFlow\n"
        "@register_strategy('annotated_sglang')\nclass Annotated(NanoFlow):\n"
        "    annotations = (SplitModule('LlamaMPL'),)\n"
    )
    with (
        pytest.raises(AnnotationError, match=r"unknown module class 'LlamaMPL'\. Did you mean 'LlamaMLP'"),
        one_process.dynaflow(runner, {"strategy": str(file)}),
    ):
        pass


def test_body_with_other_arguments_is_declined(runner, monkeypatch):
    from dynaflow_serving.integrations.sglang.micro_batches import check_layout

    check_layout(runner.model.model)
    monkeypatch.setattr(runner.model.model, "forward", lambda input_ids, forward_batch: None)
    with pytest.raises(InactiveError, match=r"LlamaModel.forward takes \(input_ids, forward_batch\)"):
        check_layout(runner.model.model)


def test_strategy_runs_a_module_of_the_model_as_an_operator(one_process, runner, prompts, stock, tmp_path):
    file = tmp_path / "mlp.py"
    file.write_text(
        "from dynaflow_serving import SplitModule, register_strategy\n"
        "from dynaflow_serving.strategies.nanoflow import NanoFlow, NanoFlowOptions\n"
        "class Options(NanoFlowOptions):\n    min_tokens: int = 1\n"
        "@register_strategy('mlp_sglang')\nclass Mlp(NanoFlow):\n    Options = Options\n"
        "    annotations = (SplitModule('LlamaMLP', 'mlp'),)\n"
    )
    with one_process.dynaflow(runner, {"strategy": str(file)}) as ours:
        tokens, _ = one_process.generate(runner, prompts, 12)
        assert "layers.1.mlp" in ours.session.plan_caches[0].captured.program.by_name
    assert tokens.tolist() == stock


@pytest.mark.parametrize("fallback", [False, True])
def test_model_that_cannot_be_split_is_refused_before_ready(runner, monkeypatch, fallback):
    from dynaflow_serving.config import load
    from dynaflow_serving.integrations.sglang import scheduler
    from dynaflow_serving.integrations.sglang.runner import DynaflowRunner

    def check(self, group):
        raise InactiveError("this model cannot be split: for a test")

    config = load(CONFIGS["two"] | {"fallback": fallback})
    monkeypatch.setattr(scheduler, "active_config", lambda arguments: config)
    monkeypatch.setattr(DynaflowRunner, "check", check)
    worker = SimpleNamespace(model_runner=runner)
    stand_in = SimpleNamespace(server_args=None, tp_cpu_group=None, tp_worker=worker)
    scheduler._loaded(None, runner)
    ours, info = runner.dynaflow, {}
    try:
        if fallback:
            scheduler._ready(info, stand_in)
            assert info == {"dynaflow": ""}
            assert not {"dynaflow", "_forward_raw", "init_attention_backends"} & vars(runner).keys()
            assert "forward" not in vars(ours.body)
        else:
            with pytest.raises(InactiveError, match="cannot be split"):
                scheduler._ready(info, stand_in)
            assert info == {}
    finally:
        ours.remove()
