"""Wrong requests end before weights load, in one paragraph that names cause and remedy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dynaflow_serving.errors import AnnotationError, ConfigError, InactiveError

VLLM = Path(sys.executable).with_name("vllm")


def test_misspelt_strategy(start):
    with pytest.raises(ConfigError, match=r"unknown strategy 'nanoflw'. Did you mean 'nanoflow'\? Valid: .*dual"):
        start({"strategy": "nanoflw"})


def test_misspelt_option(start):
    with pytest.raises(ConfigError, match=r"unknown option 'micro_batch'. Did you mean 'micro_batches'\?"):
        start({"strategy": "nanoflow", "options": {"micro_batch": 2}})


def test_config_that_does_not_exist(start):
    with pytest.raises(ConfigError, match="does not exist"):
        start("nowhere/nanoflow.yaml")


def strategy_with(folder, rule):
    """A file that registers NanoFlow, splitting every step, with an annotation."""
    file = folder / "annotated.py"
    file.write_text(
        "from dynaflow_serving import SplitFunc, SplitModule, register_strategy\n"
        "from dynaflow_serving.strategies.nanoflow import NanoFlow, NanoFlowOptions\n"
        "class Options(NanoFlowOptions):\n    min_tokens: int = 1\n"
        "@register_strategy('annotated')\nclass Annotated(NanoFlow):\n"
        f"    Options = Options\n    annotations = ({rule},)\n"
    )
    return str(file)


@pytest.mark.parametrize(
    ("rule", "near"),
    [("SplitModule('LlamaMPL')", "LlamaMLP"), ("SplitFunc('vllm::all_reduc')", "vllm::all_reduce")],
)
def test_rule_that_names_nothing(start, tmp_path, rule, near):
    with pytest.raises(AnnotationError, match=f"matches nothing.*Nearest.* {near}[,.]"):
        start({"strategy": strategy_with(tmp_path, rule)})


def test_rule_that_matches_no_node_of_the_graph(generate, tmp_path):
    """`GELU` exists, but not in a Llama: found when the graph is captured, before serving."""
    with pytest.raises(Exception, match="SplitModule matches nothing"):
        generate("llama", dynaflow={"strategy": strategy_with(tmp_path, "SplitModule('GELU')")})


def test_annotation_of_a_module_makes_operators_of_it(generate, check_tokens, tmp_path):
    ours = generate("llama", dynaflow={"strategy": strategy_with(tmp_path, "SplitModule('LlamaMLP', 'mlp')")})
    assert "op layers.1.mlp compute" in ours.reports[0]["programs"][0]["program"]
    check_tokens(ours, "llama")


@pytest.mark.parametrize("rule", ["SplitModule('LlamaMLP')", "SplitFunc('linear')"])
def test_mode3_declines_annotations_that_it_cannot_cut_at(start, tmp_path, monkeypatch, rule):
    monkeypatch.setenv("TEST_MODE3", "1")
    with pytest.raises(InactiveError, match="mode 3 cuts its graph at operators"):
        start({"strategy": strategy_with(tmp_path, rule)})


def test_mode3_cuts_at_an_annotated_operator(generate, check_tokens, tmp_path):
    rule = "SplitFunc('_C::cpu_fused_moe', 'my_experts')"
    ours = generate("mixtral", "mode3", dynaflow={"strategy": strategy_with(tmp_path, rule)})
    assert "op layers.1.my_experts compute" in ours.reports[0]["programs"][0]["program"]
    check_tokens(ours, "mixtral", "mode3")
    assert ours.split > 0


def test_mode3_declines_strategies_of_un_split_steps(start, monkeypatch):
    monkeypatch.setenv("TEST_MODE3", "1")
    with pytest.raises(InactiveError, match="strategy 'branches' never splits"):
        start({"strategy": "branches"})


def test_whole_plan_graphs_are_declined(start):
    with pytest.raises(InactiveError, match="graph 'whole': attention reads metadata that vLLM makes anew"):
        start({"strategy": "nanoflow", "graph": "whole"})


def test_unsupported_release(start, monkeypatch):
    from dynaflow_serving.integrations.base import Integration

    monkeypatch.setattr(Integration, "installed_version", lambda self: "0.19.1+cpu")
    with pytest.raises(InactiveError, match=r"supports vllm 0\.32\.0; installed is 0\.19\.1"):
        start({"strategy": "nanoflow"})


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"compilation_config": {"mode": 1}}, "compilation mode STOCK_TORCH_COMPILE"),
        ({"compilation_config": {"mode": 2, "backend": "aot_eager"}}, "compilation backend 'aot_eager'"),
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline parallelism"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
    ],
)
def test_declined_by_name(start, options, cause):
    with pytest.raises(InactiveError, match=cause):
        start({"strategy": "nanoflow"}, **options)


def test_wrong_executor(start):
    with pytest.raises(InactiveError, match="executor 'cuda' does not fit device 'cpu'"):
        start({"strategy": "nanoflow", "executor": "cuda"})


def test_fallback_runs_stock_with_a_warning(start, monkeypatch):
    from dynaflow_serving.integrations.vllm import engine_args

    warnings = []
    monkeypatch.setattr(engine_args.logger, "warning", lambda text, *args: warnings.append(text % args))
    for name in engine_args.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    config = start({"strategy": "nanoflow", "fallback": True}, enable_prompt_embeds=True)
    assert "dynaflow" not in config.additional_config
    assert "dynaflow" not in config.parallel_config.worker_cls
    assert not engine_args.ENVIRONMENT.keys() & os.environ.keys()
    assert "DynaFlow is NOT active" in warnings[0] and "prompt embeddings" in warnings[0]


@pytest.mark.parametrize(
    ("strategy", "cause"),
    [("token_weave", "needs 2 tensor-parallel ranks"), ("prefill_decode", "attention on a stream of its own")],
)
def test_what_a_strategy_needs_is_asked_for_before_weights_load(start, strategy, cause):
    with pytest.raises(InactiveError, match=cause):
        start({"strategy": strategy})
    assert "dynaflow" not in start({"strategy": strategy, "fallback": True}).additional_config


@pytest.mark.parametrize(
    ("mode", "fault"),
    [
        ("mode2-compiled", "SplitModule matches nothing"),  # found when the graph is captured
        ("mode3", "no operator tagged magic"),  # found when the plans are made
        ("none", "no operator tagged magic"),
    ],
)
def test_fallback_holds_for_what_only_the_graph_can_tell(generate, check_tokens, tmp_path, mode, fault):
    file = tmp_path / "hopeless.py"
    rule = "(SplitModule('GELU'),)" if "matches" in fault else "()"
    file.write_text(
        "from dynaflow_serving import OpScheduler, SplitModule, SplitOptions, cut_at_requests, register_strategy\n"
        "from dynaflow_serving.errors import ScheduleError\n"
        f"@register_strategy('hopeless')\nclass Hopeless(OpScheduler[SplitOptions]):\n    annotations = {rule}\n"
        "    def split(self, batch):\n        return cut_at_requests(batch, 2, 1)\n"
        "    def schedule(self, s):\n        raise ScheduleError('hopeless: no operator tagged magic')\n"
    )
    ours = generate("llama", mode, dynaflow={"strategy": str(file), "fallback": True})
    check_tokens(ours, "llama", mode)
    (reason,) = ours.reports[0]["steps"]["unsplit"]
    assert ours.split == 0 and reason.startswith("fallback: ") and fault in reason


def test_path_name_and_mapping_are_the_same(start, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"strategy": "nanoflow"}))
    seen = [start(source).additional_config["dynaflow"] for source in (str(file), "nanoflow", {"strategy": "nanoflow"})]
    assert seen[0] == seen[1] == seen[2]


def test_command_line(model_path):
    command = [str(VLLM), "serve", model_path("llama"), "--dynaflow", "nanoflw", "--max-model-len", "512"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("dynaflow: error: ") and "Did you mean 'nanoflow'" in last
    assert "Traceback" not in done.stderr
