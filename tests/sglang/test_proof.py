"""The check, traces and counters in SGLang, and all of them under `strategy: auto` on a server of two ranks."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dynaflow_serving.policy.table import Table
from dynaflow_serving.session.check import Check

WRONG = """
import torch
from dynaflow_serving import SplitModule, register_strategy
from dynaflow_serving.strategies.nanoflow import NanoFlow, NanoFlowOptions

class Options(NanoFlowOptions):
    min_tokens: int = 1

def relu_mlp(x, gate_up, down):  # the model's has SiLU
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return torch.{function}(gate) * up @ down.T

@register_strategy("{name}")
class Kernel(NanoFlow):
    Options = Options
    annotations = (SplitModule("LlamaMLP", "mlp"),)

    def schedule(self, s):
        while tasks := s.get_ready_ops():
            for task in tasks:
                s.execute(task, replace=relu_mlp if task.name.endswith(".mlp") else None)
"""


@pytest.fixture
def strategy(tmp_path):
    """`strategy(function)`: one that replaces the MLPs by a kernel with this activation."""

    def write(function):
        file = tmp_path / f"{function.replace('.', '_')}.py"
        file.write_text(WRONG.format(function=function, name=file.stem))
        return str(file)

    return write


def test_equal_outputs_are_compared_and_nothing_stops(one_process, runner, prompts, stock, strategy, tmp_path):
    check = {"every": 3, "folder": str(tmp_path / "mismatch")}
    with one_process.dynaflow(runner, {"strategy": strategy("nn.functional.silu"), "check": check}) as ours:
        tokens, _ = one_process.generate(runner, prompts, 12)
        assert ours.session.check.steps == 4 and not ours.session.check.refused
        assert ours.session.counts.split == 12
    assert tokens.tolist() == stock and not (tmp_path / "mismatch").exists()


def test_a_wrong_kernel_is_stopped_and_its_step_is_the_unsplit_one(
    one_process, runner, prompts, stock, strategy, tmp_path
):
    folder = tmp_path / "mismatch"
    with one_process.dynaflow(runner, {"strategy": strategy("relu"), "check": {"folder": str(folder)}}) as ours:
        tokens, _ = one_process.generate(runner, prompts, 12)
        counts = ours.session.counts
        assert counts.split == 1 and counts.unsplit == {"check: the output differs from the un-split run": 11}
    assert tokens.tolist() == stock
    with one_process.dynaflow(runner, {"strategy": strategy("relu"), "check": "never"}):
        assert one_process.generate(runner, prompts, 12)[0].tolist() != stock
    (file,) = folder.iterdir()
    found = torch.load(file, weights_only=True)
    assert found["tokens"] == list(map(len, prompts)) and found["strategy"] == "relu"
    assert found["split"][0].shape == found["whole"][0].shape == (sum(found["tokens"]), 256)
    assert found["inputs"][0].tolist() == [token for prompt in prompts for token in prompt]
    assert "relu_mlp" in found["plans"][0]


def test_a_step_that_lost_its_plan_is_not_compared(one_process, runner, prompts, stock, monkeypatch, tmp_path):
    attention = runner.model.model.layers[1].self_attn.attn
    config = {"strategy": "nanoflow", "options": {"min_tokens": 1}, "check": {"folder": str(tmp_path)}}
    monkeypatch.setattr(Check, "conclude", None)
    with one_process.dynaflow(runner, config):
        wrapped = attention.forward
        monkeypatch.setattr(attention, "forward", wrapped.__wrapped__)
        tokens, _ = one_process.generate(runner, prompts, 1)
        monkeypatch.setattr(attention, "forward", wrapped)
    assert tokens[:, 0].tolist() == [row[0] for row in stock]


def test_the_plugin_leaves_the_mode_of_prometheus_to_the_engine():
    """It is chosen when prometheus_client is imported, and SGLang says which after it has loaded plugins."""
    script = (
        "import sys\n"
        "from dynaflow_serving.config import load\n"
        "from dynaflow_serving.integrations.sglang import limits, plugin, scheduler, server_args\n"
        "load({'strategy': 'auto', 'check': {}})\n"
        "sys.exit('prometheus_client' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.engine
@pytest.mark.alone
@pytest.mark.timeout(900)
def test_server_of_two_ranks_tunes_and_then_serves_by_the_table(model_path, prompts, serve, tmp_path):
    file, table, traces = tmp_path / "auto.yaml", tmp_path / "table.json", tmp_path / "traces"
    options = {"candidates": ["nanoflow"], "micro_batches": [2], "budget_seconds": 10, "pairs": 3, "table": str(table)}
    config = {"strategy": "auto", "options": options}
    arguments = ("--dynaflow", str(file), "--max-running-requests", "16", "--chunked-prefill-size", "128")
    arguments += ("--skip-server-warmup", "--enable-metrics")

    file.write_text(yaml.safe_dump(config))
    with serve(model_path("llama"), *arguments) as server:
        tuned = Table.model_validate_json(table.read_text())
        assert tuned.key["ranks"] == "2" and all(d.reason for d in tuned.decisions)
        assert any(trial.predicted for d in tuned.decisions for trial in d.trials)
        assert server.info["dynaflow"] == "auto"
        policy = server.info["internal_states"][0]["dynaflow"]["policy"]
        assert policy["buckets"] == len(tuned.decisions) > 8 and policy["table"] == str(table)
        assert policy["adopted"] == {str(bucket): candidate for bucket, candidate in tuned.adopted.items()}
        assert counted(server) == {("nanoflow x2", ""): 0}  # its series is there from the first scrape
        first = server.generate(prompts, 12)

    for decision in tuned.decisions:
        decision.candidate = "nanoflow x2" if decision.kind == "decode" else ""
        decision.noise = 100.0  # the guard lets it run, however slow it is
    tuned.save(table)
    config["trace"] = {"folder": str(traces), "every": 2, "limit": 2}
    config["check"] = {"every": 3, "folder": str(tmp_path / "mismatch")}
    file.write_text(yaml.safe_dump(config))
    with serve(model_path("llama"), *arguments) as server:
        assert server.generate(prompts, 12) == first
        state, metrics = server.info["internal_states"][0]["dynaflow"], counted(server)
    assert len(state["policy"]["adopted"]) == sum(d.kind == "decode" for d in tuned.decisions) > 2
    steps = {("nanoflow x2", ""): state["steps"]["split"]}
    steps |= {("none", reason): count for reason, count in state["steps"]["unsplit"].items()}
    assert metrics == steps and metrics["nanoflow x2", ""] >= 4, "of one rank"
    assert sorted(p.name for p in traces.iterdir()) == [f"step{n:06d}-rank{r}.json" for n in (1, 3) for r in (0, 1)]
    names = {e["name"] for e in json.loads((traces / "step000003-rank1.json").read_text())["traceEvents"]}
    assert any("all_reduce" in name for name in names) and any("attention" in name for name in names)
    assert not (tmp_path / "mismatch").exists()


def counted(server):
    """`dynaflow_steps_total` on the server's endpoint: (strategy, reason) -> count."""
    families = text_string_to_metric_families(server.get("/metrics/"))
    found = [s for f in families for s in f.samples if s.name == "dynaflow_steps_total"]
    return {(s.labels["strategy"], s.labels["reason"]): s.value for s in found}
