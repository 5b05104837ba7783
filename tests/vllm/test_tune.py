"""`dynaflow tune` with real vLLM: a start of the server with the same settings reads the table, and does not tune."""

import gc

import pytest
from typer.testing import CliRunner

from dynaflow_serving.cli import app
from dynaflow_serving.policy.bucket import KINDS
from dynaflow_serving.policy.table import Table

AUTO = {"candidates": ["nanoflow"], "micro_batches": [2]}


@pytest.fixture
def serve(monkeypatch):
    """`serve(model, options)`: the report of an engine with the defaults of `vllm serve`, on which no trial may run."""
    import torch
    from vllm import EngineArgs
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    from dynaflow_serving.integrations.vllm.trials import WorkerTrials

    def never(trials, batch):
        raise AssertionError("a trial")

    def start(model, options):
        torch._dynamo.reset()
        monkeypatch.setattr(WorkerTrials, "run_step", never)
        arguments = EngineArgs(
            model, dtype="float32", max_model_len=128, compilation_config={"mode": 2, "backend": "eager"},
            additional_config={"dynaflow": {"strategy": "auto", "options": options, "check": "never"}},
        )  # fmt: skip
        engine = LLMEngine.from_engine_args(arguments, UsageContext.OPENAI_API_SERVER)
        try:
            return engine.collective_rpc("dynaflow_report")[0]
        finally:
            engine.engine_core.shutdown()
            del engine
            gc.collect()
            cleanup_dist_env_and_memory()

    return start


def test_a_table_measured_offline_is_what_the_server_reads(model_path, serve, tmp_path, monkeypatch):
    model, file = model_path("llama"), tmp_path / "table.json"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    command = ["tune", str(model), "--engine", "vllm", "--uncompiled", "--dtype", "float32", "--max-model-len", "128"]
    result = CliRunner().invoke(app, [*command, "-c", "nanoflow", "-n", "2", "--budget", "5", "--out", str(file)])
    assert result.exit_code == 0, result.output
    made = Table.model_validate_json(file.read_text())
    assert made.key["limits"] == "2048 tokens, 128 requests, 128 long"  # of `vllm serve`; LLM() has twice as many
    assert {d.kind for d in made.decisions} == set(KINDS) and all(d.reason for d in made.decisions)
    report = serve(model, {**AUTO, "table": str(file)})
    assert Table.model_validate(report["policy"]) == made
