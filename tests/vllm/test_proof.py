"""The check and metrics in real vLLM: wrong strategies are caught, and the counters are on vLLM's own endpoint."""

import json
import time
from importlib.util import find_spec

import pytest
import torch

V2 = find_spec("triton") is not None
NANOFLOW = {"strategy": "nanoflow", "options": {"min_tokens": 1}}
WRONG = """
import torch
from dynaflow_serving import SplitModule, register_strategy
from dynaflow_serving.strategies.nanoflow import NanoFlow

def silu_mul_and_a_bit(x, *sizes):
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up * 1.01

@register_strategy("wrong_kernel")
class WrongKernel(NanoFlow):
    annotations = (SplitModule("SiluAndMul", "activation"),)

    def schedule(self, s):
        while tasks := s.get_ready_ops():
            for task in tasks:
                s.execute(task, replace=silu_mul_and_a_bit if "activation" in task.name else None)
"""
STOPPED = "check: the output differs from the un-split run"


@pytest.fixture
def counted():
    """`counted(name, **labels)`: how much a counter of this process has grown in the test."""
    from prometheus_client import REGISTRY

    def value(name, labels):
        return REGISTRY.get_sample_value(f"dynaflow_{name}_total", labels) or 0.0

    before = {n: value("checked_steps", {"result": n}) for n in ("equal", "different")}
    return lambda result: value("checked_steps", {"result": result}) - before[result]


@pytest.mark.parametrize("mode", ["none"] if V2 else ["mode2-uncompiled", "none"])
def test_a_wrong_kernel_is_stopped_before_the_engine_serves(generate, check_tokens, tmp_path, counted, mode):
    file, folder = tmp_path / "wrong.py", tmp_path / "mismatches"
    file.write_text(WRONG)
    dynaflow = {"strategy": str(file), "options": {"min_tokens": 1}, "check": {"folder": str(folder)}}
    ours = generate("llama", mode, dynaflow=dynaflow)
    check_tokens(ours, "llama", mode)
    assert ours.split == 0 and ours.reports[0]["steps"]["unsplit"].keys() == {STOPPED}
    assert ours.reports[0]["check"]["steps"] == 1 and STOPPED in ours.reports[0]["check"]["refused"][0]
    assert counted("different") == 1 and counted("equal") == 0
    (written,) = folder.iterdir()
    content = torch.load(written, weights_only=True)
    assert content["strategy"] == "wrong_kernel" and "silu_mul_and_a_bit" in content["plans"][0]
    split, whole = content["split"][0], content["whole"][0]
    assert split.shape == whole.shape == (sum(content["tokens"]), split.shape[1])
    assert content["inputs"][0].shape == (sum(content["tokens"]),)


@pytest.mark.parametrize("mode", ["mode3"] if V2 else ["mode3", "none"])
def test_a_right_strategy_goes_on(generate, check_tokens, tmp_path, counted, mode):
    """Compared steps, the one of warm-up among them, leave the KV cache and the next steps as they would be."""
    folder = tmp_path / "mismatches"
    dynaflow = {**NANOFLOW, "check": {"every": 2, "folder": str(folder)}}
    ours = generate("llama", mode, dynaflow=dynaflow)
    check_tokens(ours, "llama", mode)
    assert ours.split > 2 and STOPPED not in ours.reports[0]["steps"]["unsplit"]
    check = ours.reports[0]["check"]
    assert counted("equal") == check["steps"] >= 1 + -(-ours.split // 2) and counted("different") == 0
    assert check["seconds"] > 0 and not check["refused"]
    assert not folder.exists()


@pytest.mark.alone
@pytest.mark.skipif(V2, reason="Model Runner V2 is tested on one rank here")
def test_ranks_compare_together_and_the_first_counts(generate, check_tokens, tmp_path):
    from dynaflow_serving.integrations.vllm import metrics

    dynaflow = {**NANOFLOW, "check": {"every": 3, "folder": str(tmp_path / "mismatches")}}
    dynaflow["trace"] = {"folder": str(tmp_path / "traces"), "every": 4, "limit": 1}
    ours = generate("llama", tp=2, dynaflow=dynaflow)
    check_tokens(ours, "llama", tp=2)
    assert {p.name for p in (tmp_path / "traces").iterdir()} == {f"step000001-rank{r}.json" for r in (0, 1)}
    found = by_labels(s for family in metrics._serving.collect() for s in family.samples)
    assert found["dynaflow_steps_total", "", "nanoflow"] == ours.split
    checks = [report["check"]["steps"] for report in ours.reports]
    assert checks[0] == checks[1] == found["dynaflow_checked_steps_total", "equal"] >= 1 + -(-ours.split // 3)


def by_labels(samples):
    """(name, label values by the labels' names) -> value of the DynaFlow metrics."""
    ours = [s for s in samples if s.name.startswith("dynaflow_")]
    return {(s.name, *(s.labels[label] for label in sorted(s.labels))): s.value for s in ours}


def served(running):
    """The DynaFlow metrics of a server."""
    from prometheus_client.parser import text_string_to_metric_families

    text = running.metrics()
    assert "vllm:num_requests_running" in text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    assert len(by_labels(samples)) == sum(s.name.startswith("dynaflow_") for s in samples)  # nothing twice
    return by_labels(samples)


@pytest.mark.skipif(V2, reason="the endpoint does not depend on the model runner")
def test_a_server_answers_as_offline_stock_and_counts(server, stock_tokens, prompts, tmp_path):
    """`vllm serve MODEL --dynaflow CONFIG` with an OpenAI client, as a user runs it; that a stock server has none of
    these metrics is in `two_servers`."""
    from openai import OpenAI

    file = tmp_path / "nanoflow.yaml"
    file.write_text("{strategy: nanoflow, options: {min_tokens: 1}}")
    running = server("--dynaflow", str(file))
    assert served(running)["dynaflow_steps_total", "", "nanoflow"] == 0  # its series are there from the first scrape
    client = OpenAI(base_url=f"{running.url}/v1", api_key="none")
    asked = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
    answer = client.completions.create(model="tiny", prompt=prompts, **asked)
    assert [json.loads(choice.model_dump_json())["token_ids"] for choice in answer.choices] == stock_tokens("llama")
    client.completions.create(model="tiny", prompt=prompts[1], **asked)
    text = running.log.read_text()
    assert "DynaFlow is on: strategy nanoflow" in text
    assert "DynaFlow: first split step, 2 micro-batches" in text
    time.sleep(1.5)  # the last step is written within a second
    found = served(running)
    assert found["dynaflow_steps_total", "", "nanoflow"] > 5
    assert found["dynaflow_steps_total", "one request", "none"] >= 11  # decode steps of the second call
    assert found["dynaflow_plans_total",] >= 1
